"""Names for features from labelled concepts, with control of how many noise would get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.probing.auroc import auroc_all
from featureinterp.probing.columns import Columns, as_columns, as_labels
from featureinterp.probing.domain_f1 import domain_f1
from featureinterp.probing.nulls import N_SHIFTS, auroc_null, f1_null, p_values
from featureinterp.probing.splits import joined, split_indices

Method = Literal["auroc", "domain_f1"]


@dataclass(frozen=True, slots=True)
class Annotation:
    """A feature and the concept that it separates best. ``auroc`` (None by F1) and ``f1`` (None by AUROC) are
    of the test tokens, ``train`` of those that chose the concept. ``n_positive``: labelled test tokens.
    ``threshold``: share of the feature's maximum above which it fires (F1 alone). ``p``: share of shifts of
    the labels in which any feature that chose this label reaches this score; None when nothing was shifted.
    """

    feature_id: int
    label: str
    auroc: float | None
    f1: float | None
    train: float
    n_positive: int
    threshold: float | None = None
    p: float | None = None

    @property
    def score(self) -> float:
        """What it was kept for."""
        found = self.auroc if self.f1 is None else self.f1
        assert found is not None
        return found


def annotate_features(
    codes: Any,
    labels: Any,
    names: Sequence[str],
    min_auroc: float = 0.85,
    *,
    method: Method = "auroc",
    min_f1: float = 0.5,
    documents: Any = None,
    texts: Any = None,
    instances: Mapping[str, Any] | None = None,
    split: tuple[np.ndarray, np.ndarray] | None = None,
    alpha: float | None = 0.05,
    n_shifts: int = N_SHIFTS,
    seed: int = 0,
) -> list[Annotation]:
    """Per feature the concept that it fires on: chosen on the training tokens, scored on the test tokens,
    kept where that score is at least ``min_auroc`` (by ``method="domain_f1"``: ``min_f1``) and beyond chance.
    Features in order; those that are not kept are left out.

    ``labels`` bool ``[token, label]`` with ``names``; ``documents`` ``[token]`` are what
    :func:`split_indices` keeps together and what labels are shifted in (those of the same ``texts`` as one);
    ``instances``: concept → ids as in :func:`domain_f1` (a concept without: each run of labelled tokens of a
    document is an instance).

    Beyond chance: of all features that chose a label in training, the largest test score in each of
    ``n_shifts`` circular shifts of the test labels is taken; a feature needs a score that at most a share
    ``alpha`` of these reach. So the chance that noise gets a given label even once is at most ``alpha``,
    however many features there are. A concept that stands in a few places only is easily met by one of
    thousands of features, and so is given to none. ``alpha=None``: no such control.
    """
    columns = as_columns(codes)
    labels = as_labels(labels, columns.n_rows)
    if len(names) != labels.shape[1] or len(set(names)) != len(names):
        raise IncompatibleError(
            f"there are {len(names)} names ({len(set(names))} different) for {labels.shape[1]} labels: "
            "give each label its own"
        )
    if alpha is not None and not 1 / (n_shifts + 1) <= alpha <= 1:
        raise InputError(
            f"a chance of {alpha:g} cannot be seen in {n_shifts} shifts: use at least "
            f"{int(np.ceil(1 / max(alpha, 1e-9))) - 1}"
        )
    train, test = split or split_indices(columns.n_rows, seed=seed, groups=documents, texts=texts)
    by_run = None if documents is None else np.asarray(documents)
    groups = by_run if texts is None else joined(by_run, texts)
    judge = (
        _by_auroc
        if method == "auroc"
        else _by_f1(names, instances or {}, by_run)
        if method == "domain_f1"
        else None
    )
    if judge is None:
        raise UnknownNameError(f"there is no method {method!r}: choose auroc or domain_f1")
    judged = judge(columns, labels, train, test)
    scores = np.where(judged.chosen >= 0, judged.scores, np.nan)
    kept, p = scores >= (min_auroc if method == "auroc" else min_f1), None
    if alpha is not None and kept.any():
        chosen_by = judged.chosen[:, None] == np.arange(len(names))
        p = _p(
            scores,
            judged.chosen,
            judged.null(None if groups is None else groups[test], chosen_by, n_shifts, seed),
        )
        kept &= p <= alpha
    positives = labels[test].sum(0)
    found = []
    for f in np.flatnonzero(kept).tolist():
        label, score = int(judged.chosen[f]), float(scores[f])
        threshold = None if judged.thresholds is None else float(judged.thresholds[f])
        area, f1 = (score, None) if method == "auroc" else (None, score)
        found.append(
            Annotation(
                f,
                names[label],
                area,
                f1,
                float(judged.first[f]),
                int(positives[label]),
                threshold,
                None if p is None else float(p[f]),
            )
        )
    return found


@dataclass(frozen=True)
class _Judged:
    """Per feature the label that the training tokens chose (−1: none), its score there and on the test
    tokens, and the threshold; ``null``: (documents of the test tokens, features that count for a label,
    shifts, seed) → the largest scores by chance."""

    chosen: np.ndarray
    first: np.ndarray
    scores: np.ndarray
    thresholds: np.ndarray | None
    null: Callable[[np.ndarray | None, np.ndarray, int, int], np.ndarray]


def _by_auroc(columns: Columns, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> _Judged:
    chosen, first = _choice(auroc_all(columns.take(train), labels[train]))
    held = columns.take(test)

    def null(documents: np.ndarray | None, among: np.ndarray, n_shifts: int, seed: int) -> np.ndarray:
        return auroc_null(held, labels[test], documents, among=among, n_shifts=n_shifts, seed=seed)

    return _Judged(chosen, first, _at(auroc_all(held, labels[test]), chosen), None, null)


def _by_f1(
    names: Sequence[str], instances: Mapping[str, Any], documents: np.ndarray | None
) -> Callable[..., _Judged]:
    def judge(columns: Columns, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> _Judged:
        ids = [
            np.asarray(instances[name]) if name in instances else runs_of(labels[:, i], documents)
            for i, name in enumerate(names)
        ]
        learnt, held = columns.take(train), columns.take(test)
        # training tokens are scaled by the maxima of the test tokens and the other way round: never by those
        # of the tokens that are scored
        tried = domain_f1(learnt, held.maxima, labels[train], [i[train] for i in ids])
        chosen, first = _choice(tried.f1)
        held_ids, at = (
            [i[test] for i in ids],
            np.argmax(np.nan_to_num(tried.curve), axis=1),
        )  # the threshold, too, is chosen in training
        found = domain_f1(held, learnt.maxima, labels[test], held_ids)

        def null(groups: np.ndarray | None, among: np.ndarray, n_shifts: int, seed: int) -> np.ndarray:
            return f1_null(
                held,
                learnt.maxima,
                labels[test],
                held_ids,
                groups,
                at=at,
                among=among,
                n_shifts=n_shifts,
                seed=seed,
            )

        scores = np.take_along_axis(found.curve, at[:, None], 1)[:, 0]
        return _Judged(chosen, first, _at(scores, chosen), _at(tried.threshold, chosen), null)

    return judge


def runs_of(labelled: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    """An instance id for every run of labelled tokens, which ends with its document: int32 ``[token]``, −1
    elsewhere.
    """
    starts = labelled & ~np.concatenate([[False], labelled[:-1]])
    if documents is not None and len(labelled):
        starts |= labelled & np.concatenate([[True], documents[1:] != documents[:-1]])
    return np.where(labelled, np.cumsum(starts) - 1, -1).astype(np.int32)


def _choice(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best label of every feature in ``[feature, label]`` and its score; −1 and NaN where none is
    known.
    """
    known = ~np.isnan(table).all(1)
    best = np.argmax(np.where(np.isnan(table), -1, table), axis=1)
    return np.where(known, best, -1), np.where(known, table[np.arange(len(table)), best], np.nan)


def _at(table: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen >= 0, table[np.arange(len(table)), np.maximum(chosen, 0)], np.nan)


def _p(scores: np.ndarray, chosen: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Every feature's p within its label; 1 where the null is undefined."""
    out = np.ones(len(scores))
    for label in np.unique(chosen[chosen >= 0]):
        mine = chosen == label
        out[mine] = np.nan_to_num(p_values(scores[mine], null[:, label]), nan=1.0)
    return out
