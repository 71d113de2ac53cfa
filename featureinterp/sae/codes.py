"""Sparse codes of a batch, and the decoder that every architecture shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseCodes:
    """The positive codes of ``n_rows`` tokens over ``n_features`` features, as coordinates.

    ``values`` are > 0, in raw SAE units. No pair (row, feature) occurs twice; rows never fall. ``scale``,
    ``shift``: what undoes the normalisation of each token, where its SAE has one.
    """

    rows: Int64[Tensor, " nonzero"]
    features: Int64[Tensor, " nonzero"]
    values: Float[Tensor, " nonzero"]
    n_rows: int
    n_features: int
    scale: Float[Tensor, " row"] | None = None
    shift: Float[Tensor, " row"] | None = None

    @classmethod
    def from_top(
        cls, indices: Int64[Tensor, "row k"], values: Float[Tensor, "row k"], n_features: int
    ) -> SparseCodes:
        """From the k largest codes of each row; those that are not positive are left out."""
        rows, slots = torch.nonzero(values > 0, as_tuple=True)
        return cls(rows, indices[rows, slots], values[rows, slots], values.shape[0], n_features)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "row feature"]) -> SparseCodes:
        """From a dense matrix of codes ≥ 0."""
        rows, features = torch.nonzero(dense, as_tuple=True)
        return cls(rows, features, dense[rows, features], dense.shape[0], dense.shape[1])

    def to_dense(self) -> Float[Tensor, "row feature"]:
        """The codes of all features, with their zeros."""
        dense = self.values.new_zeros(self.n_rows, self.n_features)
        dense[self.rows, self.features] = self.values
        return dense

    def columns(self, features: Sequence[int]) -> Float[Tensor, "row chosen"]:
        """The codes of a few features, dense. No matrix of all features is made."""
        known = sorted(set(features))
        place = torch.full((self.n_features,), -1, dtype=torch.int64)
        place[known] = torch.arange(len(known))
        column = place.to(self.features.device)[self.features]
        wanted = torch.nonzero(column >= 0).squeeze(1)
        dense = self.values.new_zeros(self.n_rows, len(known))
        dense[self.rows[wanted], column[wanted]] = self.values[wanted]
        return dense[:, [known.index(feature) for feature in features]]

    def matmul(self, matrix: Float[Tensor, "feature d"]) -> Float[Tensor, "row d"]:
        """``codes @ matrix``, reading only the rows of features that fire."""
        counts = torch.bincount(self.rows, minlength=self.n_rows)
        offsets = torch.cumsum(counts, 0) - counts
        return torch.nn.functional.embedding_bag(
            self.features, matrix, offsets, mode="sum", per_sample_weights=self.values.to(matrix.dtype)
        )
