"""Building the records of many features in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

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
from featureinterp.registry import WINDOWS
from featureinterp.sampling.kinds import Neighbours, Offer, Summary, rows_of
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.similar import SimilarWindows
from featureinterp.sampling.splits import SplitAssigner

ALIVE_ABOVE = 15
_Taken = tuple[SplitName, Source, list[int], Mapping[int, int]]
"""Rows for a split and source, and the token that a row is cut around, where there is one."""
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
        summaries = [Summary.of(self.store, index) for index in features]
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

    def _record(self, summary: Summary, query: np.ndarray | None, known: np.ndarray | None) -> FeatureRecord:
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
                offer = Offer(
                    self.store,
                    self.policy,
                    summary,
                    rng,
                    assigner,
                    self._fires,
                    sum(wanted.values()),
                    self.similar,
                    query,
                    known,
                    self._neighbours,
                )
                centres, offered = offer.centres, rows_of(source, offer)
                centred = WINDOWS.has(source, "centred")
                kept = partial(self._content_of_part, centres) if centred else None
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

    def _why_short(self, source: Source, summary: Summary) -> str:
        if source == "coactive_negative":
            return (
                "its neighbours fire in no more windows where it is silent, that are unused and in a "
                "document of this split"
            )
        n_documents = len(np.unique(self._documents))
        if WINDOWS.has(source, "fires"):
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
