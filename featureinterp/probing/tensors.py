"""What probing does with tensors of torch: where they are, so that codes on a GPU stay there."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from featureinterp.errors import InputError


def nonzeros(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and values of what a dense or sparse matrix holds, on its device; bfloat16 as float32."""
    codes = codes.detach()
    if codes.ndim != 2:
        raise InputError(f"codes of shape {tuple(codes.shape)} are not a matrix: give [token, feature]")
    if codes.layout == torch.strided:
        rows, features = torch.nonzero(codes, as_tuple=True)
        values = codes[rows, features]
    else:
        sparse = (
            codes if codes.layout == torch.sparse_coo else codes.to_sparse(layout=torch.sparse_coo)
        ).coalesce()
        rows, features = sparse.indices()
        values = sparse.values()
    return rows, features, values.float() if values.dtype == torch.bfloat16 else values


def by_feature(codes: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, rows and values, feature by feature."""
    rows, features, values = nonzeros(codes)
    order = torch.argsort(features, stable=True)
    counts = torch.bincount(features, minlength=codes.shape[1]).cpu().numpy()
    return (
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        rows[order].cpu().numpy(),
        values[order].cpu().numpy(),
    )


def rank_sums(codes: torch.Tensor, labels: np.ndarray) -> np.ndarray | None:
    """Mann and Whitney's U of every feature for every label, float64 ``[feature, label]``, by the formula of
    :mod:`featureinterp.probing.auroc`; None when a code is negative or not finite."""
    n, n_features = codes.shape
    wanted = torch.as_tensor(labels, device=codes.device).double()
    positives = wanted.sum(0)
    rows, features, values = nonzeros(codes)
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        return None
    kept = values != 0
    rows, features, values = rows[kept], features[kept], values[kept]
    order = torch.argsort(values)
    order = order[torch.argsort(features[order], stable=True)]
    rows, features, values = rows[order], features[order], values[order]
    counts = torch.bincount(features, minlength=n_features)
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    new = torch.ones(len(values), dtype=torch.bool, device=codes.device)
    new[1:] = (values[1:] != values[:-1]) | (features[1:] != features[:-1])
    group = new.cumsum(0) - 1
    first = torch.nonzero(new).flatten()
    tied = torch.bincount(group, minlength=len(first))
    midrank = (first - edges[features[first]]).double() + (tied + 1) / 2
    w = midrank[group] + (n - counts[features] - 1) / 2
    sums = _by_row(edges, rows, w, (n_features, n)) @ wanted
    return np.asarray(
        (positives * (n - counts[:, None] + 1) / 2 + sums - positives * (positives + 1) / 2).cpu().numpy()
    )


class SparseMatrix:
    """Codes ``[token, feature]`` on a device, given by feature."""

    def __init__(
        self, shape: tuple[int, int], offsets: np.ndarray, rows: np.ndarray, values: np.ndarray, device: Any
    ) -> None:
        at = [
            torch.as_tensor(np.ascontiguousarray(a), device=device)
            for a in (offsets, rows.astype(np.int64), values.astype(np.float32))
        ]
        self.transposed = _by_row(at[0], at[1], at[2], (shape[1], shape[0]))
        self.matrix = self.transposed.to_sparse_coo().T.coalesce().to_sparse_csr()
        self.device = device

    def apply(self, weights: np.ndarray) -> np.ndarray:
        """matrix · weights."""
        return _times(self.matrix, weights, self.device)

    def pull(self, slope: np.ndarray) -> np.ndarray:
        """matrixᵀ · slope."""
        return _times(self.transposed, slope, self.device)


class DenseMatrix:
    """Dense inputs ``[token, input]`` (an array or a tensor) less ``offset``, about their mean (beside which
    float32 would lose what matters), where they are. ``mean`` and ``deviation`` are of what is left."""

    def __init__(self, inputs: Any, rows: np.ndarray | None) -> None:
        if not isinstance(inputs, torch.Tensor):
            inputs = torch.from_numpy(np.ascontiguousarray(inputs if rows is None else inputs[rows]))
            rows = None
        taken = (
            inputs.detach() if rows is None else inputs.detach()[torch.as_tensor(rows, device=inputs.device)]
        )
        offset = taken.mean(0, dtype=torch.float64).float()
        self.matrix, self.device = taken.float() - offset, inputs.device
        mean = self.matrix.mean(0, dtype=torch.float64)
        squares = (self.matrix**2).mean(0, dtype=torch.float64)
        self.offset, self.mean = offset.double().cpu().numpy(), mean.cpu().numpy()
        self.deviation = (squares - mean**2).clamp(min=0).sqrt().cpu().numpy()

    def apply(self, weights: np.ndarray) -> np.ndarray:
        """matrix · weights."""
        return _times(self.matrix, weights, self.device)

    def pull(self, slope: np.ndarray) -> np.ndarray:
        """matrixᵀ · slope."""
        return _times(self.matrix.T, slope, self.device)


def _by_row(
    offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that such tensors are young
        return torch.sparse_csr_tensor(offsets, columns, values, size=shape)


def _times(matrix: torch.Tensor, other: np.ndarray, device: Any) -> np.ndarray:
    return np.asarray((matrix @ torch.as_tensor(other, dtype=torch.float32, device=device)).cpu().numpy())
