"""Adding up what was used, and stopping before it is more than was allowed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import anyio

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, LanguageModelError
from featureinterp.interfaces import LanguageModel
from featureinterp.llm.prices import Price
from featureinterp.llm.usage import Count, checked_usage, estimated_prompt, prompt_size

LEARNT_AFTER = 8
"""Replies of one limit, after which the longest of them stands for the next one instead of the limit."""


@dataclass
class Meter:
    """What a job has used so far, over all its models. ``before`` is called before every request and raises
    when there is nothing left to spend; ``fits`` says whether what is under way and one more request stay
    within it. ``in_flight``: requests under way.
    ``reserved``: what they are expected to use. ``refused``: why no further request has a chance."""

    usage: Usage = field(default_factory=Usage)
    in_flight: int = 0
    before: Callable[[], None] = lambda: None
    refused: EndpointRefusedError | None = None
    fits: Callable[[Usage], bool] = lambda _: True
    reserved: Usage = field(default_factory=Usage)
    _changed: anyio.Event | None = None

    async def enter(self, expected: Usage) -> None:
        """Reserves what a request is expected to use; waits while others are under way and it does not fit
        beside them.
        """
        while True:
            if self.refused is not None:
                raise self.refused
            self.before()
            if not self.in_flight or self.fits(self.reserved + expected):
                break
            self._changed = self._changed or anyio.Event()
            await self._changed.wait()
        self.in_flight += 1
        self.reserved += expected

    def leave(self, expected: Usage, used: Usage | None) -> None:
        """Puts what a request used in the place of what it reserved; None: nothing is known to be billed."""
        self.in_flight -= 1
        self.reserved = self.reserved + _negative(expected) if self.in_flight else Usage()
        if used is not None:
            self.usage += used
        if self._changed is not None:
            self._changed.set()
            self._changed = None


def _negative(usage: Usage) -> Usage:
    cost = None if usage.cost_usd is None else -usage.cost_usd
    return Usage(-usage.requests, -usage.prompt_tokens, -usage.completion_tokens, -usage.seconds, cost)


class Metered:
    """Passes requests on to ``model``, prices the replies and adds them up in ``meter``. Stands inside of
    ``Limited``: a request that waits for its turn is not sent any more when the budget has been reached or
    the key refused meanwhile.

    Counts of tokens that are missing or too low to be true are estimated, with ``count`` or by the length of
    the texts. A request that failed after the endpoint had worked on it counts as much as it was expected to
    use, unless the error knows better. Without a ``price`` the provider's own bill is the measure, and its
    dearest token so far that of what comes without a bill. ``room``: tokens that the reply to a request may
    have.
    """

    def __init__(
        self,
        model: LanguageModel,
        meter: Meter | None = None,
        *,
        price: Price | None = None,
        count: Count | None = None,
    ) -> None:
        self.name = model.name
        self.meter = meter or Meter()
        self._model, self._price, self._count = model, price, count
        self.room: Callable[[Request], int] = getattr(model, "room", lambda request: request.max_tokens)
        self._seen: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._per_byte = 0.0
        self._dearest: float | None = None

    @property
    def usage(self) -> Usage:
        """The sum so far."""
        return self.meter.usage

    async def complete(self, request: Request) -> Reply:
        expected = self.expected(request)
        await self.meter.enter(expected)
        used: Usage | None = None
        try:
            reply = await self._model.complete(request)
            counted = checked_usage(request, reply, self._count)
            self._learn_bill(counted)
            used = self._priced(counted)
            self._learn(request, used, len(reply.texts))
            return replace(reply, usage=used)
        except EndpointRefusedError as error:
            self.meter.refused = error
            raise
        except LanguageModelError as error:
            if error.billed:
                known = error.usage
                used = (
                    self._priced(known)
                    if isinstance(known, Usage) and known.tokens
                    else replace(expected, estimated=1)
                )
                error.usage = used
            raise
        finally:
            self.meter.leave(expected, used)

    def expected(self, request: Request) -> Usage:
        """What a request is likely to use at most: its prompt, and the longest reply that may come, or that
        came to requests like it.
        """
        if request.prompt or not self._per_byte:
            prompt = estimated_prompt(request, self._count)
        else:
            prompt = int(self._per_byte * prompt_size(request)) + 1
        room = self.room(request)
        replies, longest = self._seen[room]
        reply = longest if replies >= LEARNT_AFTER else room
        return self._priced(Usage(1, prompt, reply * request.n, 0.0, None))

    def _priced(self, usage: Usage) -> Usage:
        """With its cost: the provider's own bill, unless it is a small part of what the price says; or by the
        price, or by bills so far.
        """
        if self._price is None:
            if usage.cost_usd is None and self._dearest is not None:
                return replace(usage, cost_usd=self._dearest * usage.tokens, estimated=usage.requests)
            return usage
        cost = self._price.of(usage)
        own = usage.cost_usd
        return usage if own is not None and own >= LEAST_OF_PRICE * cost else replace(usage, cost_usd=cost)

    def _learn(self, request: Request, used: Usage, n: int) -> None:
        seen = self._seen[self.room(request)]
        seen[0] += 1
        seen[1] = max(seen[1], -(-used.completion_tokens // max(1, n)))
        size = prompt_size(request)
        if size and not used.estimated:
            self._per_byte = max(self._per_byte, used.prompt_tokens / size)

    def _learn_bill(self, used: Usage) -> None:
        """Learns from a provider's bill what a token costs at most."""
        if used.cost_usd is not None and used.tokens:
            self._dearest = max(self._dearest or 0.0, used.cost_usd / used.tokens)


LEAST_OF_PRICE = 0.01
"""A bill below this part of the price is not believed: a key of one's own at a router costs nothing there,
and its price elsewhere.
"""
