"""The embedded explainer as a language model: its server starts with the first request and ends with
``close``.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

import anyio
import anyio.to_thread

from featureinterp.assets import fetch
from featureinterp.domain.chat import Reply, Request
from featureinterp.errors import EndpointUnavailableError
from featureinterp.llm.config import EMBEDDED
from featureinterp.llm.local_server import check_runtime, local_server, slots_for
from featureinterp.llm.openai import OpenAIModel

FIRST_READ, FIRST_WRITE = 4.0, 0.5
"""Tokens per second, read and written, that the slowest machine in use is trusted with before anything is
measured.
"""
PATIENCE, LEAST_S, LONGEST_S = 6.0, 120.0, 3600.0
_BYTES_PER_TOKEN = 3.0


@dataclass
class Pace:
    """How long a reply may take: ``PATIENCE`` times what the speeds seen so far let expect, and at least two
    minutes.

    ``read`` and ``write`` are tokens per second, of the slowest reply so far. A cached beginning of a prompt
    is read at once, so a reply says at least how fast its machine is when nothing is cached; the estimate
    errs on the patient side.
    """

    read: float = FIRST_READ
    write: float = FIRST_WRITE
    measured: bool = False

    def limit_s(self, request: Request) -> float:
        """Seconds that a request may take."""
        n_bytes = sum(len(m.content.encode()) for m in request.messages)
        prompt = len(request.prompt) or n_bytes / _BYTES_PER_TOKEN
        expected = prompt / self.read + request.n * request.max_tokens / self.write
        return min(max(PATIENCE * expected, LEAST_S), LONGEST_S)

    def saw(self, reply: Reply, seconds: float) -> None:
        """Learns from a reply that took ``seconds``: what is written takes at least half of the time for as
        many tokens.
        """
        usage = reply.usage
        if seconds <= 0 or not usage.completion_tokens:
            return
        write = usage.completion_tokens / seconds
        read = usage.prompt_tokens / seconds
        self.write = min(self.write, write) if self.measured else write
        self.read = min(self.read, read) if self.measured else read
        self.measured = True


class EmbeddedModel:
    """An embedded GGUF model behind a server of our own. Use it as an async context manager, so that the
    server ends with it.

    No more requests are under way than the server has ``slots``, so that none waits inside it while its time
    runs; how long one may take follows the speed that was measured.
    """

    identity = "embedded"

    def __init__(self, name: str = EMBEDDED, *, threads: int | None = None, slots: int | None = None) -> None:
        check_runtime()
        self.name = name
        self.pace = Pace()
        self.slots = slots or slots_for(threads)
        self._threads = threads
        self._stack = ExitStack()
        self._starting = anyio.Lock()
        self._free = anyio.Semaphore(self.slots, max_value=self.slots)
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
        """One request, when a slot is free. Raises ``EndpointUnavailableError`` when the server does not
        start or does not answer in time."""
        async with self._starting:
            if self._model is None:
                self._model = await anyio.to_thread.run_sync(self._start)
        async with self._free:
            limit, start = self.pace.limit_s(request), time.monotonic()
            try:
                with anyio.fail_after(limit):
                    reply = await self._model.complete(request)
            except TimeoutError as error:
                raise EndpointUnavailableError(
                    f"the embedded model did not answer within {limit:.0f} s, {PATIENCE:.0f} times what "
                    "its speed so far "
                    f"({self.pace.write:.1f} tokens/s written) lets expect: is the machine busy with other "
                    "work?"
                ) from error
            self.pace.saw(reply, time.monotonic() - start)
            return reply

    def _start(self) -> OpenAIModel:
        server = local_server(fetch(self.name).file, slots=self.slots, threads=self._threads)
        started = self._stack.enter_context(server)
        return OpenAIModel(started.base_url, self.name, api_key=started.key, timeout_s=2 * LONGEST_S)
