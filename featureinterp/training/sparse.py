"""Encoding and decoding with few codes per token: what is not among the chosen codes costs nothing, forwards
or backwards.

With S the sparse matrix of the chosen codes ``[token, feature]`` and G that of their gradients, x̂ = S W_dec
has the gradients Sᵀ ∂x̂ for W_dec and the products of ∂x̂ with the chosen rows of W_dec for S; x W_encᵀ has
Gᵀ x for W_enc. Each is a sparse product of as many multiplications as there are codes, times the width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

CHUNK = 4096


class Pattern:
    """Which codes are chosen: for row i the features ``features[starts[i]:starts[i + 1]]``."""

    def __init__(
        self, starts: Int64[Tensor, " edge"], features: Int64[Tensor, " chosen"], n_features: int
    ) -> None:
        self.starts, self.features, self.n_features = starts, features, n_features

    @classmethod
    def equal(cls, indices: Int64[Tensor, "row k"], n_features: int) -> Pattern:
        """As many in every row."""
        n, k = indices.shape
        return cls(torch.arange(0, n * k + 1, k, device=indices.device), indices.flatten(), n_features)

    @classmethod
    def where(cls, mask: Bool[Tensor, "row feature"]) -> Pattern:
        """Where ``mask`` is true."""
        rows, features = torch.nonzero(mask, as_tuple=True)
        return cls(_starts(rows, len(mask)), features, mask.shape[1])

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def rows(self) -> Int64[Tensor, " chosen"]:
        """The row of every chosen code."""
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.starts.device),
            self.starts.diff(),
            output_size=len(self.features),
        )

    @cached_property
    def by_feature(self) -> tuple[Int64[Tensor, " chosen"], Int64[Tensor, " edge"]]:
        """(the order of the chosen codes by feature, where each feature begins in it)."""
        return torch.argsort(self.features, stable=True), _starts(self.features, self.n_features)

    def part(self, first: int, end: int) -> tuple[Pattern, Int64[Tensor, " inside"]]:
        """The codes of features from ``first`` to before ``end``, counted from ``first``; and which of the
        chosen ones they are.
        """
        inside = torch.nonzero((self.features >= first) & (self.features < end)).squeeze(1)
        return Pattern(
            _starts(self.rows[inside], self.n_rows), self.features[inside] - first, end - first
        ), inside

    def times(
        self, values: Float[Tensor, " chosen"], matrix: Float[Tensor, "feature d"]
    ) -> Float[Tensor, "row d"]:
        """S @ ``matrix``."""
        return _csr(self.starts, self.features, values, (self.n_rows, self.n_features)) @ matrix

    def transposed_times(
        self, values: Float[Tensor, " chosen"], matrix: Float[Tensor, "row d"]
    ) -> Float[Tensor, "feature d"]:
        """Sᵀ @ ``matrix``."""
        order, starts = self.by_feature
        return _csr(starts, self.rows[order], values[order], (self.n_features, self.n_rows)) @ matrix

    def products(self, a: Float[Tensor, "row d"], b: Float[Tensor, "feature d"]) -> Float[Tensor, " chosen"]:
        """For every chosen (row, feature) the product of a row of ``a`` with one of ``b``."""
        if _sampled_is_there(a.device.type):
            zero = _csr(
                self.starts,
                self.features,
                torch.zeros(len(self.features), device=a.device, dtype=a.dtype),
                (self.n_rows, self.n_features),
            )
            found: Tensor = torch.sparse.sampled_addmm(zero, a, b.T, beta=0).values()
            return found
        parts = [
            (a[r] * b[f]).sum(1)
            for r, f in zip(self.rows.split(CHUNK), self.features.split(CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else a.new_zeros(0)

    def sum_by_feature(self, values: Float[Tensor, " chosen"]) -> Float[Tensor, " feature"]:
        """The sum of each feature's values."""
        return values.new_zeros(self.n_features).index_add_(0, self.features, values)


def _starts(sorted_or_not: torch.Tensor, n: int) -> torch.Tensor:
    counts = torch.bincount(sorted_or_not, minlength=n)
    return torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])


def _csr(
    starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@cache
def _sampled_is_there(device: str) -> bool:
    """Some builds of torch have no sampled product."""
    try:
        one = torch.ones(1, 1, device=device)
        torch.sparse.sampled_addmm(
            _csr(torch.tensor([0, 1], device=device), torch.tensor([0], device=device), one[0], (1, 1)),
            one,
            one,
        )
    except (RuntimeError, NotImplementedError):
        return False
    return True


class _Encoded(torch.autograd.Function):
    """The chosen values of (x − b_dec) W_encᵀ + b_enc, which are known already, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        centred: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        b_dec: torch.Tensor,
        pattern: Pattern,
    ) -> Any:
        ctx.save_for_backward(centred, W_enc)
        ctx.pattern = pattern
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        centred, W_enc = ctx.saved_tensors
        bias = ctx.pattern.sum_by_feature(gradient)
        return None, None, ctx.pattern.transposed_times(gradient, centred), bias, -(bias @ W_enc), None


class _Nested(torch.autograd.Function):
    """S W_dec of every prefix of the dictionary: ``[prefix, row, d]``."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, W_dec: torch.Tensor, pattern: Pattern, ends: Sequence[int]
    ) -> Any:
        ctx.pieces = [
            (a, b, *((pattern, None) if len(ends) == 1 else pattern.part(a, b)))
            for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]
        ctx.save_for_backward(values, W_dec)
        found: list[torch.Tensor] = []
        for a, b, part, chosen in ctx.pieces:
            piece = part.times(values if chosen is None else values[chosen], W_dec[a:b])
            found.append(piece if not found else found[-1] + piece)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        values, W_dec = ctx.saved_tensors
        by_values, by_weights = torch.empty_like(values), torch.empty_like(W_dec)
        # a feature contributes to its own prefix and to all longer ones
        for (a, b, part, chosen), g in zip(
            reversed(ctx.pieces), torch.cumsum(gradient.flip(0), 0), strict=True
        ):
            own = values if chosen is None else values[chosen]
            products = part.products(g, W_dec[a:b])
            if chosen is None:
                by_values = products
            else:
                by_values[chosen] = products
            by_weights[a:b] = part.transposed_times(own, g)
        return by_values, by_weights, None, None


def encoded(
    values: Float[Tensor, " chosen"],
    centred: Float[Tensor, "row d"],
    W_enc: Float[Tensor, "feature d"],
    b_enc: Float[Tensor, " feature"],
    b_dec: Float[Tensor, " d"],
    pattern: Pattern,
) -> Float[Tensor, " chosen"]:
    """``values`` of ``centred`` = x − b_dec times W_encᵀ plus b_enc, as a function of ``W_enc``, ``b_enc``
    and ``b_dec``.
    """
    found: Tensor = _Encoded.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        values, centred, W_enc, b_enc, b_dec, pattern
    )
    return found


def decoded(
    values: Float[Tensor, " chosen"],
    W_dec: Float[Tensor, "feature d"],
    pattern: Pattern,
    ends: Sequence[int] | None = None,
) -> Float[Tensor, "prefix row d"]:
    """S W_dec with the features before each of ``ends`` (all of them when None)."""
    found: Tensor = _Nested.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        values, W_dec, pattern, list(ends or [pattern.n_features])
    )
    return found
