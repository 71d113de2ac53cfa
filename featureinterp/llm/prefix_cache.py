"""Forward passes of many short suffixes behind one long prefix, which is computed and read once.

The prefix's keys and values are computed in one pass and can be extended. A batch of suffixes then attends to them through an
attention function of our own: all queries of the batch read the prefix as one block (nothing is copied per suffix), attend
causally to their own suffix, and the two results are merged by their log-sum-exps, which is exact. Models with attention of
another kind (soft-capping, a sliding window shorter than the prompt, no attention interface) are found out by a check on a
few tokens and take the plain way, with the prefix's keys and values repeated for every suffix.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_NAME = "featureinterp_shared_prefix"
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a computed prefix: one pair ``[1, head, token, d_head]`` per layer; ``n_tokens`` in it."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    n_tokens: int

    def first(self, n: int) -> Prefix:
        """The prefix's first ``n`` tokens."""
        return Prefix(tuple((keys[:, :, :n], values[:, :, :n]) for keys, values in self.layers), n)


class _Current(threading.local):
    """The prefix that this thread's forward pass reads."""

    prefix: Prefix


_current = _Current()


def lock_of(model: Any) -> threading.Lock:
    """The lock that whoever computes with a model holds: a pass behind a shared prefix changes the model's attention for its time."""
    return model.__dict__.setdefault("_featureinterp_lock", threading.Lock())


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention of ``query [batch, head, n, d]`` to the current prefix and, causally, to the batch's own keys and values."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = _current.prefix.layers[module.layer_idx]  # type: ignore[index]
    batch, heads, n, width = query.shape
    kv_heads = key.shape[1]
    shared = query.view(batch, kv_heads, heads // kv_heads, n, width).permute(1, 2, 0, 3, 4).reshape(1, kv_heads, -1, width)
    out_prefix, lse_prefix = _attend(shared, keys, values, scale, causal=False)
    out_prefix = out_prefix.view(kv_heads, heads // kv_heads, batch, n, -1).permute(2, 0, 1, 3, 4).reshape(batch, heads, n, -1)
    lse_prefix = lse_prefix.view(kv_heads, heads // kv_heads, batch, n).permute(2, 0, 1, 3).reshape(batch, heads, n)
    if heads != kv_heads:
        key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    out_own, lse_own = _attend(query, key, value, scale, causal=True)
    weight = torch.sigmoid(lse_prefix.float() - lse_own.float()).unsqueeze(-1).to(out_own.dtype)
    return torch.lerp(out_own, out_prefix, weight).transpose(1, 2).contiguous(), None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp: ``[…, n, d]`` and ``[…, n]``."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if causal:
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype), v), lse


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask is causal and made by the attention function itself."""


class PrefixModel:
    """A causal language model for work behind a shared prefix. ``model`` is the whole model with its head, in evaluation mode. Hold its
    :func:`lock_of` while anything is computed, where several threads may."""

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
        return self.model.device

    @torch.inference_mode()
    def prefix(self, ids: Sequence[int], before: Prefix | None = None) -> Prefix:
        """Keys and values of ``ids``, or of ``before`` and ``ids`` after it."""
        cache, start = self._cache(before, 1), before.n_tokens if before else 0
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device).unsqueeze(0)
        self.body(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), start + len(ids))

    @torch.inference_mode()
    def hidden(self, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states of suffixes ``ids [batch, n]`` behind the prefix: ``[batch, n, d_model]``. Pad on the right."""
        return self._shared(prefix, ids) if self.shares_prefix and self._fits(prefix, ids) else self._plain(prefix, ids)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of a few tokens only (None: of all), float32 ``[…, token]``, for hidden states ``[…, d_model]``."""
        rows = slice(None) if token_ids is None else token_ids
        out = torch.matmul(hidden, self.head.weight[rows].T).float()
        if getattr(self.head, "bias", None) is not None:
            out = out + self.head.bias[rows].float()
        return out if self._softcap is None else self._softcap * torch.tanh(out / self._softcap)

    def _shared(self, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(prefix.n_tokens, prefix.n_tokens + ids.shape[1], device=self.device).unsqueeze(0)
        with self._attention(_NAME):
            _current.prefix = prefix
            try:
                return self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            finally:
                del _current.prefix

    def _plain(self, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(prefix.n_tokens, prefix.n_tokens + ids.shape[1], device=self.device).unsqueeze(0)
        cache = self._cache(prefix, ids.shape[0])
        return self.body(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state

    def _cache(self, prefix: Prefix | None, batch: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(prefix.layers if prefix else ()):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
        return cache

    def _fits(self, prefix: Prefix, ids: torch.Tensor) -> bool:
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        sliding = getattr(config, "sliding_window", None)
        return not any("sliding" in k for k in kinds) or sliding is None or prefix.n_tokens + ids.shape[1] <= sliding

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
        """Compares both ways on a few tokens; False when the model's attention is of a kind that ours does not compute."""
        if getattr(self.model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            return False
        vocabulary = self.head.weight.shape[0]
        prefix = self.prefix([i * 37 % vocabulary for i in range(1, 9)])
        ids = torch.tensor([[i * 53 % vocabulary for i in range(1, 7)], [i * 71 % vocabulary for i in range(1, 7)]], device=self.device)
        plain = self._plain(prefix, ids).float()
        try:
            shared = self._shared(prefix, ids).float()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        spread = float(plain.std())
        return bool((shared - plain).abs().max() <= _TOLERANCE[self.model.dtype] * spread)


class PrefixCache:
    """The keys and values of the last few prompts' common beginnings, so that prompts which begin alike are read from where they part."""

    def __init__(self, model: PrefixModel, *, kept: int = 4) -> None:
        self.model, self.kept = model, kept
        self._known: list[tuple[tuple[int, ...], Prefix]] = []

    def common(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """The longest beginning that all ``prompts`` share, at least one token shorter than each of them. Raises ``ValueError`` when
        they share nothing."""
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
