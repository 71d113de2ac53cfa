"""Every error that featureinterp raises on purpose.

    FeatureInterpError
    ├── InputError                 what the user asked for cannot be done; nothing was written
    │   ├── UnknownNameError       a model, SAE, corpus, hook, explainer … that does not exist
    │   ├── CorpusError            text that is empty, binary, not UTF-8, or without the named field
    │   ├── IncompatibleError      two parts that do not belong together (SAE width, store of another SAE)
    │   ├── FeatureRangeError      a feature index outside the dictionary
    │   └── FolderInUseError       another process works in the folder
    ├── StorageError               the disk is full, or a file cannot be written or read
    │   └── IncompleteStoreError   a store whose writing never finished, or that is not whole any more
    │       └── DamagedStoreError  what a store holds is not what was written
    ├── DeviceMemoryError          the smallest piece of work does not fit into a GPU's memory
    ├── DownloadError              no source delivered the file
    │   └── ChecksumError          a file arrived whole and is not the one that was declared
    ├── JobStoppedError            a job ended before it was through; what is finished is kept
    │   ├── BudgetReachedError     a limit of money, tokens or time
    │   └── TooManyFailuresError   too large a share of the stages failed
    └── LanguageModelError         an endpoint or a local model did not give a usable reply
        ├── EndpointUnavailableError   cannot be reached, timed out, failing (can succeed later) │   └──
        EndpointBusyError      a limit per minute, an overload, a model that loads (it passes with time) ├──
        EndpointRefusedError       the key or the model's name is wrong (no request will succeed) ├──
        RequestRefusedError        this one request is wrong, too long for example (others can succeed) │
        └── ContentRefusedError    a filter or the model itself refuses what the request is about ├──
        TruncatedReplyError        the reply was cut by the token limit └── MalformedReplyError        the
        reply does not have the form that was asked for
            └── EmptyReplyError        it holds no choice at all (once more can help)

The message of each is one sentence that says what was wrong, which value, and what to do.
"""

from __future__ import annotations

from typing import Any


class FeatureInterpError(Exception):
    """Root of the tree. ``retryable`` says whether the same call can succeed later."""

    retryable = False


class InputError(FeatureInterpError):
    """What the user asked for cannot be done; nothing was written."""


class UnknownNameError(InputError):
    """A name that stands for nothing."""


class CorpusError(InputError):
    """Text that cannot be used."""


class IncompatibleError(InputError):
    """Two parts that do not belong together."""


class FeatureRangeError(InputError):
    """A feature index outside the dictionary."""


class FolderInUseError(InputError):
    """Another process works in the folder."""


class StorageError(FeatureInterpError):
    """The disk is full, or a file cannot be written or read."""


class IncompleteStoreError(StorageError):
    """A store whose writing never finished, or that is not whole any more."""


class DamagedStoreError(IncompleteStoreError):
    """What a store holds is not what was written."""


class DeviceMemoryError(FeatureInterpError):
    """The smallest piece of work does not fit into the memory of the device."""


class DownloadError(FeatureInterpError):
    """No source delivered the file."""


class ChecksumError(DownloadError):
    """A file arrived whole and is not the one that was declared."""


class JobStoppedError(FeatureInterpError):
    """A job ended before it was through. What is finished is kept, and the same command goes on."""


class BudgetReachedError(JobStoppedError):
    """A limit of money, tokens or time."""


class TooManyFailuresError(JobStoppedError):
    """Too large a share of the stages failed."""


class LanguageModelError(FeatureInterpError):
    """An endpoint or a local model did not give a usable reply.

    ``billed``: whether it did work that it is likely to bill all the same. ``usage``: the ``Usage`` of that,
    where it is known.
    """

    billed = False
    usage: Any = None


class EndpointUnavailableError(LanguageModelError):
    """Cannot be reached, timed out or is overloaded; the same request can succeed later.

    ``retry_after_s`` is what the endpoint asked for, in seconds, or None.
    """

    retryable = True

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EndpointBusyError(EndpointUnavailableError):
    """A limit per minute, an overload or a model that is loading: it passes with time, however often one has
    to ask.
    """


class EndpointRefusedError(LanguageModelError):
    """The key or the model's name is wrong, or the endpoint cannot do what is asked at all; no request will
    succeed.
    """


class RequestRefusedError(LanguageModelError):
    """The endpoint refuses this request, for example because it is too long; others can succeed."""


class ContentRefusedError(RequestRefusedError):
    """A filter of the endpoint, or the model itself, refuses what the request is about; asking again changes
    nothing.
    """


class TruncatedReplyError(LanguageModelError):
    """The reply was cut by the token limit."""

    billed = True


class MalformedReplyError(LanguageModelError):
    """The reply does not have the form that was asked for."""

    billed = True


class EmptyReplyError(MalformedReplyError):
    """The reply holds no choice at all; asking once more can help."""
