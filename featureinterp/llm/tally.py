"""What one piece of work cost, whichever of its tasks asked, and whether or not the answer was kept from an
earlier time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import LanguageModelError
from featureinterp.interfaces import LanguageModel


@dataclass
class Tally:
    """The sum so far."""

    usage: Usage = field(default_factory=Usage)


_CURRENT: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tally() -> Iterator[Tally]:
    """Adds up what :class:`Tallied` models are asked within the block, by the tasks that are started in it,
    too. What an inner block adds up counts towards the outer one when it ends."""
    found = Tally()
    token = _CURRENT.set(found)
    try:
        yield found
    finally:
        _CURRENT.reset(token)
        count(found.usage)


def count(usage: Usage) -> None:
    """Adds ``usage`` to the :func:`tally` around the caller, if there is one."""
    current = _CURRENT.get()
    if current is not None:
        current.usage += usage


class Tallied:
    """Passes requests on to ``model`` and counts the replies towards the :func:`tally` around the caller."""

    def __init__(self, model: LanguageModel) -> None:
        self.name = model.name
        self._model = model

    async def complete(self, request: Request) -> Reply:
        try:
            reply = await self._model.complete(request)
        except LanguageModelError as error:
            if isinstance(error.usage, Usage):
                count(error.usage)
            raise
        count(reply.usage)
        return reply
