"""Asking again, when asking again can help."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable

import anyio

from featureinterp.domain.chat import Reply, Request
from featureinterp.errors import EmptyReplyError, EndpointBusyError, EndpointUnavailableError
from featureinterp.interfaces import LanguageModel

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0


class Retrying:
    """Repeats a request of ``model`` after an :class:`EndpointUnavailableError`, at most ``attempts`` times
    in ``max_seconds``; after an :class:`EndpointBusyError` (a limit per minute, an overload, a model that
    loads) as often as ``max_seconds`` allow; once after an :class:`EmptyReplyError`.

    Waits as long as the endpoint asks, otherwise exponentially with full jitter. Stands outside of
    ``Limited``, so that a wait holds no slot. The last error is raised as it is.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        attempts: int = 6,
        max_seconds: float = 300.0,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = model.name
        self._model, self._attempts, self._max_seconds = model, attempts, max_seconds
        self._sleep, self._clock = sleep, clock
        self._luck = random.Random()  # noqa: S311

    async def complete(self, request: Request) -> Reply:
        start, waited = self._clock(), 0.0
        failed = busy = empty = 0
        while True:
            try:
                return await self._model.complete(request)
            except EndpointUnavailableError as error:
                if isinstance(error, EndpointBusyError):
                    busy += 1
                else:
                    failed += 1
                wait = error.retry_after_s if error.retry_after_s is not None else self._jitter(failed + busy)
                if failed >= self._attempts or max(waited, self._clock() - start) + wait > self._max_seconds:
                    raise
            except EmptyReplyError:
                empty += 1
                if empty > 1:
                    raise
                wait = 0.0
            await self._sleep(wait)
            waited += wait

    def _jitter(self, number: int) -> float:
        """Seconds before another attempt, after ``number`` of them."""
        return self._luck.uniform(0.0, min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(number, 20)))
