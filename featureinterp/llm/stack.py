"""An endpoint with everything around it, put together in one place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.errors import ContentRefusedError, InputError
from featureinterp.interfaces import LanguageModel
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.config import LOCAL, Endpoint
from featureinterp.llm.learnt import recall, remember
from featureinterp.llm.limited import Limited, Limits
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.prices import Price
from featureinterp.llm.retrying import Retrying
from featureinterp.llm.tally import Tallied
from featureinterp.llm.usage import Count

InProcess = Callable[[Endpoint], LanguageModel]
PROBE = Request((Message("user", "Say yes."),), max_tokens=4)


@dataclass(frozen=True)
class Stack:
    """An endpoint that is open. ``once``: its requests metered and within their limits. ``limited``: these,
    tried again. ``bare``: the adapter alone. ``own``: whether it is a model of this machine, which needs no
    check. ``max_wait_s``: how long a check waits for an endpoint that is busy."""

    once: LanguageModel
    limited: LanguageModel
    bare: Any
    own: bool
    max_wait_s: float = 300.0

    def model(self, replies: ReplyStore | None = None, *, retry_failed: bool = False) -> LanguageModel:
        """The model for all work; with a store of replies it asks nothing twice, with ``retry_failed`` but
        what was answered unusably.
        """
        room = getattr(self.bare, "room", lambda request: request.max_tokens)
        if replies is None:
            return Answering(Tallied(self.limited))
        asked = Cached(
            self.limited, replies, identity=self.bare.identity, room=room, retry_failed=retry_failed
        )
        return Answering(Tallied(asked))

    async def check(self) -> Reply | None:
        """One small request, so that a wrong key, name or address is known before any work; None for a model
        of this machine, which is not asked. A model that is loading is waited for. It counts like every other
        request: towards the limits, the budget and the bill."""
        return (
            None
            if self.own
            else await Retrying(self.once, attempts=1, max_seconds=self.max_wait_s).complete(PROBE)
        )


class Answering:
    """Raises ``ContentRefusedError`` where ``model`` passes on that a filter or the model itself refused;
    what that cost was counted by then.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.name = model.name
        self._model = model

    async def complete(self, request: Request) -> Reply:
        reply = await self._model.complete(request)
        if reply.refused is not None:
            raise ContentRefusedError(reply.refused)
        return reply


@asynccontextmanager
async def open_stack(
    endpoint: Endpoint,
    meter: Meter,
    *,
    price: Price | None = None,
    in_process: InProcess | None = None,
    tokenizer: Callable[[str], Any] | None = None,
) -> AsyncIterator[Stack]:
    """Innermost first: the adapter; metered; limited, so that what waits for its turn has not been spent;
    retrying, so that a backoff holds no slot; then cached and tallied (:meth:`Stack.model`). The adapter is
    closed at the end of the block. ``in_process`` makes the model of an endpoint that is this process itself;
    ``tokenizer`` gives that of the endpoint's, for counting what it does not report."""
    bare: Any
    if endpoint.base_url is None:
        from featureinterp.llm.embedded import EmbeddedModel

        bare = EmbeddedModel(endpoint.model)
    elif endpoint.base_url == LOCAL:
        if in_process is None:
            raise InputError(
                f"a local language model cannot be loaded here: give {endpoint.model!r} an endpoint's address"
            )
        bare = in_process(endpoint)
    else:
        from featureinterp.llm.openai import OpenAIModel

        bare = OpenAIModel(
            endpoint.base_url,
            endpoint.model,
            api_key_env=endpoint.api_key_env,
            timeout_s=endpoint.timeout_s,
            extra_body=endpoint.extra_body,
            extra_headers=endpoint.extra_headers,
            reply_tokens=endpoint.reply_tokens,
            thinking_tokens=endpoint.thinking_tokens,
            effort=endpoint.effort,
            accepts=recall(endpoint.base_url, endpoint.model),
            remember=partial(remember, endpoint.base_url, endpoint.model),
        )
    try:
        limited = Limited(
            Metered(bare, meter, price=price, count=await _counter(endpoint, tokenizer)),
            Limits(endpoint.concurrency, rpm=endpoint.rpm, tpm=endpoint.tpm),
        )
        retrying = Retrying(limited, attempts=endpoint.max_attempts, max_seconds=endpoint.max_wait_s)
        yield Stack(limited, retrying, bare, endpoint.base_url in (None, LOCAL), endpoint.max_wait_s)
    finally:
        await bare.aclose()


async def _counter(endpoint: Endpoint, tokenizer: Callable[[str], Any] | None) -> Count | None:
    """Counts tokens with the endpoint's tokenizer, where it is named."""
    if endpoint.tokenizer is None or tokenizer is None:
        return None
    found = await anyio.to_thread.run_sync(tokenizer, endpoint.tokenizer)
    return lambda text: len(found.encode(text, add_special_tokens=False))
