"""A transformers model in this process as a language model: its own chat template, generation in a worker
thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import anyio
import anyio.to_thread
import torch

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import DeviceMemoryError, InputError, RequestRefusedError
from featureinterp.llm.roles import chat_ids
from featureinterp.llm.tokens import KEPT, Token
from featureinterp.local.prefix_cache import PrefixCache, PrefixModel, lock_of, shared_tokens
from featureinterp.machine.accelerator import fit_of, in_parts

BATCH_TOKENS = 1024


@dataclass(slots=True)
class _Question:
    """A request for one of a few short answers, until it has its reply or the error that it caused."""

    request: Request
    reply: Reply | None = None
    error: Exception | None = None


class LocalModel:
    """Answers requests with a causal language model and its tokenizer; ``load`` gives both when the first one
    comes.

    Requests that name their ``answers`` are read together, as many as wait: what they begin with in common is
    read once, and one pass gives every reply's first token. All others are answered one at a time. Sampling
    is reproducible: the same request has the same answer. A JSON schema is not enforced, so that structured
    replies rest on the prompt. Raises ``InputError`` for a tokenizer without a chat template and
    ``RequestRefusedError`` for a prompt beyond the context. ``dtype``: that of the weights as they are
    loaded, which answers depend on.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], *, name: str, dtype: str | None = None) -> None:
        self.name, self.identity = name, ["local", dtype]
        self._load = load
        self._busy = threading.Lock()
        self._questions: list[_Question] = []
        self._turn = anyio.Lock()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load()

    @cached_property
    def _prefixes(self) -> PrefixCache:
        return PrefixCache(PrefixModel(self._loaded[0]))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Loads the model once, and computes with it alone."""
        with self._busy, lock_of(self._loaded[0]):
            yield

    async def complete(self, request: Request) -> Reply:
        """One request, computed in a worker thread."""
        if request.answers and request.n == 1 and not (request.temperature or request.stop or request.prompt):
            return await self._answer(_Question(request))
        return await anyio.to_thread.run_sync(self._complete, request, abandon_on_cancel=True)

    async def _answer(self, question: _Question) -> Reply:
        """The reply to a question. Whoever has its turn answers all that wait, so that most find theirs
        answered.
        """
        self._questions.append(question)
        try:
            async with self._turn:
                if question.reply is None and question.error is None:
                    waiting = [q for q in self._questions if q.reply is None and q.error is None]
                    await anyio.to_thread.run_sync(self._answer_all, waiting, abandon_on_cancel=True)
        finally:
            self._questions.remove(question)
        if question.error is not None:
            raise question.error
        assert question.reply is not None
        return question.reply

    async def aclose(self) -> None:
        """There is nothing to close."""

    @torch.inference_mode()
    def _complete(self, request: Request) -> Reply:
        with self._alone():
            return self._alone_answered(self._ids(request), request)

    def _alone_answered(self, ids: Sequence[int], request: Request) -> Reply:
        """A reply by itself. Raises ``DeviceMemoryError`` when it does not fit."""
        start, (model, tokenizer) = time.monotonic(), self._loaded
        way = self._read if request.prompt else self._generate
        fit = fit_of(model, "answering")
        [(_, reply)] = in_parts(
            1,
            len(ids),
            len(ids),
            fit,
            model.device,
            lambda _: way(model, tokenizer, torch.tensor([list(ids)], device=model.device), request, start),
        )
        return reply

    @torch.inference_mode()
    def _answer_all(self, questions: Sequence[_Question]) -> None:
        """Gives every question its reply, or the error that its own request causes."""
        prompts = []
        with self._alone():
            for question in questions:
                try:
                    prompts.append((question, self._ids(question.request)))
                except (InputError, RequestRefusedError) as error:
                    question.error = error
            for batch in _batches(prompts):
                try:
                    self._answer_batch(batch)
                except DeviceMemoryError as error:
                    for question, _ in batch:
                        question.error = error if question.reply is None else None

    def _answer_batch(self, batch: Sequence[tuple[_Question, list[int]]]) -> None:
        """Replies to as many questions at once as fit."""
        model, width = self._loaded[0], max(len(ids) for _, ids in batch)
        fit = fit_of(model, "answering questions")
        for part, (logits, seconds) in in_parts(
            len(batch), width, len(batch) * width, fit, model.device, lambda part: self._said(batch[part])
        ):
            for (question, ids), row in zip(batch[part], logits, strict=True):
                question.reply = self._reply(question.request, ids, row, seconds / len(logits))

    def _said(self, batch: Sequence[tuple[_Question, list[int]]]) -> tuple[torch.Tensor, float]:
        """Logits of every reply's first token, float32 ``[question, token]``, and the seconds that took."""
        start, model = time.monotonic(), self._loaded[0]
        prefix = self._prefixes.common([ids for _, ids in batch])
        rest = [ids[prefix.n_tokens :] for _, ids in batch]
        width = max(map(len, rest))
        padded = torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in rest], device=model.device)
        last = torch.tensor([len(ids) - 1 for ids in rest], device=model.device)
        prefixed = self._prefixes.model
        hidden = prefixed.hidden(prefix, padded)[torch.arange(len(rest), device=model.device), last]
        return prefixed.logits(hidden), time.monotonic() - start

    def _reply(self, request: Request, ids: list[int], logits: torch.Tensor, seconds: float) -> Reply:
        """The reply that begins with the likeliest token, which is all of it unless it says something
        else.
        """
        model, tokenizer = self._loaded
        ends, token = _ends(model, tokenizer), int(logits.argmax())
        text = "" if token in ends else tokenizer.decode([token])
        whole = token in ends or text.strip().lower() in {a.lower() for a in request.answers}
        if not whole and request.max_tokens > 1:  # something else, or an answer of several tokens
            return self._alone_answered(ids, request)
        first = _alternatives(tokenizer, logits, request.top_logprobs)
        return Reply((text,), (not whole,), Usage(1, len(ids), 1, seconds, 0.0), (first,))

    def _ids(self, request: Request) -> list[int]:
        """The tokens that a request's reply begins after."""
        model, tokenizer = self._loaded
        ids = list(request.prompt) or self._chat(tokenizer, request)
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and len(ids) + request.max_tokens > most:
            raise RequestRefusedError(
                f"{len(ids):,} prompt tokens and {request.max_tokens:,} of a reply do not fit into the "
                f"{most:,} of {self.name}"
            )
        return ids

    def _chat(self, tokenizer: Any, request: Request) -> list[int]:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"the tokenizer of {self.name} has no chat template: give an instruct model")
        return chat_ids(tokenizer, request.messages)

    def _generate(
        self, model: Any, tokenizer: Any, ids: torch.Tensor, request: Request, start: float
    ) -> Reply:
        torch.manual_seed(request.seed or 0)
        sampling = (
            {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
            if request.temperature > 0
            else {"do_sample": False}
        )
        stops = {"stop_strings": list(request.stop), "tokenizer": tokenizer} if request.stop else {}
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_tokens,
            num_return_sequences=request.n,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **_AS_IT_IS,
            **sampling,
            **stops,
        )
        ends = _ends(model, tokenizer)
        texts, truncated, first, heads, n = [], [], [], [], 0
        for row, sequence in enumerate(made.sequences[:, ids.shape[1] :].tolist()):
            whole = next((i for i, token in enumerate(sequence) if token in ends), None)
            text = tokenizer.decode(sequence[:whole], skip_special_tokens=True)
            cut = min((text.index(s) for s in request.stop if s in text), default=None)
            texts.append(text if cut is None else text[:cut])
            truncated.append(whole is None and cut is None)
            n += len(sequence) if whole is None else whole + 1
            heads.append(
                _head(tokenizer, sequence, [step[row] for step in made.logits[:KEPT]], request.top_logprobs)
            )
            first.append(dict(heads[-1][0][1]) if heads[-1] else {})
        usage = Usage(1, ids.shape[1], n, time.monotonic() - start, 0.0)
        return Reply(tuple(texts), tuple(truncated), usage, tuple(first), tokens=tuple(heads))

    def _read(self, model: Any, tokenizer: Any, ids: torch.Tensor, request: Request, start: float) -> Reply:
        logits = model(ids).logits[0]
        read = tuple(
            _alternatives(tokenizer, logits[place - 1], request.top_logprobs) for place in request.read_at
        )
        return Reply(("",), (False,), Usage(1, ids.shape[1], 0, time.monotonic() - start, 0.0), ({},), read)


def _batches(prompts: Sequence[tuple[_Question, list[int]]]) -> Iterator[list[tuple[_Question, list[int]]]]:
    """Prompts that begin alike, together, with at most about ``BATCH_TOKENS`` tokens after what they
    share.
    """
    for _, group in groupby(sorted(prompts, key=itemgetter(1)), key=lambda p: p[1][:1]):
        alike = list(group)
        width = max(len(ids) for _, ids in alike) - len(shared_tokens([ids for _, ids in alike]))
        step = max(1, BATCH_TOKENS // max(1, width))
        yield from (alike[at : at + step] for at in range(0, len(alike), step))


_AS_IT_IS = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_p": None}
"""What a model's own settings for generation may change in its probabilities, unchanged."""


def _ends(model: Any, tokenizer: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    ends = set(found if isinstance(found, list) else [] if found is None else [found])
    return ends | ({tokenizer.eos_token_id} - {None})


def _head(
    tokenizer: Any, sequence: Sequence[int], logits: Sequence[torch.Tensor], n: int
) -> tuple[Token, ...]:
    """The first tokens of a reply with their ``n`` most probable alternatives; nothing where none are asked
    for.
    """
    pairs = zip(sequence, logits, strict=False) if n else ()
    return tuple((tokenizer.decode([token]), _alternatives(tokenizer, row, n)) for token, row in pairs)


def _alternatives(tokenizer: Any, logits: torch.Tensor, n: int) -> dict[str, float]:
    """The ``n`` most probable tokens by their text, with natural-log probabilities; of equal texts the more
    probable.
    """
    if not n:
        return {}
    values, ids = torch.log_softmax(logits.float(), -1).topk(min(n, logits.shape[-1]))
    out: dict[str, float] = {}
    for value, token in zip(values.tolist(), ids.tolist(), strict=True):
        out.setdefault(tokenizer.decode([token]), value)
    return out
