"""How well a feature that fires above a threshold finds a concept: precision by token, recall by instance.

A concept's instances are runs of tokens (a name, a quotation). A feature that fires once in each finds the
concept, and is not asked to fire on every token of it; each firing token outside is an error. So precision =
firing tokens inside the concept / firing tokens, recall = instances with at least one firing token /
instances, and F1 their harmonic mean (as for concepts of proteins in Simon and Zou 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featureinterp.errors import IncompatibleError, InputError
from featureinterp.probing.columns import Columns, as_columns, as_labels, is_torch

THRESHOLDS = (0.15, 0.3, 0.5, 0.6, 0.8)


@dataclass(frozen=True)
class DomainF1:
    """The best F1 over thresholds, and what it is made of: float64 ``[feature, concept]`` each (``[feature]``
    for one concept). NaN for a concept without instances; F1 0 and the first threshold for a feature that
    never fires inside, precision NaN where it never fires at all. ``curve``: F1 at every threshold,
    ``[feature, threshold, concept]``. ``n_instances`` int64 ``[concept]``."""

    f1: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    threshold: np.ndarray
    curve: np.ndarray
    n_instances: np.ndarray


def domain_f1(
    codes: Any, fmax: Any, mask: Any, instances: Any, thresholds: Sequence[float] = THRESHOLDS
) -> DomainF1:
    """Precision, recall and F1 of every feature for one concept or several.

    ``codes`` ``[token, feature]`` ≥ 0 are divided by ``fmax`` ``[feature]``, each feature's largest code on
    tokens that are **not** scored here (a feature with fmax 0 never fires); a token fires where the quotient
    exceeds a threshold. ``mask``: bool ``[token]``, or ``[token, concept]``: inside the concept.
    ``instances``: int ``[token]``, or ``[token, depth]`` where instances of one concept overlap: the instance
    that a token belongs to, −1 for none (any ids, gaps allowed; ids outside the mask count as well); for
    several concepts a list of these. Of equal F1 the first threshold wins. Exact; memory grows with the
    nonzeros, and with features · thresholds · concepts, as the result does.
    """
    columns = as_columns(codes)
    inside = as_labels(mask, columns.n_rows)
    single = np.ndim(mask) == 1
    ids = [instances] if single else list(instances)
    if len(ids) != inside.shape[1]:
        raise IncompatibleError(
            f"there are instances of {len(ids)} concepts and masks of {inside.shape[1]}: give both for each"
        )
    held = [instances_by_layer(i, columns.n_rows) for i in ids]
    bins = fired_bins(columns, _maxima(fmax, columns.n_features), _increasing(thresholds))
    found = from_bins(columns, bins, inside, held, np.asarray(thresholds, float))
    if not single:
        return found
    f1, precision, recall, threshold, curve = (
        table[..., 0] for table in (found.f1, found.precision, found.recall, found.threshold, found.curve)
    )
    return DomainF1(f1, precision, recall, threshold, curve, found.n_instances)


def fired_bins(columns: Columns, fmax: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many thresholds each nonzero exceeds: int8 ``[nonzero]``."""
    bins = np.empty(len(columns.values), np.int8)
    with np.errstate(divide="ignore"):
        scale = np.where(fmax > 0, fmax, np.inf)
    for start, end in columns.parts():
        span = slice(columns.offsets[start], columns.offsets[end])
        share = np.asarray(columns.values[span], np.float64) / np.repeat(
            scale[start:end], columns.counts[start:end]
        )
        bins[span] = np.searchsorted(thresholds, share, side="left")
    return bins


def from_bins(
    columns: Columns,
    bins: np.ndarray,
    inside: np.ndarray,
    instances: Sequence[np.ndarray],
    thresholds: np.ndarray,
) -> DomainF1:
    """The same from :func:`fired_bins` and instances as :func:`instances_by_layer` gives them, which shifts
    of the labels can share.
    """
    n_bins = len(thresholds)
    firing, hits = _token_counts(columns, bins, inside, n_bins)
    met = np.zeros(hits.shape)
    present = np.zeros(len(instances), np.int64)
    for concept, ids in enumerate(instances):
        known, number = np.unique(ids[ids >= 0], return_inverse=True)
        present[concept] = len(known)
        if len(known):
            members = np.full(ids.shape, -1, np.int64)
            members[ids >= 0] = number
            met[:, :, concept] = _instances_met(columns, bins, members, len(known), n_bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = hits / firing[:, :, None], met / present
        f1 = 2 * precision * recall / (precision + recall)
    curve = np.where(present > 0, np.nan_to_num(f1), np.nan)
    best = np.argmax(np.nan_to_num(curve), axis=1)[:, None]
    f1, precision, recall = (np.take_along_axis(table, best, 1)[:, 0] for table in (curve, precision, recall))
    undefined = np.broadcast_to(present == 0, f1.shape)
    threshold = np.where(undefined, np.nan, thresholds[best[:, 0]])
    return DomainF1(f1, np.where(undefined, np.nan, precision), recall, threshold, curve, present)


def _token_counts(
    columns: Columns, bins: np.ndarray, inside: np.ndarray, n_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Firing tokens ``[feature, threshold]``, and those of them inside each concept ``[feature, threshold,
    concept]``: a histogram over bins, summed up.
    """
    import scipy.sparse

    weights = inside.astype(np.float64)
    firing = np.zeros((columns.n_features, n_bins))
    hits = np.zeros((columns.n_features, n_bins, inside.shape[1]))
    for start, end in columns.parts():
        span = slice(columns.offsets[start], columns.offsets[end])
        place = np.repeat(np.arange(end - start) * n_bins, columns.counts[start:end]) + bins[span] - 1
        fired = bins[span] > 0
        ones = (np.ones(int(fired.sum())), (place[fired], columns.rows[span][fired].astype(np.int64)))
        table = scipy.sparse.coo_matrix(ones, shape=((end - start) * n_bins, columns.n_rows)).tocsr()
        firing[start:end] = np.diff(table.indptr).reshape(end - start, n_bins)
        hits[start:end] = (table @ weights).reshape(end - start, n_bins, -1)
    return _exceeding(firing), _exceeding(hits)


def _exceeding(histogram: np.ndarray) -> np.ndarray:
    """Counts per bin → counts in this bin or a higher one, along axis 1."""
    return histogram[:, ::-1].cumsum(1)[:, ::-1]


def _instances_met(
    columns: Columns, bins: np.ndarray, members: np.ndarray, n_instances: int, n_bins: int
) -> np.ndarray:
    """Instances with a firing token, ``[feature, threshold]``: from the highest bin of every pair of feature
    and instance.
    """
    out = np.zeros((columns.n_features, n_bins))
    anywhere = np.asarray((members >= 0).any(1))
    for start, end in columns.parts():
        span = slice(columns.offsets[start], columns.offsets[end])
        rows = columns.rows[span]
        used = anywhere[rows] & (bins[span] > 0)
        feature = np.repeat(np.arange(end - start), columns.counts[start:end])[used]
        of, bin_ = members[rows[used]], bins[span][used].astype(np.int64)
        key = [
            ((feature * n_instances + of[:, layer]) * (n_bins + 1) + bin_)[of[:, layer] >= 0]
            for layer in range(members.shape[1])
        ]
        pairs = np.sort(np.concatenate(key))
        pair, level = np.divmod(pairs, n_bins + 1)
        highest = np.append(pair[1:] != pair[:-1], True) if len(pair) else np.zeros(0, bool)
        place = pair[highest] // n_instances * n_bins + level[highest] - 1
        out[start:end] = np.bincount(place, minlength=(end - start) * n_bins).reshape(end - start, n_bins)
    return _exceeding(out)


def instances_by_layer(ids: Any, n_rows: int) -> np.ndarray:
    """Instance ids as ``[token, depth]``."""
    array = ids.detach().cpu().numpy() if is_torch(ids) else np.asarray(ids)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != n_rows or not np.issubdtype(array.dtype, np.integer):
        raise IncompatibleError(
            f"instance ids of shape {array.shape} and type {array.dtype} do not fit {n_rows} tokens: give "
            "whole numbers [token]"
        )
    return array


def _maxima(fmax: Any, n_features: int) -> np.ndarray:
    array = fmax.detach().cpu().numpy() if is_torch(fmax) else np.asarray(fmax)
    if array.shape != (n_features,):
        raise IncompatibleError(
            f"there are maxima of shape {array.shape} for {n_features} features: give one per feature"
        )
    if not (np.isfinite(array) & (array >= 0)).all():
        raise InputError("a feature's maximum must be finite and not negative")
    return array.astype(np.float64)


def _increasing(thresholds: Sequence[float]) -> np.ndarray:
    array = np.asarray(thresholds, float)
    if not len(array) or array[0] < 0 or (np.diff(array) <= 0).any():
        raise InputError(
            f"the thresholds {list(thresholds)} are not possible: give shares of the maximum that rise "
            "from at least 0"
        )
    return array
