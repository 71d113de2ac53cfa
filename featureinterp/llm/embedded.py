"""The embedded explainer as a language model: its server starts with the first request and ends with ``close``."""

from __future__ import annotations

from contextlib import ExitStack

import anyio
import anyio.to_thread

from featureinterp.assets import fetch
from featureinterp.llm.config import EMBEDDED
from featureinterp.llm.local_server import check_runtime, local_server
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.types import Reply, Request


class EmbeddedModel:
    """An embedded GGUF model behind a server of our own. Use it as an async context manager, so that the server ends with it."""

    identity = "embedded"

    def __init__(self, name: str = EMBEDDED, *, threads: int | None = None) -> None:
        check_runtime()
        self.name = name
        self._threads = threads
        self._stack = ExitStack()
        self._starting = anyio.Lock()
        self._model: OpenAIModel | None = None

    async def __aenter__(self) -> EmbeddedModel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the server."""
        model, self._model = self._model, None
        if model is not None:
            await model.aclose()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._stack.close)

    async def complete(self, request: Request) -> Reply:
        async with self._starting:
            if self._model is None:
                self._model = await anyio.to_thread.run_sync(self._start)
        return await self._model.complete(request)

    def _start(self) -> OpenAIModel:
        server = self._stack.enter_context(local_server(fetch(self.name).file, slots=1, threads=self._threads))
        return OpenAIModel(server.base_url, self.name, api_key=server.key, timeout_s=600)
