"""At most so many requests in flight."""

from __future__ import annotations

import anyio

from featureinterp.interfaces import LanguageModel
from featureinterp.llm.types import Reply, Request


class Limited:
    """Lets at most ``concurrency`` requests of ``model`` be under way at once; the others wait their turn."""

    def __init__(self, model: LanguageModel, concurrency: int) -> None:
        self.name = model.name
        self._model = model
        self._slots = anyio.Semaphore(concurrency, max_value=concurrency)

    async def complete(self, request: Request) -> Reply:
        async with self._slots:
            return await self._model.complete(request)
