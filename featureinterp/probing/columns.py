"""Codes by feature: the one form in which all of probing reads them, and what it can be made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from featureinterp.errors import IncompatibleError, InputError

PART_NONZEROS = 2_000_000
"""About so many nonzeros are worked on at once."""


@dataclass(frozen=True)
class Columns:
    """Codes of ``n_rows`` tokens, feature by feature. The nonzeros of feature f are
    ``rows[offsets[f]:offsets[f + 1]]`` (each row once, in any order) and the ``values`` there, > 0.
    ``offsets`` int64 ``[feature + 1]``; ``rows`` and ``values`` ``[nonzero]``, which may be memory-mapped."""

    n_rows: int
    offsets: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens, features."""
        return self.n_rows, self.n_features

    @cached_property
    def counts(self) -> np.ndarray:
        """On how many tokens each feature fires: int64 ``[feature]``."""
        return np.diff(self.offsets)

    @cached_property
    def maxima(self) -> np.ndarray:
        """Each feature's largest code, 0 where it never fires: float64 ``[feature]``."""
        alive = self.counts > 0
        found = np.zeros(self.n_features)
        if alive.any():
            found[alive] = np.maximum.reduceat(np.asarray(self.values), self.offsets[:-1][alive])
        return found

    def column(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and values of one feature."""
        a, b = self.offsets[feature : feature + 2]
        return self.rows[a:b], self.values[a:b]

    def dense(self, features: np.ndarray) -> np.ndarray:
        """Some features' codes, float64 ``[token, len(features)]``."""
        out = np.zeros((self.n_rows, len(features)))
        for place, feature in enumerate(features):
            rows, values = self.column(int(feature))
            out[rows, place] = values
        return out

    def parts(self, most_features: int = 2**20) -> Iterator[tuple[int, int]]:
        """Ranges of features with about ``PART_NONZEROS`` nonzeros each, and ``most_features`` at most."""
        start = 0
        while start < self.n_features:
            end = int(np.searchsorted(self.offsets, self.offsets[start] + PART_NONZEROS, side="right")) - 1
            end = min(max(end, start + 1), start + most_features, self.n_features)
            yield start, end
            start = end

    def take(self, rows: np.ndarray) -> Columns:
        """The codes of some tokens, numbered anew in the order of ``rows`` (int ``[n]``, each at most
        once).
        """
        place = np.full(self.n_rows, -1, np.int64)
        place[rows] = np.arange(len(rows))
        offsets, taken, values = np.zeros(self.n_features + 1, np.int64), [], []
        for a, b in self.parts():
            span = slice(self.offsets[a], self.offsets[b])
            moved = place[self.rows[span]]
            kept = moved >= 0
            kept_before = np.concatenate([[0], np.cumsum(kept)])
            offsets[a + 1 : b + 1] = offsets[a] + kept_before[self.offsets[a + 1 : b + 1] - self.offsets[a]]
            taken.append(moved[kept])
            values.append(np.asarray(self.values[span])[kept])
        empty = np.zeros(0, np.asarray(self.values).dtype)
        return Columns(
            len(rows),
            offsets,
            np.concatenate([np.zeros(0, np.int64), *taken]),
            np.concatenate([empty, *values]),
        )

    def select(self, features: np.ndarray) -> Columns:
        """The codes of some features, in that order (the same one may come again)."""
        counts = self.counts[features]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        places = np.repeat(self.offsets[:-1][features] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Columns(self.n_rows, offsets, self.rows[places], self.values[places])


def as_columns(codes: Any) -> Columns:
    """Codes in any of the forms that probing accepts. Raises ``InputError`` for a negative code, NaN or
    infinity, and for what is no matrix.
    """
    if isinstance(codes, Columns):
        return codes
    if is_torch(codes):
        from featureinterp.probing.tensors import by_feature

        return checked_columns(codes.shape[0], *by_feature(codes))
    import scipy.sparse

    if scipy.sparse.issparse(codes):
        if codes.ndim != 2:
            raise InputError(f"codes of shape {tuple(codes.shape)} are not a matrix: give [token, feature]")
        matrix = codes.tocsc(copy=not codes.has_canonical_format) if codes.format == "csc" else codes.tocsc()
        matrix.sum_duplicates()
        return checked_columns(matrix.shape[0], matrix.indptr.astype(np.int64), matrix.indices, matrix.data)
    array = np.asarray(codes)
    if array.ndim != 2 or array.dtype == object:
        raise InputError(
            f"codes of shape {array.shape} and type {array.dtype} are not a matrix of numbers: give "
            "[token, feature]"
        )
    features, rows = np.nonzero(array.T)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(features, minlength=array.shape[1]))]).astype(
        np.int64
    )
    return checked_columns(array.shape[0], offsets, rows, array[rows, features])


def is_torch(value: Any) -> bool:
    """Whether a value is a tensor of torch, which need not be imported to know."""
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "is_sparse")


def checked_columns(n_rows: int, offsets: np.ndarray, rows: np.ndarray, values: np.ndarray) -> Columns:
    """Without explicit zeros; refuses what is no code."""
    if len(values) and not np.isfinite(values).all():
        raise InputError(f"the codes hold {values[~np.isfinite(values)][0]}: codes must be finite")
    if len(values) and values.min() < 0:
        raise InputError(
            f"the codes hold {float(values.min()):g}: codes must not be negative, take the activations "
            "after the SAE's nonlinearity"
        )
    kept = values != 0
    if not kept.all():
        offsets = np.concatenate([[0], np.cumsum(kept)])[offsets].astype(np.int64)
        rows, values = rows[kept], values[kept]
    return Columns(int(n_rows), offsets, rows, values)


def as_labels(labels: Any, n_rows: int) -> np.ndarray:
    """Labels as bool ``[token, label]``; a single label may come as ``[token]``. Raises ``InputError`` for
    anything but 0, 1, False and True, and ``IncompatibleError`` for another number of tokens."""
    array = (
        labels.detach().cpu().numpy()
        if is_torch(labels)
        else np.asarray(labels.todense() if hasattr(labels, "todense") else labels)
    )
    if array.ndim not in (1, 2):
        raise InputError(f"labels of shape {array.shape} are not a matrix: give [token, label]")
    array = array[:, None] if array.ndim == 1 else array
    if len(array) != n_rows:
        raise IncompatibleError(
            f"there are labels of {len(array)} tokens and codes of {n_rows}: both must be of the same tokens"
        )
    if array.dtype != bool:
        if array.dtype == object or not np.isin(array, (0, 1)).all():
            raise InputError("labels must be True or False (or 1 or 0)")
        array = array.astype(bool)
    return array
