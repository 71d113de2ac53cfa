"""Building the records of many features in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np

from featureinterp.codes.store import CodesStore
from featureinterp.corpus.contents import hash_of
from featureinterp.corpus.windows import check_documents
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import (
    SPLITS,
    FeatureRecord,
    Source,
    SplitName,
    Window,
)
from featureinterp.errors import InputError
from featureinterp.records.policy import RecordPolicy
from featureinterp.records.projected import projected_ranking
from featureinterp.records.quantile import quantile_order
from featureinterp.records.similar import MAX_QUERIES, SimilarWindows
from featureinterp.records.splits import SplitAssigner
from featureinterp.records.top import top_order
from featureinterp.records.uniform import uniform_rows
from featureinterp.records.weighted import weighted_order

ALIVE_ABOVE = 15
_Taken = tuple[SplitName, Source, list[int], Mapping[int, int]]
"""Rows for a split and source, and the token that a row is cut around, where there is one."""
Neighbours = Callable[[int], tuple[Sequence[int], Sequence[float]]]
_BATCH = 256
_CACHED_ROWS = 16_384


class RecordBuilder:
    """Builds records from a codes store. ``similar`` is needed when the policy asks for similar or projected
    similar windows, ``neighbours``, which gives the features of the nearest decoder directions and their
    cosines, for co-active ones."""

    def __init__(
        self,
        store: CodesStore,
        policy: RecordPolicy,
        similar: SimilarWindows | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        if policy.embeds and similar is None:
            raise InputError(
                "similar windows need the embeddings of all windows: pass SimilarWindows, or set their "
                "counts to 0"
            )
        if policy.wants("coactive_negative") and neighbours is None:
            raise InputError(
                "co-active windows need the SAE's decoder: pass the features' neighbours, or set their "
                "counts to 0"
            )
        self.store, self.policy, self.similar = store, policy, similar if policy.embeds else None
        self._neighbours = neighbours
        self._documents: list[int] = np.asarray(store.windows.documents).tolist()
        self._contents: list[int] = store.windows.contents.tolist()
        self._check_documents()
        self._fires = np.zeros(len(store.windows), bool)
        self._row = lru_cache(_CACHED_ROWS)(
            lambda row: (store.windows.ids(row), store.windows.pieces(row), self._documents[row])
        )

    def _check_documents(self) -> None:
        """Raises ``InputError`` when there are fewer documents than splits that get windows."""
        wanted = sum(any(counts[i] for counts in self.policy.counts.values()) for i in range(len(SPLITS)))
        check_documents(self.store.windows, wanted)

    def build(self, features: Iterable[int]) -> Iterator[FeatureRecord]:
        """The records of ``features``, in order. Raises ``FeatureRangeError`` before any work when one does
        not exist.
        """
        wanted = list(features)
        for index in wanted:
            self.store.check_feature(index)
        for start in range(0, len(wanted), _BATCH):
            yield from self._build_batch(wanted[start : start + _BATCH])

    def _build_batch(self, features: Sequence[int]) -> Iterator[FeatureRecord]:
        summaries = [_Summary.of(self.store, index) for index in features]
        if self.similar is None:
            for summary in summaries:
                yield self._record(summary, None, None)
            return
        queries = np.zeros((len(features), self.similar.embeddings.shape[1]), np.float32)
        for i, summary in enumerate(summaries):
            if len(summary.rows):
                queries[i] = self.similar.query(summary.ranked_rows)
        for summary, query, known in zip(summaries, queries, self.similar.search(queries), strict=True):
            yield self._record(summary, query, known)

    def _record(self, summary: _Summary, query: np.ndarray | None, known: np.ndarray | None) -> FeatureRecord:
        rng = np.random.default_rng([self.policy.seed, summary.index])
        assigner = SplitAssigner(self._documents, self._contents)
        self._fires[summary.rows] = True
        try:
            taken: list[_Taken] = []
            shortfalls: dict[str, str] = {}
            for source in self.policy.counts:
                wanted = dict(zip(SPLITS, self.policy.counts[source], strict=True))
                if not any(wanted.values()):
                    continue
                centres: dict[int, int] = {}
                offered = self._offer(
                    source, summary, rng, assigner, query, known, centres, sum(wanted.values())
                )
                kept = partial(self._content_of_part, centres) if source == "weighted" else None
                for split, rows in assigner.take(offered, wanted, kept).items():
                    taken.append((split, source, rows, centres))
                    if len(rows) < wanted[split]:
                        shortfalls[f"{split}/{source}"] = (
                            f"{len(rows)} of {wanted[split]}: {self._why_short(source, summary)}"
                        )
        finally:
            self._fires[summary.rows] = False
        n = len(summary.positions)
        return FeatureRecord(
            FeatureId(self.store.meta["sae"]["name"], summary.index),
            summary.scale,
            n / self.store.n_scored,
            n,
            self._windows(summary.index, taken),
            shortfalls,
        )

    def _part(self, centre: int, n_tokens: int) -> slice:
        """What is kept of a window around a token."""
        return slice(
            max(0, centre - self.policy.half_width), min(n_tokens, centre + self.policy.half_width + 1)
        )

    def _content_of_part(self, centres: Mapping[int, int], row: int) -> int:
        ids = self._row(row)[0]
        return int(hash_of(ids[None, self._part(centres[row], len(ids))])[0])

    def _offer(
        self,
        source: Source,
        summary: _Summary,
        rng: np.random.Generator,
        assigner: SplitAssigner,
        query: np.ndarray | None,
        known: np.ndarray | None,
        centres: dict[int, int],
        n_wanted: int,
    ) -> Iterable[int]:
        """Rows in the order in which a source offers them; fills ``centres`` with the token that a row is
        centred on.
        """
        n_windows = len(self.store.windows)
        match source:
            case "top":
                return summary.ranked_rows[
                    top_order(len(summary.rows), n_windows, n_wanted, self.policy.n_quantiles, rng)
                ].tolist()
            case "quantile":
                return (
                    summary.rows[
                        quantile_order(summary.maxima, summary.scale, max(n_wanted, 1), rng)
                    ].tolist()
                    if len(summary.rows)
                    else []
                )
            case "weighted":
                return self._offer_weighted(summary, rng, assigner, centres)
            case "random":
                return uniform_rows(n_windows, rng)
            case "random_negative":
                return (row for row in uniform_rows(n_windows, rng) if not self._fires[row])
            case "similar" | "similar_negative":
                assert self.similar is not None and query is not None and known is not None
                if not len(summary.rows):
                    return []
                ranking = self.similar.ranking(query, known)
                return ranking if source == "similar" else (row for row in ranking if not self._fires[row])
            case "projected_similar" | "projected_similar_negative":
                assert self.similar is not None
                if not len(summary.rows):
                    return []
                positives = np.sort(summary.ranked_rows[:MAX_QUERIES])
                ranking = projected_ranking(
                    self.similar.embeddings,
                    positives,
                    self.policy.projection,
                    rng,
                    np.flatnonzero(~self._fires),
                )
                return (
                    ranking
                    if source == "projected_similar"
                    else (row for row in ranking if not self._fires[row])
                )
            case "coactive_negative":
                return (row for row in self._coactive_rows(summary.index) if not self._fires[row])
        raise InputError(f"there is no source {source!r}")

    def _coactive_rows(self, feature: int) -> list[int]:
        """Windows where a neighbour fires, by cosine times its activation there as a share of its largest,
        the largest first.
        """
        assert self._neighbours is not None
        strength = np.zeros(len(self._fires), np.float64)
        for index, cosine in zip(*self._neighbours(feature), strict=True):
            other = _Summary.of(self.store, int(index))
            if cosine > 0 and len(other.rows):
                strength[other.rows] = np.maximum(strength[other.rows], cosine * other.maxima / other.scale)
        rows = np.flatnonzero(strength)
        return rows[np.argsort(-strength[rows], kind="stable")].tolist()  # type: ignore[no-any-return]

    def _offer_weighted(
        self, summary: _Summary, rng: np.random.Generator, assigner: SplitAssigner, centres: dict[int, int]
    ) -> Iterator[int]:
        taken = np.zeros(len(self._fires), bool)
        taken[list(assigner.used)] = True
        weakest = summary.maxima[taken[summary.rows]].min(initial=np.inf)
        rows = summary.positions // self.store.windows.length
        below = np.flatnonzero((summary.values < weakest) & ~taken[rows])
        for i in weighted_order(summary.values[below], rng):
            row = int(rows[below[i]])
            if row not in centres:
                centres[row] = int(summary.positions[below[i]] - row * self.store.windows.length)
                yield row

    def _windows(
        self, feature: int, taken: Sequence[_Taken]
    ) -> dict[SplitName, dict[Source, tuple[Window, ...]]]:
        """The windows of the rows that were taken, cut around their centre where they have one."""
        splits: dict[SplitName, dict[Source, tuple[Window, ...]]] = {s: {} for s in SPLITS}
        activations = iter(
            self.store.window_activations(feature, [row for *_, rows, _ in taken for row in rows])
        )
        for split, source, rows, centres in taken:
            windows = []
            for row, own in zip(rows, activations, strict=False):
                ids, pieces, document = self._row(row)
                if row in centres:
                    part = self._part(centres[row], len(ids))
                    windows.append(Window(row, document, ids[part], pieces[part], own[part], part.start))
                else:
                    windows.append(Window(row, document, ids, pieces, own[: len(ids)]))
            if windows:
                splits[split][source] = tuple(windows)
        return splits

    def _why_short(self, source: Source, summary: _Summary) -> str:
        if source == "coactive_negative":
            return (
                "its neighbours fire in no more windows where it is silent, that are unused and in a "
                "document of this split"
            )
        n_documents = len(np.unique(self._documents))
        if source in ("top", "weighted", "quantile"):
            return (
                "the feature fires in "
                f"{_counted(len(summary.rows), self.store.windows.contents[summary.rows])} of "
                f"{len(self.store.windows)} windows"
            )
        every = _counted(len(self.store.windows), self.store.windows.contents)
        return (
            f"{every} windows in {n_documents} documents have no more that are unused and in a document "
            "of this split"
        )


def _counted(n: int, contents: np.ndarray) -> str:
    """A number of windows, with the number of texts in them where some are the same."""
    different = len(np.unique(contents))
    return f"{n}" if different == n else f"{n} (of {different} different texts)"


@dataclass(frozen=True)
class _Summary:
    """One feature's nonzeros, and its maximum in each window where it fires."""

    index: int
    positions: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    maxima: np.ndarray
    scale: float

    @classmethod
    def of(cls, store: CodesStore, index: int) -> _Summary:
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
