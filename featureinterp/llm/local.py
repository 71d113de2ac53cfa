"""A transformers model in this process as a language model: its own chat template, generation in a worker thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import anyio.to_thread
import torch

from featureinterp.domain.usage import Usage
from featureinterp.errors import InputError, RequestRefusedError
from featureinterp.llm.types import Reply, Request


class LocalModel:
    """Answers requests with a causal language model and its tokenizer, one request at a time; ``load`` gives both when the first one comes.

    Sampling is reproducible: the same request has the same answer. A JSON schema is not enforced, so that structured replies rest on
    the prompt. Raises ``InputError`` for a tokenizer without a chat template and ``RequestRefusedError`` for a prompt beyond the context.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], *, name: str) -> None:
        self.name = name
        self._load = load
        self._busy = threading.Lock()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load()

    async def complete(self, request: Request) -> Reply:
        """One request, computed in a worker thread."""
        return await anyio.to_thread.run_sync(self._complete, request, abandon_on_cancel=True)

    async def aclose(self) -> None:
        """There is nothing to close."""

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _complete(self, request: Request) -> Reply:
        with self._busy:
            start = time.monotonic()
            model, tokenizer = self._loaded
            ids = torch.tensor([list(request.prompt) or self._chat(tokenizer, request)], device=model.device)
            most = getattr(model.config, "max_position_embeddings", None)
            if most is not None and ids.shape[1] + request.max_tokens > most:
                raise RequestRefusedError(f"{ids.shape[1]:,} prompt tokens and {request.max_tokens:,} of a reply do not fit into the {most:,} of {self.name}")
            if request.prompt:
                return self._read(model, tokenizer, ids, request, start)
            return self._generate(model, tokenizer, ids, request, start)

    def _chat(self, tokenizer: Any, request: Request) -> list[int]:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"the tokenizer of {self.name} has no chat template: give an instruct model")
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def _generate(self, model: Any, tokenizer: Any, ids: torch.Tensor, request: Request, start: float) -> Reply:
        torch.manual_seed(request.seed or 0)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0} if request.temperature > 0 else {"do_sample": False}
        stops = {"stop_strings": list(request.stop), "tokenizer": tokenizer} if request.stop else {}
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_tokens,
            num_return_sequences=request.n,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **sampling,
            **stops,
        )
        ends = _ends(model, tokenizer)
        texts, truncated, first, n = [], [], [], 0
        for row, sequence in enumerate(made.sequences[:, ids.shape[1] :].tolist()):
            whole = next((i for i, token in enumerate(sequence) if token in ends), None)
            text = tokenizer.decode(sequence[:whole], skip_special_tokens=True)
            cut = min((text.index(s) for s in request.stop if s in text), default=None)
            texts.append(text if cut is None else text[:cut])
            truncated.append(whole is None and cut is None)
            n += len(sequence) if whole is None else whole + 1
            first.append(_alternatives(tokenizer, made.logits[0][row], request.top_logprobs))
        return Reply(tuple(texts), tuple(truncated), Usage(1, ids.shape[1], n, time.monotonic() - start, 0.0), tuple(first))

    def _read(self, model: Any, tokenizer: Any, ids: torch.Tensor, request: Request, start: float) -> Reply:
        logits = model(ids).logits[0]
        read = tuple(_alternatives(tokenizer, logits[place - 1], request.top_logprobs) for place in request.read_at)
        return Reply(("",), (False,), Usage(1, ids.shape[1], 0, time.monotonic() - start, 0.0), ({},), read)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    ends = set(found if isinstance(found, list) else [] if found is None else [found])
    return ends | ({tokenizer.eos_token_id} - {None})


def _alternatives(tokenizer: Any, logits: torch.Tensor, n: int) -> dict[str, float]:
    """The ``n`` most probable tokens by their text, with natural-log probabilities; of equal texts the more probable."""
    if not n:
        return {}
    values, ids = torch.log_softmax(logits.float(), -1).topk(min(n, logits.shape[-1]))
    out: dict[str, float] = {}
    for value, token in zip(values.tolist(), ids.tolist(), strict=True):
        out.setdefault(tokenizer.decode([token]), value)
    return out
