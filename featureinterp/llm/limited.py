"""At most so many requests in flight, and at most so many requests and tokens per minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from featureinterp.domain.chat import Reply, Request
from featureinterp.errors import EndpointBusyError, InputError
from featureinterp.interfaces import LanguageModel

WINDOW_S = 60.0
MARGIN_S = 1.0
"""Requests count for a minute and this long, because they reach the endpoint later than they are sent, some
later than others.
"""
FIRST_BYTES_PER_TOKEN = 2.0
"""Of the first prompt; later ones are estimated by the densest prompt that was answered."""


@dataclass(slots=True)
class _Entry:
    until: float
    tokens: int


class Limits:
    """What all users of one endpoint share: ``concurrency`` slots, and the requests and tokens of the last
    minute.

    A request's tokens are estimated when it is sent (its prompt, and the room of each reply, as providers
    count them) and put right when it is answered. Requests are let through in the order in which they came.
    """

    def __init__(
        self,
        concurrency: int,
        *,
        rpm: int | None = None,
        tpm: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        for name, value in (
            ("concurrency", concurrency),
            ("requests per minute", rpm),
            ("tokens per minute", tpm),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} of {value} is not possible: give at least 1")
        self.concurrency, self.rpm, self.tpm = concurrency, rpm, tpm
        self.slots = anyio.Semaphore(concurrency, max_value=concurrency, fast_acquire=True)
        self._clock, self._sleep = clock, sleep
        self._turn = anyio.Lock()
        self._recent: deque[_Entry] = deque()
        self._tokens = 0
        self._bytes_per_token: float | None = None
        self._closed_until = 0.0

    async def open(self) -> None:
        """Waits as long as the endpoint has asked for. Nobody holds a slot meanwhile."""
        while (wait := self._closed_until - self._clock()) > 0:
            await self._sleep(wait)

    def close(self, seconds: float) -> None:
        """Lets no request through for so long, because the endpoint asked for it."""
        self._closed_until = max(self._closed_until, self._clock() + min(seconds, WINDOW_S))

    async def admit(self, request: Request, room: int | None = None) -> _Entry | None:
        """Waits until the request fits into the minute. ``room``: tokens that each reply may have, thoughts
        among them (``max_tokens`` where it is not known): providers count them when a request comes (Groq,
        OpenAI). Raises ``InputError`` for one that fits into no minute."""
        if self.rpm is None and self.tpm is None:
            return None
        expected = self._estimate(request, room or request.max_tokens)
        if self.tpm is not None and expected > self.tpm:
            thoughts = (
                "" if self._estimate(request, request.max_tokens) > self.tpm else ", lower --thinking-tokens"
            )
            raise InputError(
                f"a request of about {expected:,} tokens does not fit into {self.tpm:,} tokens per minute: "
                f"raise --tpm{thoughts} or shorten the prompt"
            )
        async with self._turn:
            while (wait := self._wait(expected)) > 0:
                await self._sleep(wait)
            entry = _Entry(self._clock() + WINDOW_S + MARGIN_S, expected)
            self._recent.append(entry)
            self._tokens += expected
            return entry

    def settle(self, entry: _Entry | None, request: Request, reply: Reply) -> None:
        """Puts the estimate right with what the reply reports."""
        used = reply.usage.prompt_tokens + reply.usage.completion_tokens
        if entry is None or not used:
            return
        if entry.until > self._clock():
            self._tokens += used - entry.tokens
        entry.tokens = used
        if reply.usage.prompt_tokens:
            seen = _bytes(request) / reply.usage.prompt_tokens
            self._bytes_per_token = min(self._bytes_per_token or seen, seen)

    def _estimate(self, request: Request, room: int) -> int:
        return int(_bytes(request) / (self._bytes_per_token or FIRST_BYTES_PER_TOKEN)) + room * request.n

    def _wait(self, expected: int) -> float:
        now = self._clock()
        while self._recent and self._recent[0].until <= now:
            self._tokens -= self._recent.popleft().tokens
        wait = 0.0
        if self.rpm is not None and len(self._recent) >= self.rpm:
            wait = self._recent[len(self._recent) - self.rpm].until - now
        if self.tpm is not None:
            over = self._tokens + expected - self.tpm
            for entry in self._recent:
                if over <= 0:
                    break
                over -= entry.tokens
                wait = max(wait, entry.until - now)
        return wait


def _bytes(request: Request) -> int:
    return sum(len(m.content.encode()) + 16 for m in request.messages) + 4 * len(request.prompt)


class Limited:
    """Sends the requests of ``model`` within ``limits``; the others wait their turn."""

    def __init__(self, model: LanguageModel, limits: Limits | int) -> None:
        self.name = model.name
        self.limits = Limits(limits) if isinstance(limits, int) else limits
        self._model = model
        self.room: Callable[[Request], int] = getattr(model, "room", lambda request: request.max_tokens)

    async def complete(self, request: Request) -> Reply:
        await self.limits.open()
        async with self.limits.slots:
            entry = await self.limits.admit(request, self.room(request))
            try:
                reply = await self._model.complete(request)
            except EndpointBusyError as error:
                if error.retry_after_s:
                    self.limits.close(error.retry_after_s)
                raise
        self.limits.settle(entry, request, reply)
        return reply
