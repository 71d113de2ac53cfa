"""A subject model on texts from which one token is missing, every token in turn, and what a token's embedding
does.

Leaving out token t changes nothing before it and everything after it. So all n deletions of a window are one
sequence: the window itself, then for each t the tokens after t, which see the window's first t tokens and one
another and stand one position earlier. That is n + n(n−1)/2 tokens in one pass instead of n(n−1) in n passes.
Models whose attention takes no mask of this kind are found out by a check on a few tokens and read every
deletion in full, in batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from featureinterp.errors import DeviceMemoryError
from featureinterp.machine.accelerator import fit_of, in_parts
from featureinterp.subject.hooks import find_blocks, input_embeddings, residual_after, text_config
from featureinterp.subject.load import PrependToken, Subject

PACKED_TOKENS = 1536
"""Longest sequence of packed deletions; longer windows take several."""
BATCH_TOKENS = 4096
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


class Deletions:
    """Residual streams at ``hook`` of windows with each token left out."""

    def __init__(self, subject: Subject, hook: str) -> None:
        self.subject, self.hook = subject, hook
        self.block = find_blocks(subject.model, subject.n_blocks)[subject.check_hook(hook)]
        self._longest = PACKED_TOKENS
        self.packs = self._packing_works()

    @torch.inference_mode()
    def residuals(
        self, ids: Int64[Tensor, "window n"]
    ) -> tuple[Float[Tensor, "window row d_model"], Int64[Tensor, "n n-1"]]:
        """Residuals whose first n rows are the window's own, and the row of every token of every deletion
        (deletion, token that is left). What does not fit into the memory of a GPU is read in more passes;
        raises ``DeviceMemoryError`` when one deletion does not fit.
        """
        self.subject.as_read(ids)
        return (self._packed if self.packs and self._fits(ids.shape[1]) else self._plain)(
            ids.to(self.subject.device)
        )

    def _packed(
        self, ids: Int64[Tensor, "window n"]
    ) -> tuple[Float[Tensor, "window row d_model"], Int64[Tensor, "n n-1"]]:
        n = ids.shape[1]
        own: torch.Tensor | None = None
        parts = []
        waiting = _groups(n, min(PACKED_TOKENS, self._longest))[::-1]
        while waiting:
            first, end = waiting.pop()
            try:
                found = self._pass(ids, first, end)
            except DeviceMemoryError:
                if end - first == 1:
                    raise
                middle = (first + end) // 2
                waiting += [(middle, end), (first, middle)]
                self._longest = min(self._longest, n + sum(n - 1 - t for t in range(first, middle)))
                continue
            own = found[:, :n] if own is None else own
            parts.append(found[:, n:])
        assert own is not None
        return torch.cat([own, *parts], 1), deletion_rows(n).to(ids.device)

    def _pass(self, ids: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Residuals of the windows and of their deletions ``first`` to ``end``, packed."""
        n, bos = ids.shape[1], self._bos
        source, position, mask = _layout(n, first, end, bos is not None)
        tokens = ids if bos is None else torch.cat([ids, ids.new_full((len(ids), 1), bos)], 1)
        additive = torch.zeros(1, 1, *mask.shape, dtype=self.subject.dtype, device=ids.device)
        additive.masked_fill_(~mask.to(ids.device), torch.finfo(self.subject.dtype).min)

        def read(part: slice) -> torch.Tensor:
            batch = tokens[part]
            return self._run(
                input_ids=batch[:, source.to(ids.device)],
                position_ids=position.to(ids.device).expand(len(batch), -1),
                attention_mask=additive,
            )

        return self._in_parts(len(tokens), len(source), read)[:, int(bos is not None) :]

    def _plain(
        self, ids: Int64[Tensor, "window n"]
    ) -> tuple[Float[Tensor, "window row d_model"], Int64[Tensor, "n n-1"]]:
        n = ids.shape[1]
        left = _others(n).to(ids.device)
        own = self.subject.residual(ids, self.hook)
        rows = (n + torch.arange(n * (n - 1), device=ids.device)).reshape(n, n - 1)
        if n == 1:
            return own, rows
        cut = ids[:, left].reshape(len(ids) * n, n - 1)
        found = self._in_parts(len(cut), n - 1, lambda part: self.subject.residual(cut[part], self.hook))
        return torch.cat([own, found.reshape(len(ids), n * (n - 1), -1)], 1), rows

    def _in_parts(self, n: int, width: int, read: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """What ``read`` gives of ``n`` rows of ``width`` tokens."""
        fit = fit_of(self.subject.model, "leaving out tokens")
        parts = in_parts(n, width, BATCH_TOKENS, fit, self.subject.device, read)
        return torch.cat([found for _, found in parts])

    @property
    def _bos(self) -> int | None:
        sink = self.subject.sink
        return sink.token_id if isinstance(sink, PrependToken) else None

    def _fits(self, n: int) -> bool:
        """Whether no attention window is shorter than the text: a packed sequence has no sliding mask."""
        sliding = getattr(text_config(self.subject.model), "sliding_window", None)
        return sliding is None or n + 1 <= sliding

    def _run(self, **inputs: Any) -> torch.Tensor:
        return residual_after(self.subject.model, self.block, inputs | {"use_cache": False})

    @torch.inference_mode()
    def _packing_works(self) -> bool:
        vocabulary = len(input_embeddings(self.subject.model).weight)
        ids = torch.tensor([[i * 37 % vocabulary for i in range(1, 8)]], device=self.subject.device)
        plain, places = self._plain(ids)
        try:
            packed, rows = self._packed(ids)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        difference = (packed[:, rows].float() - plain[:, places].float()).abs().max()
        return bool(difference <= _TOLERANCE[self.subject.dtype] * float(plain.float().std()))


@lru_cache(64)
def deletion_rows(n: int) -> Int64[Tensor, "{n} {n}-1"]:
    """Where the packed sequence of a window of ``n`` tokens holds token j of deletion t: tokens before t are
    the window's own.
    """
    starts = [n + t * (n - 1) - t * (t - 1) // 2 for t in range(n)]
    rows = [[*range(t), *range(starts[t], starts[t] + n - 1 - t)] for t in range(n)]
    return torch.tensor(rows, dtype=torch.int64).reshape(n, n - 1)


def _others(n: int) -> Int64[Tensor, "{n} {n}-1"]:
    """Row t: 0 … n − 1 without t."""
    return torch.tensor([[j for j in range(n) if j != t] for t in range(n)], dtype=torch.int64).reshape(
        n, n - 1
    )


def _groups(n: int, longest: int) -> list[tuple[int, int]]:
    """Deletions in ranges whose tokens, with the window's own, are at most ``longest`` where that is
    possible.
    """
    groups, first, size = [], 0, 0
    for t in range(n):
        more = n - 1 - t
        if size and n + size + more > longest:
            groups.append((first, t))
            first, size = t, 0
        size += more
    groups.append((first, n))
    return groups


@lru_cache(64)
def _layout(
    n: int, first: int, end: int, bos: bool
) -> tuple[Int64[Tensor, " row"], Int64[Tensor, " row"], Bool[Tensor, "row row"]]:
    """The packed sequence of deletions ``first`` to ``end``: which token of the window (n: the BOS) stands
    where, its position in the text, and what it sees."""
    lead = int(bos)
    source = [n] * lead + list(range(n))
    position = list(range(lead + n))
    blocks = []
    for t in range(first, end):
        blocks.append((t, len(source), n - 1 - t))
        source += range(t + 1, n)
        position += range(lead + t, lead + n - 1)
    mask = torch.zeros(len(source), len(source), dtype=torch.bool)
    mask[: lead + n, : lead + n] = torch.ones(lead + n, lead + n, dtype=torch.bool).tril()
    for t, start, length in blocks:
        mask[start : start + length, : lead + t] = True
        mask[start : start + length, start : start + length] = torch.ones(
            length, length, dtype=torch.bool
        ).tril()
    return torch.tensor(source), torch.tensor(position), mask


def embedding_effects(
    subject: Subject,
    hook: str,
    ids: Int64[Tensor, "window n"],
    total: Callable[[Float[Tensor, "window n d_model"]], Float[Tensor, " window"]],
) -> Float32[Tensor, "window n"]:
    """Gradient × input: the first-order effect of every token's embedding on a differentiable ``total`` of
    the residuals.
    """
    block = find_blocks(subject.model, subject.n_blocks)[subject.check_hook(hook)]
    ids, lead = subject.as_read(ids)
    with torch.enable_grad():
        embedded = input_embeddings(subject.model)(ids).detach().requires_grad_(True)
        residual = residual_after(subject.model, block, {"inputs_embeds": embedded, "use_cache": False})[
            :, lead:
        ]
        summed = total(residual).sum()
        if not summed.requires_grad:
            return torch.zeros(len(ids), ids.shape[1] - lead)
        (gradient,) = torch.autograd.grad(summed, embedded)
    effects: Tensor = (gradient.float() * embedded.detach().float()).sum(-1)[:, lead:].cpu()
    return effects
