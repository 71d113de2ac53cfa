"""Doing what the journal does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featureinterp.domain.score import Failure
from featureinterp.errors import EndpointRefusedError, FeatureInterpError, JobStoppedError, StorageError
from featureinterp.interfaces import Work
from featureinterp.jobs.budget import Guard
from featureinterp.jobs.journal import Journal
from featureinterp.llm.tally import count, tally

FORMAT = 3
"""Part of every key; another one makes all that is kept unknown."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of a piece of work. ``value`` None: it failed, and ``failure`` says why. ``reused``: the
    journal had it. ``partial``: some of its requests failed."""

    value: Any | None
    reused: bool = False
    partial: bool = False
    failure: Failure | None = None


class Keeper:
    """Keeps what is done in ``journal``, and tells ``guard`` how it went."""

    def __init__(self, journal: Journal, guard: Guard) -> None:
        self.journal, self.guard = journal, guard

    async def keep(
        self, key: str, feature: int, stage: str, work: Work, provenance: Mapping[str, Any]
    ) -> Kept:
        """What the journal holds under ``key``, or what ``work`` gives now.

        A failure of one feature is a row and stops no other; a bug stops the run. Raises
        ``EndpointRefusedError``, ``JobStoppedError`` and ``StorageError``.
        """
        known = self.journal.get(key)
        if known is not None and known.status == "done":
            count(known.usage)
            return Kept(known.value, reused=True)
        with tally() as spent:
            try:
                value, gaps = await work()
            except (EndpointRefusedError, JobStoppedError, StorageError):
                raise
            except FeatureInterpError as error:
                failure = Failure(feature, stage, type(error).__name__, str(error))
                if known is None:
                    self.journal.failed(key, failure, usage=spent.usage)
                self.guard.outcome(failure)
                if known is None:
                    return Kept(None, failure=failure)
                return Kept(known.value, partial=True)  # with gaps, which is more than nothing
            self.journal.stage(
                key, feature, stage, value, usage=spent.usage, provenance=provenance, gaps=gaps
            )
        self.guard.outcome(None)
        return Kept(value, partial=bool(gaps))
