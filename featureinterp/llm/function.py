"""A language model made from a function, for tests and for experiments with fixed answers."""

from __future__ import annotations

from collections.abc import Callable

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.usage import Usage


class FunctionModel:
    """Answers each request with ``answer(request)``: a text, or a whole :class:`Reply`; keeps the requests in
    ``requests``.
    """

    def __init__(self, answer: Callable[[Request], str | Reply], name: str = "function") -> None:
        self.name = name
        self.requests: list[Request] = []
        self._answer = answer

    async def complete(self, request: Request) -> Reply:
        self.requests.append(request)
        answer = self._answer(request)
        return (
            answer
            if isinstance(answer, Reply)
            else Reply((answer,), (False,), Usage(1, cost_usd=None), ({},))
        )
