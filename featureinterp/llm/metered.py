"""Adding up what was used."""

from __future__ import annotations

from featureinterp.domain.usage import Usage
from featureinterp.interfaces import LanguageModel
from featureinterp.llm.types import Reply, Request


class Metered:
    """Passes requests on to ``model`` and keeps the sum of what the replies cost in ``usage``."""

    def __init__(self, model: LanguageModel) -> None:
        self.name = model.name
        self.usage = Usage()
        self._model = model

    async def complete(self, request: Request) -> Reply:
        reply = await self._model.complete(request)
        self.usage += reply.usage
        return reply
