"""How well codes separate labels: the area under the ROC curve of every feature for every label, exact, at
the cost of the nonzeros.

The AUROC is P(code of a labelled token > code of another token) + ½ P(equal). In one column with m nonzeros
among N tokens, n0 = N − m of them zero, a nonzero of midrank r among the nonzeros has w = r + (n0 − 1)/2 left
of the place that it would have if all zeros shared the rank (n0 + 1)/2; with P labelled and Q other tokens

    AUROC = [P·(n0 + 1)/2 + Σ_{labelled nonzeros} w − P·(P + 1)/2] / (P·Q)

(Mann and Whitney 1947, with midranks for ties). Codes must not be negative: only then do all zeros come
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from featureinterp.errors import IncompatibleError, InputError
from featureinterp.probing.columns import Columns, as_columns, as_labels, is_torch
from featureinterp.probing.splits import split_indices


def auroc_all(codes: Any, labels: Any, *, degenerate: float = np.nan) -> np.ndarray:
    """The AUROC of every feature for every label: float64 ``[feature, label]``.

    ``codes`` ``[token, feature]`` ≥ 0 in any form of :func:`as_columns`; a tensor on a GPU is worked on
    there. ``labels`` bool ``[token, label]``. A label that no token has, or every token, gives ``degenerate``
    (NaN; others' code gives 0.5). Exact, with midranks for ties, summed in float64. Time grows with nonzeros
    · (log nonzeros + labels), memory with the nonzeros and with tokens · labels.
    """
    if is_torch(codes) and codes.is_cuda:
        from featureinterp.probing import tensors

        wanted = as_labels(labels, codes.shape[0])
        sums = tensors.rank_sums(codes, wanted)
        if sums is not None:
            return _over_pairs(sums, wanted, degenerate)
    columns = as_columns(codes)
    wanted = as_labels(labels, columns.n_rows)
    return _over_pairs(rank_sums(columns, wanted), wanted, degenerate)


def auroc_vec(scores: Any, labels: Any) -> float:
    """The AUROC of one vector of scores ``[token]``, of any sign, for one label ``[token]``; NaN when no
    token has the label, or every one.
    """
    scores = scores.detach().cpu().numpy() if is_torch(scores) else np.asarray(scores)
    if scores.ndim != 1:
        raise InputError(
            f"scores of shape {scores.shape} are not one vector: give [token], or use auroc_all for many"
        )
    if len(scores) and not np.isfinite(scores).all():
        raise InputError("scores must be finite")
    wanted = as_labels(labels, len(scores))
    if wanted.shape[1] != 1:
        raise InputError(f"labels of shape {wanted.shape} are not one label: give [token]")
    places = (np.unique(scores, return_inverse=True)[1] + 1).astype(
        np.uint32
    )  # midranks hang on the order alone
    return float(auroc_all(places[:, None], wanted)[0, 0])


def rank_sums(columns: Columns, labels: np.ndarray) -> np.ndarray:
    """Mann and Whitney's U of every feature for every label: float64 ``[feature, label]``."""
    weights = labels.astype(np.float64)
    positives = weights.sum(0)
    out = np.empty((columns.n_features, labels.shape[1]))
    for start, end, ranks in weighted_parts(columns):
        zeros = columns.n_rows - columns.counts[start:end, None]
        out[start:end] = positives * (zeros + 1) / 2 + ranks @ weights - positives * (positives + 1) / 2
    return out


def weighted_parts(columns: Columns) -> Iterator[tuple[int, int, Any]]:
    """Parts (first feature, end, sparse ``[feature, token]`` with w of every nonzero): times labels, they
    give the sums of ranks. What is costly of an AUROC is so done once for any number of labels, or shifts of
    them."""
    import scipy.sparse

    row_bits = max(1, int(columns.n_rows - 1).bit_length())
    for start, end in columns.parts(256):
        span = slice(columns.offsets[start], columns.offsets[end])
        edges = columns.offsets[start : end + 1] - columns.offsets[start]
        values, value_bits = _ordinals(np.asarray(columns.values[span]))
        if row_bits + value_bits + int(end - start - 1).bit_length() > 64:
            raise InputError(
                f"{columns.n_rows:,} tokens are too many for one table of AUROCs: take every second one"
            )
        counts = np.diff(edges)
        key = np.repeat(
            np.arange(end - start, dtype=np.uint64) << np.uint64(value_bits), counts
        )  # feature, value and row in one integer: one sort of plain
        key = (key | values) << np.uint64(
            row_bits
        )  # integers is many times faster than one that has to move rows along
        key |= columns.rows[span].astype(np.uint64)
        key.sort()
        rows = (key & np.uint64((1 << row_bits) - 1)).astype(np.int64)
        key >>= np.uint64(row_bits)
        first = (
            np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
            if len(key)
            else np.zeros(0, np.int64)
        )
        tied = np.diff(np.append(first, len(key)))
        feature = (key[first] >> np.uint64(value_bits)).astype(np.int64)
        midrank = first - edges[feature] + (tied + 1) / 2
        w = np.repeat(midrank + (columns.n_rows - counts[feature] - 1) / 2, tied)
        yield start, end, scipy.sparse.csr_matrix((w, rows, edges), shape=(end - start, columns.n_rows))


def _ordinals(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Positive values as unsigned integers in the same order, uint64, and the bits that these take: a
    positive float's bits are such an integer.
    """
    if values.dtype == np.float16:
        return np.ascontiguousarray(values).view(np.uint16).astype(np.uint64), 16
    if values.dtype == np.float32:
        return np.ascontiguousarray(values).view(np.uint32).astype(np.uint64), 32
    return np.unique(values, return_inverse=True)[1].astype(np.uint64), max(1, len(values).bit_length())


def _over_pairs(sums: np.ndarray, labels: np.ndarray, degenerate: float) -> np.ndarray:
    pairs = labels.sum(0).astype(float) * (~labels).sum(0)
    return np.where(pairs > 0, sums / np.maximum(pairs, 1), degenerate)


@dataclass(frozen=True)
class BestSingle:
    """The feature that separates each label best, one entry per label. ``feature`` −1 and NaN where a label
    is one-sided in training (its test value is NaN as well when it is one-sided there). ``sign`` −1: the
    feature is silent where the label is. ``train`` and ``test``: AUROC in the direction of the sign."""

    feature: np.ndarray
    sign: np.ndarray
    train: np.ndarray
    test: np.ndarray


def best_single_train_test(
    codes: Any,
    labels: Any,
    *,
    split: tuple[np.ndarray, np.ndarray] | None = None,
    groups: Any = None,
    texts: Any = None,
    test_fraction: float = 0.4,
    seed: int = 0,
) -> BestSingle:
    """Per label the feature and sign with the best AUROC on the training tokens, and the AUROC of that choice
    on the test tokens: choosing the best of thousands makes the training value too good, and the test value
    is free of that. ``split``: (training rows, test rows); otherwise :func:`split_indices` with ``groups``
    (documents), ``texts``, ``test_fraction`` and ``seed``."""
    columns = as_columns(codes)
    labels = as_labels(labels, columns.n_rows)
    train, test = split or split_indices(columns.n_rows, test_fraction, seed, groups, texts)
    found = auroc_all(columns.take(train), labels[train])
    return chosen_on(found, columns.take(test), labels[test])


def chosen_on(train: np.ndarray, columns: Columns, labels: np.ndarray) -> BestSingle:
    """The best of ``train`` ``[feature, label]`` and its AUROC on other tokens."""
    n_features, n_labels = train.shape
    if not n_features:
        raise IncompatibleError("there are no features to choose from")
    known = ~np.isnan(train).all(0)
    feature = np.where(known, np.argmax(np.where(np.isnan(train), -1, np.abs(train - 0.5)), axis=0), -1)
    there = train[feature, np.arange(n_labels)]
    sign = np.where(known, np.where(there >= 0.5, 1, -1), 0)
    test = pairs_auroc(columns, labels, np.maximum(feature, 0))
    return BestSingle(
        feature, sign, *(np.where(known, np.where(sign < 0, 1 - a, a), np.nan) for a in (there, test))
    )


def pairs_auroc(columns: Columns, labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The AUROC of ``features[l]`` for label l: float64 ``[label]``."""
    found = [
        auroc_all(columns.select(features[i : i + 64]), labels[:, i : i + 64])
        for i in range(0, len(features), 64)
    ]
    return np.concatenate([np.zeros(0), *(np.diagonal(table) for table in found)])
