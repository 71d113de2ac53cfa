"""Asking again, when asking again can help."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import tenacity

from featureinterp.errors import EndpointUnavailableError
from featureinterp.interfaces import LanguageModel
from featureinterp.llm.types import Reply, Request

MAX_WAIT_S = 30.0


class Retrying:
    """Repeats a request of ``model`` after an :class:`EndpointUnavailableError`, at most ``attempts`` times in ``max_seconds``.

    Waits as long as the endpoint asks (Retry-After), otherwise exponentially with full jitter. Stands outside of ``Limited``,
    so that a wait holds no slot. The last error is raised as it is.
    """

    def __init__(self, model: LanguageModel, *, attempts: int = 6, max_seconds: float = 300.0, sleep: Callable[[float], Awaitable[None]] = anyio.sleep) -> None:
        self.name = model.name
        self._model = model
        self._policy = {
            "retry": tenacity.retry_if_exception_type(EndpointUnavailableError),
            "stop": tenacity.stop_after_attempt(attempts) | tenacity.stop_before_delay(max_seconds),
            "wait": _wait,
            "sleep": sleep,
            "reraise": True,
        }

    async def complete(self, request: Request) -> Reply:
        return await tenacity.AsyncRetrying(**self._policy)(self._model.complete, request)  # type: ignore[arg-type]


_JITTER = tenacity.wait_random_exponential(multiplier=0.5, max=MAX_WAIT_S)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, EndpointUnavailableError) else None
    return asked if asked is not None else _JITTER(state)
