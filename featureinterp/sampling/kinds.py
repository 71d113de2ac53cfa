"""Kinds of windows: in which order each offers the rows of a corpus to a feature's record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from featureinterp.codes.store import CodesStore
from featureinterp.domain.record import SILENT, Source
from featureinterp.registry import WINDOWS
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.projected import projected_ranking
from featureinterp.sampling.quantile import quantile_order
from featureinterp.sampling.similar import MAX_QUERIES, SimilarWindows
from featureinterp.sampling.splits import SplitAssigner
from featureinterp.sampling.top import top_order
from featureinterp.sampling.uniform import uniform_rows
from featureinterp.sampling.weighted import weighted_order

Neighbours = Callable[[int], tuple[Sequence[int], Sequence[float]]]
"""For a feature, those of the nearest decoder directions, and their cosines."""


@dataclass(frozen=True)
class Summary:
    """One feature's nonzeros, and its maximum in each window where it fires."""

    index: int
    positions: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    maxima: np.ndarray
    scale: float

    @classmethod
    def of(cls, store: CodesStore, index: int) -> Summary:
        codes = store.feature(index)
        positions, values = codes.positions.astype(np.int64), codes.values.astype(np.float32)
        rows_of = positions // store.windows.length
        starts = np.flatnonzero(np.diff(rows_of, prepend=-1))
        maxima = np.maximum.reduceat(values, starts) if len(starts) else np.zeros(0, np.float32)
        return cls(index, positions, values, rows_of[starts], starts, maxima, float(values.max(initial=0.0)))

    @cached_property
    def ranked_rows(self) -> np.ndarray:
        """Firing windows, strongest first."""
        return self.rows[np.argsort(-self.maxima, kind="stable")]


@dataclass(frozen=True)
class Offer:
    """What a kind of windows is drawn from, for one feature. ``fires``: whether it does in each window of the
    corpus. ``n_wanted``: windows of the kind that are asked for. ``query``, ``known``: what is searched for
    among the embeddings, and the rows that are nearest to it. ``centres``: is given the token that a row is
    cut around, by kinds with the trait ``centred``."""

    store: CodesStore
    policy: RecordPolicy
    summary: Summary
    rng: np.random.Generator
    assigner: SplitAssigner
    fires: np.ndarray
    n_wanted: int
    similar: SimilarWindows | None = None
    query: np.ndarray | None = None
    known: np.ndarray | None = None
    neighbours: Neighbours | None = None
    centres: dict[int, int] = field(default_factory=dict)

    @property
    def n_windows(self) -> int:
        """Windows of the corpus."""
        return len(self.fires)


def rows_of(source: Source, offer: Offer) -> Iterable[int]:
    """Rows in the order in which a kind offers them; only those where the feature is silent for a kind whose
    name says so."""
    rows = WINDOWS.load(source)(offer)
    return (row for row in rows if not offer.fires[row]) if source.endswith(SILENT) else rows


def top(offer: Offer) -> Iterable[int]:
    """The strongest windows."""
    ranked, n = offer.summary.ranked_rows, len(offer.summary.rows)
    order = top_order(n, offer.n_windows, offer.n_wanted, offer.policy.n_quantiles, offer.rng)
    rows: list[int] = ranked[order].tolist()
    return rows


def quantile(offer: Offer) -> Iterable[int]:
    """Windows from every part of the range of activations."""
    summary = offer.summary
    if not len(summary.rows):
        return []
    order = quantile_order(summary.maxima, summary.scale, max(offer.n_wanted, 1), offer.rng)
    rows: list[int] = summary.rows[order].tolist()
    return rows


def weighted(offer: Offer) -> Iterator[int]:
    """Tokens drawn by their activation, among those that are weaker than what is in the record already."""
    summary, length = offer.summary, offer.store.windows.length
    taken = np.zeros(offer.n_windows, bool)
    taken[list(offer.assigner.used)] = True
    weakest = summary.maxima[taken[summary.rows]].min(initial=np.inf)
    rows = summary.positions // length
    below = np.flatnonzero((summary.values < weakest) & ~taken[rows])
    for i in weighted_order(summary.values[below], offer.rng):
        row = int(rows[below[i]])
        if row not in offer.centres:
            offer.centres[row] = int(summary.positions[below[i]] - row * length)
            yield row


def uniform(offer: Offer) -> Iterable[int]:
    """Windows at random."""
    return uniform_rows(offer.n_windows, offer.rng)


def similar(offer: Offer) -> Iterable[int]:
    """Windows whose sentence embeddings are near those of the top windows."""
    assert offer.similar is not None and offer.query is not None and offer.known is not None
    return offer.similar.ranking(offer.query, offer.known) if len(offer.summary.rows) else []


def projected_similar(offer: Offer) -> Iterable[int]:
    """The same after a projection that pulls the top windows together."""
    assert offer.similar is not None
    if not len(offer.summary.rows):
        return []
    positives = np.sort(offer.summary.ranked_rows[:MAX_QUERIES])
    silent = np.flatnonzero(~offer.fires)
    embeddings, projection = offer.similar.embeddings, offer.policy.projection
    return projected_ranking(embeddings, positives, projection, offer.rng, silent)


def coactive(offer: Offer) -> Iterable[int]:
    """Windows where a neighbour fires, by cosine times its activation there as a share of its largest, the
    largest first.
    """
    assert offer.neighbours is not None
    strength = np.zeros(offer.n_windows, np.float64)
    for index, cosine in zip(*offer.neighbours(offer.summary.index), strict=True):
        other = Summary.of(offer.store, int(index))
        if cosine > 0 and len(other.rows):
            strength[other.rows] = np.maximum(strength[other.rows], cosine * other.maxima / other.scale)
    rows = np.flatnonzero(strength)
    found: list[int] = rows[np.argsort(-strength[rows], kind="stable")].tolist()
    return found
