"""Forward passes of many short suffixes behind one long prefix, which is computed and read once.

The prefix's keys and values are computed in one pass and can be extended. A batch of suffixes then attends to
them through an attention function of our own: all queries of the batch read the prefix as one block (nothing
is copied per suffix), attend causally to their own suffix, and the two results are merged by their
log-sum-exps, which is exact. A prefix may have several short branches (the rules of an explanation behind one
header), each computed once and read by its own share of the batch. Models with attention of another kind
(soft-capping, a sliding window shorter than the prompt, no attention interface) are found out by a check on a
few tokens and take the plain way, with the prefix's keys and values repeated for every suffix.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

_NAME = "featureinterp_shared_prefix"
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a computed prefix: one pair ``[1, head, token, d_head]`` per layer; ``n_tokens`` in
    it.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    n_tokens: int

    def first(self, n: int) -> Prefix:
        """The prefix's first ``n`` tokens."""
        return Prefix(tuple((keys[:, :, :n], values[:, :, :n]) for keys, values in self.layers), n)


@dataclass(frozen=True, slots=True)
class Branches:
    """Several continuations of a prefix. ``layers``: keys and values of all of them, ``[branch, head, token,
    d_head]``, padded on the right to the longest; ``lengths``: tokens of each; ``whole``: prefix and branch
    as one prefix each, where the model cannot share (``layers`` is then empty)."""

    prefix: Prefix
    lengths: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    whole: tuple[Prefix, ...] = ()


class _Current(threading.local):
    """What this thread's forward pass reads, and where it leaves its own keys and values when they are
    wanted.
    """

    prefix: Prefix
    branches: Branches | None = None
    left: list[tuple[torch.Tensor, torch.Tensor]] | None = None


_current = _Current()


def lock_of(model: Any) -> threading.Lock:
    """What whoever computes with a model holds: a pass behind a shared prefix changes its attention."""
    lock: threading.Lock = model.__dict__.setdefault("_featureinterp_lock", threading.Lock())
    return lock


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query [batch, head, n, d]`` to the current prefix and, causally, to the batch's own keys
    and values.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]  # torch knows tensors and modules only
    if _current.left is not None:
        _current.left.append((key, value))
    heads, kv_heads, branches = query.shape[1], key.shape[1], _current.branches
    found = _read_shared(query, *_current.prefix.layers[layer], scale)
    if branches is not None:
        keys, values = branches.layers[layer]
        padding = (
            torch.arange(keys.shape[2], device=query.device)
            >= torch.tensor(branches.lengths, device=query.device)[:, None]
        )
        mask = torch.zeros(
            len(keys), 1, 1, keys.shape[2], dtype=query.dtype, device=query.device
        ).masked_fill_(padding[:, None, None], -torch.inf)
        found = _merge(found, _read_shared(query, keys, values, scale, mask))
    if heads != kv_heads:
        key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    return _merge(_attend(query, key, value, scale, causal=True), found)[0].transpose(1, 2).contiguous(), None


_Attended = tuple[torch.Tensor, torch.Tensor]
"""Attention and its log-sum-exp, ``[batch, head, n, d]`` and ``[batch, head, n]``."""


def _read_shared(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> _Attended:
    """Attention of ``query [batch, head, n, d]`` to keys and values ``[part, kv_head, token, d]``, each part
    of which belongs to an equal share of the batch, in order; the queries of a part read them as one block.
    """
    batch, heads, n, width = query.shape
    parts, kv_heads = keys.shape[:2]
    share, group = batch // parts, heads // kv_heads
    block = (
        query.view(parts, share, kv_heads, group, n, width)
        .permute(0, 2, 3, 1, 4, 5)
        .reshape(parts, kv_heads, -1, width)
    )
    out, lse = _attend(block, keys, values, scale, causal=False, mask=mask)
    out = (
        out.view(parts, kv_heads, group, share, n, -1).permute(0, 3, 1, 2, 4, 5).reshape(batch, heads, n, -1)
    )
    return out, lse.view(parts, kv_heads, group, share, n).permute(0, 3, 1, 2, 4).reshape(batch, heads, n)


def _merge(one: _Attended, other: _Attended) -> _Attended:
    """Attention to both of what two read."""
    weight = torch.sigmoid(other[1].float() - one[1].float()).unsqueeze(-1).to(one[0].dtype)
    return torch.lerp(one[0], other[0], weight), torch.logaddexp(one[1].float(), other[1].float())


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> _Attended:
    """Attention and its log-sum-exp (natural): ``[…, n, d]`` and ``[…, n]``. ``mask`` is added to the
    scores.
    """
    if q.shape[-1] != v.shape[-1]:
        return _matmul_attention(q, k, v, scale, causal, mask)
    return _kernel(q.device, q.dtype, q.shape[-1], causal, mask is not None)(q, k, v, scale, causal, mask)


_Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool, torch.Tensor | None], _Attended]


def _cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> _Attended:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> _Attended:
    if mask is not None:
        raise ValueError("flash attention takes no mask")
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[
        :2
    ]
    return out, lse[..., : q.shape[-2]]


def _efficient_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> _Attended:
    """Its log-sum-exp has rows up to a multiple of 32, and its mask must begin every row at a multiple of 16
    bytes.
    """
    if mask is not None:
        n = k.shape[-2]
        room = mask.new_zeros(*mask.shape[:-1], -(-n // 16) * 16)
        room[..., :n] = mask
        mask = room[..., :n].expand(q.shape[0], q.shape[1], q.shape[2], n)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, 0.0, causal, scale=scale
    )[:2]
    return out, lse[..., : q.shape[-2]]


def _matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> _Attended:
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype), v), lse


_KERNELS: dict[str, tuple[_Kernel, ...]] = {
    "cpu": (_cpu_attention,),
    "cuda": (_flash_attention, _efficient_attention),
}
_KERNEL_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.01, torch.bfloat16: 0.05}


@lru_cache(64)
def _kernel(device: torch.device, dtype: torch.dtype, width: int, causal: bool, masked: bool) -> _Kernel:
    """The first kernel of a device that computes, on a few tokens, the attention and the log-sum-exp that
    plain products give; else the products.
    """
    for kernel in _KERNELS.get(device.type, ()):
        if _agrees(kernel, device, dtype, width, causal, masked):
            return kernel
    return _matmul_attention


def _agrees(
    kernel: _Kernel, device: torch.device, dtype: torch.dtype, width: int, causal: bool, masked: bool
) -> bool:
    """Queries and keys are no multiple of what kernels work on at once, so that what they fill up shows."""
    n, others = (37, 37) if causal else (37, 53)
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, rows, width, generator=random).to(device, dtype) for rows in (n, others, others)
    )
    mask = None
    if masked:
        hidden = torch.arange(others) >= torch.tensor([11, others])[:, None]
        mask = torch.zeros(2, 1, 1, others).masked_fill_(hidden[:, None, None], -torch.inf).to(device, dtype)
    wanted = _matmul_attention(q, k, v, width**-0.5, causal, mask)
    try:
        found = kernel(q, k, v, width**-0.5, causal, mask)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    near = _KERNEL_TOLERANCE.get(dtype, 0.01)
    return all(
        a.shape == b.shape and bool(((a.float() - b.float()).abs() <= near).all())
        for a, b in zip(found, wanted, strict=True)
    )


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask is causal and made by the attention function itself."""


class PrefixModel:
    """A causal language model for work behind a shared prefix. ``model`` is the whole model with its head, in
    evaluation mode. Hold its :func:`lock_of` while anything is computed, where several threads may."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, _no_mask)
        self.model = model
        self.body = model.base_model
        self.head = model.get_output_embeddings()
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.shares_prefix = self._sharing_works()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @torch.inference_mode()
    def prefix(self, ids: Sequence[int], before: Prefix | None = None) -> Prefix:
        """Keys and values of ``ids``, or of ``before`` and ``ids`` after it."""
        cache, start = self._cache(before, 1), before.n_tokens if before else 0
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = self._positions(start, len(ids))
        self.body(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), start + len(ids))

    @torch.inference_mode()
    def branches(self, prefix: Prefix, rows: Sequence[Sequence[int]]) -> Branches:
        """Keys and values of several continuations of ``prefix``, none of them empty, in one pass."""
        lengths = tuple(map(len, rows))
        ids = torch.tensor(
            [[*row, *[row[-1]] * (max(lengths) - len(row))] for row in rows], device=self.device
        )
        if not (self.shares_prefix and self._fits(prefix.n_tokens + ids.shape[1])):
            return Branches(prefix, lengths, whole=tuple(self.prefix(row, prefix) for row in rows))
        _current.left = []
        try:
            self._shared(prefix, ids)
            return Branches(prefix, lengths, layers=tuple(_current.left))
        finally:
            _current.left = None

    @torch.inference_mode()
    def hidden(self, before: Prefix | Branches, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states of suffixes ``ids [batch, n]`` behind a prefix: ``[batch, n, d_model]``. Pad on
        the right. Behind branches each has an equal share of the batch, in order."""
        if isinstance(before, Prefix):
            return (
                self._shared(before, ids)
                if self.shares_prefix and self._fits(before.n_tokens + ids.shape[1])
                else self._plain(before, ids)
            )
        share = len(ids) // len(before.lengths)
        longest = max(before.lengths)
        if before.layers and self._fits(before.prefix.n_tokens + longest + ids.shape[1]):
            starts = torch.tensor(before.lengths, device=self.device).repeat_interleave(share)
            _current.branches = before
            try:
                return self._shared(before.prefix, ids, starts)
            finally:
                _current.branches = None
        whole = before.whole or tuple(self._joined(before, i) for i in range(len(before.lengths)))
        return torch.cat(
            [self._plain(prefix, part) for prefix, part in zip(whole, ids.split(share), strict=True)]
        )

    def _joined(self, branches: Branches, number: int) -> Prefix:
        """A branch and what it continues, as one prefix."""
        n, before = branches.lengths[number], branches.prefix
        own = slice(number, number + 1)
        layers = (
            (torch.cat([k, bk[own, :, :n]], 2), torch.cat([v, bv[own, :, :n]], 2))
            for (k, v), (bk, bv) in zip(before.layers, branches.layers, strict=True)
        )
        return Prefix(tuple(layers), before.n_tokens + n)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[…, token]`` of some tokens (None: all), float32, by hidden states ``[…, d_model]``."""
        rows = slice(None) if token_ids is None else token_ids
        if token_ids is None:
            out = torch.matmul(hidden, self.head.weight.T).float()
        else:  # few enough for float32, in which their differences are exact
            out = torch.matmul(hidden.float(), self.head.weight[token_ids].float().T)
        if getattr(self.head, "bias", None) is not None:
            out = out + self.head.bias[rows].float()
        return out if self._softcap is None else self._softcap * torch.tanh(out / self._softcap)

    def _positions(self, start: int, n: int) -> torch.Tensor:
        return torch.arange(start, start + n, device=self.device).unsqueeze(0)

    def _shared(self, prefix: Prefix, ids: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """``starts [batch]``: tokens between the prefix and each suffix."""
        positions = self._positions(prefix.n_tokens, ids.shape[1])
        if starts is not None:
            positions = positions + starts.unsqueeze(1)
        with self._attention(_NAME):
            _current.prefix = prefix
            try:
                return self._hidden(input_ids=ids, position_ids=positions, use_cache=False)
            finally:
                del _current.prefix

    def _plain(self, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
        positions = self._positions(prefix.n_tokens, ids.shape[1])
        cache = self._cache(prefix, ids.shape[0])
        return self._hidden(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)

    def _hidden(self, **inputs: Any) -> torch.Tensor:
        last: torch.Tensor = self.body(**inputs).last_hidden_state
        return last

    def _cache(self, prefix: Prefix | None, batch: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(prefix.layers if prefix else ()):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
        return cache

    def _fits(self, n_tokens: int) -> bool:
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        sliding = getattr(config, "sliding_window", None)
        return not any("sliding" in k for k in kinds) or sliding is None or n_tokens <= sliding

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        configs = list({id(c): c for c in (self.body.config, self.model.config.get_text_config())}.values())
        before = [c._attn_implementation for c in configs]
        try:
            for config in configs:
                config._attn_implementation = name
            yield
        finally:
            for config, old in zip(configs, before, strict=True):
                config._attn_implementation = old

    @torch.inference_mode()
    def _sharing_works(self) -> bool:
        """Compares both ways on a few tokens; False when the model's attention is of a kind that ours does
        not compute.
        """
        if getattr(self.model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            return False
        vocabulary = self.head.weight.shape[0]
        prefix = self.prefix([i * 37 % vocabulary for i in range(1, 9)])
        ids = torch.tensor(
            [[i * 53 % vocabulary for i in range(1, 7)], [i * 71 % vocabulary for i in range(1, 7)]],
            device=self.device,
        )
        plain = self._plain(prefix, ids).float()
        try:
            shared = self._shared(prefix, ids).float()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        spread = float(plain.std())
        return bool((shared - plain).abs().max() <= _TOLERANCE[self.model.dtype] * spread)


class PrefixCache:
    """The keys and values of the last few prompts' common beginnings, so that prompts which begin alike are
    read from where they part.
    """

    def __init__(self, model: PrefixModel, *, kept: int = 4) -> None:
        self.model, self.kept = model, kept
        self._known: list[tuple[tuple[int, ...], Prefix]] = []

    def common(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """The longest beginning that all ``prompts`` share, at least one token shorter than each of them.
        Raises ``ValueError`` when they share nothing."""
        start = shared_tokens(prompts)[: min(len(p) for p in prompts) - 1]
        if not start:
            raise ValueError("the prompts have no common beginning")
        best, prefix = max(self._known, key=lambda k: len(shared_tokens([k[0], start])), default=((), None))
        n = len(shared_tokens([best, start]))
        before = prefix.first(n) if prefix is not None and n else None
        found = before if before is not None and n == len(start) else self.model.prefix(start[n:], before)
        self._known = [k for k in self._known if k[0] != start[: len(k[0])]]
        self._known = [(start, found), *self._known][: self.kept]
        return found


def shared_tokens(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which all prompts begin."""
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:n]
