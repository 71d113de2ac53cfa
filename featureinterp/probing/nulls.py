"""How sure a score is, and what chance would give: bootstrap over documents, and labels shifted within their
documents.

Neighbouring tokens are alike, and labels come in runs; so whole documents are drawn again, and a null keeps
the runs: the labels of every document are turned by a random amount. (A permutation of single tokens destroys
the runs, and its null is far too narrow.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featureinterp.domain.score import Interval
from featureinterp.errors import IncompatibleError
from featureinterp.intervals import bootstrap, weighted_aurocs
from featureinterp.probing.auroc import weighted_parts
from featureinterp.probing.columns import as_columns, as_labels
from featureinterp.probing.domain_f1 import THRESHOLDS, fired_bins, from_bins, instances_by_layer

N_SHIFTS = 200


class Shifts:
    """Circular shifts of what belongs to tokens, within documents. ``documents`` ``[token]``; None: all
    tokens are one document. The tokens of a document need not stand together; their order is that of the
    rows."""

    def __init__(self, documents: Any, n: int) -> None:
        member = as_documents(documents, n)
        self.order = np.argsort(member, kind="stable")
        self.sizes = np.bincount(member)
        starts = np.cumsum(self.sizes) - self.sizes
        self._of = member[self.order]
        self._within = np.arange(n) - starts[self._of]
        self._starts = starts[self._of]
        self._size = self.sizes[self._of]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """``index`` ``[token]``, so that ``labels[index]`` are the shifted labels."""
        amount = rng.integers(0, self.sizes)
        index = np.empty(len(self.order), np.int64)
        index[self.order] = self.order[self._starts + (self._within + amount[self._of]) % self._size]
        return index


def shift_rows(documents: Any, n: int, rng: np.random.Generator) -> np.ndarray:
    """One such shift of ``n`` tokens: int64 ``[token]``."""
    return Shifts(documents, n).draw(rng)


def auroc_null(
    codes: Any,
    labels: Any,
    documents: Any = None,
    *,
    among: np.ndarray | None = None,
    n_shifts: int = N_SHIFTS,
    seed: int = 0,
) -> np.ndarray:
    """The largest AUROC that any feature reaches for each label when the labels are shifted: float64
    ``[shift, label]``, NaN for a one-sided label or one without features. ``among``: bool ``[feature,
    label]``, the features that count for a label (all when not given)."""
    columns = as_columns(codes)
    labels = as_labels(labels, columns.n_rows)
    parts = list(weighted_parts(columns))  # ranks do not change with the labels
    positives = labels.sum(0).astype(float)
    zeros = (columns.n_rows - columns.counts)[:, None]
    fixed = positives * (zeros + 1) / 2 - positives * (positives + 1) / 2

    def measure(index: np.ndarray) -> np.ndarray:
        weights = labels[index].astype(np.float64)
        sums = np.concatenate([ranks @ weights for _, _, ranks in parts]) + fixed
        return np.where(sided(labels), sums / np.maximum(positives * (columns.n_rows - positives), 1), np.nan)

    return _largest(measure, Shifts(documents, columns.n_rows), among, labels.shape[1], n_shifts, seed)


def f1_null(
    codes: Any,
    fmax: np.ndarray,
    mask: Any,
    instances: Sequence[Any],
    documents: Any = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    at: np.ndarray | None = None,
    among: np.ndarray | None = None,
    n_shifts: int = N_SHIFTS,
    seed: int = 0,
) -> np.ndarray:
    """As :func:`auroc_null` for the F1 of :func:`featureinterp.probing.domain_f1`: concepts and their
    instances are shifted together. ``at`` int ``[feature, label]``: the place among ``thresholds`` at which
    F1 is taken (when not given: at the best)."""
    columns = as_columns(codes)
    inside = as_labels(mask, columns.n_rows)
    ids = [instances_by_layer(i, columns.n_rows) for i in instances]
    steps = np.asarray(thresholds, float)
    bins = fired_bins(columns, fmax, steps)

    def measure(index: np.ndarray) -> np.ndarray:
        found = from_bins(columns, bins, inside[index], [i[index] for i in ids], steps)
        return found.f1 if at is None else np.take_along_axis(found.curve, at[:, None], 1)[:, 0]

    return _largest(measure, Shifts(documents, columns.n_rows), among, inside.shape[1], n_shifts, seed)


def _largest(
    measure: Callable[[np.ndarray], np.ndarray],
    shifts: Shifts,
    among: np.ndarray | None,
    n_labels: int,
    n_shifts: int,
    seed: int,
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.full((n_shifts, n_labels), np.nan)
    for row in out:
        table = measure(shifts.draw(rng))
        table = np.where(np.isnan(table) | (False if among is None else ~among), -np.inf, table)
        best = table.max(0, initial=-np.inf)
        row[:] = np.where(np.isfinite(best), best, np.nan)
    return out


def p_values(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(1 + shifts that reach the value) / (1 + shifts), for each of ``observed`` ``[n]`` against one label's
    ``null`` ``[shift]``; NaN where undefined.
    """
    reached = len(null) - np.searchsorted(np.sort(null), observed, side="left")
    return np.where(np.isnan(observed) | np.isnan(null).any(), np.nan, (1 + reached) / (1 + len(null)))


def auroc_interval(
    scores: Any, labels: Any, documents: Any = None, *, n_resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """The 95 % interval of the AUROC of one vector of scores over bootstrap samples of documents; None with
    fewer than two documents, or when most samples leave it undefined."""
    scores = np.asarray(scores, float)
    wanted = as_labels(labels, len(scores))[:, 0]
    member = as_documents(documents, len(scores))
    order = np.lexsort((member, wanted, scores))
    units = np.stack([scores, wanted, member])[
        :, order
    ]  # tokens that are alike in all three count as one unit
    first = (
        np.flatnonzero(np.concatenate([[True], (units[:, 1:] != units[:, :-1]).any(0)]))
        if len(order)
        else order
    )
    sizes, (values, labelled, of) = np.diff(np.append(first, len(order))), units[:, first]

    def statistic(counts: np.ndarray) -> np.ndarray:
        at_once = max(1, 10_000_000 // len(sizes))
        weights = (counts[i : i + at_once, of.astype(int)] * sizes for i in range(0, len(counts), at_once))
        return np.concatenate([weighted_aurocs(values, labelled.astype(bool), w) for w in weights])

    return bootstrap(statistic, int(member.max()) + 1, np.random.default_rng(seed), n_resamples)


def f1_interval(
    fires: Any, mask: Any, instances: Any, documents: Any = None, *, n_resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """The 95 % interval, over bootstrap samples of documents, of the F1 (precision by token, recall by
    instance) of one feature at one threshold. ``fires``, ``mask``: bool ``[token]``; ``instances`` as in
    :func:`featureinterp.probing.domain_f1`; an instance counts in each document that it is in."""
    fires, inside = np.asarray(fires, bool), np.asarray(mask, bool)
    member = as_documents(documents, len(fires))
    n = int(member.max()) + 1
    firing, hits = np.bincount(member[fires], minlength=n), np.bincount(member[fires & inside], minlength=n)
    ids = instances_by_layer(instances, len(fires))
    where = np.repeat(member, ids.shape[1]), ids.ravel(), np.repeat(fires, ids.shape[1])
    pairs = np.unique(np.stack(where)[:, ids.ravel() >= 0], axis=1)
    there = np.unique(pairs[:2], axis=1)
    met = np.bincount(pairs[0, pairs[2] > 0], minlength=n)
    present = np.bincount(there[0], minlength=n)

    def statistic(counts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = counts @ hits / (counts @ firing), counts @ met / (counts @ present)
            return np.where(
                counts @ present > 0, np.nan_to_num(2 * precision * recall / (precision + recall)), np.nan
            )

    return bootstrap(statistic, n, np.random.default_rng(seed), n_resamples)


def as_documents(documents: Any, n: int) -> np.ndarray:
    """Documents numbered from 0, int64 ``[token]``."""
    if documents is None:
        return np.zeros(n, np.int64)
    array = np.asarray(documents)
    if array.shape != (n,):
        raise IncompatibleError(
            f"there are documents of shape {array.shape} for {n} tokens: give one per token"
        )
    return np.asarray(np.unique(array, return_inverse=True)[1])


def sided(labels: np.ndarray) -> np.ndarray:
    """Which labels some token has and some token has not: bool ``[label]``."""
    return np.asarray(labels.any(0) & ~labels.all(0))
