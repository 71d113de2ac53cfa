"""Tokens of windows as rows of a table, with the labels, and those of a run with the codes, that belong to
them.

A token belongs to a span of the document when they share a character that is not white space; a token without
such a character (a line break, a part of a character of several tokens) belongs to it when it lies wholly
inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.files import valid_unicode
from featureinterp.probing.columns import Columns
from featureinterp.probing.labels import Labels, Span


class TableTokens:
    """Some tokens of a table of windows. ``positions``: of the rows, ascending, int64 ``[token]``: row of the
    window · window length + place in it.
    """

    def __init__(self, windows: WindowTable, positions: np.ndarray) -> None:
        self.windows, self.positions = windows, positions

    @property
    def documents(self) -> np.ndarray:
        """Number of every row's document: int32 ``[token]``."""
        numbers: np.ndarray = np.asarray(self.windows.documents)[self.positions // self.windows.length]
        return numbers

    @property
    def texts(self) -> np.ndarray:
        """A hash of the text of every row's window, uint64 ``[token]``: what may not be on two sides of a
        split.
        """
        hashes: np.ndarray = self.windows.contents[self.positions // self.windows.length]
        return hashes

    @cached_property
    def row_of_position(self) -> np.ndarray:
        """The place of every position among the tokens, −1 where none is: int32 ``[position]``."""
        out = np.full(len(self.windows) * self.windows.length, -1, np.int32)
        out[self.positions] = np.arange(len(self.positions))
        return out

    def labelled(self, labels: Labels, corpus: Corpus | None = None) -> Labelled:
        """Labels of these tokens. ``corpus``: the run's, for labels that are computed from text. Raises
        ``IncompatibleError`` when it is not the text that the windows were cut from, and ``UnknownNameError``
        for spans of a document that the run does not have."""
        table = self.windows
        names: dict[str, int] = {name: i for i, name in enumerate(labels.names)}
        found: list[_Layers] = [_Layers(len(self.positions)) for _ in names]
        n_spans = n_outside = 0
        for number, spans in _spans(table, labels, corpus):
            n_spans += len(spans)
            met = 0
            for span, rows in _tokens_of(self, number).inside(spans):
                if span.label not in names:
                    names[span.label] = len(names)
                    found.append(_Layers(len(self.positions)))
                met += 1
                found[names[span.label]].add(
                    rows, None if span.instance is None else f"{number}:{span.instance}"
                )
            n_outside += len(spans) - met
        if not names:
            raise InputError(f"{labels.source} labels nothing in this corpus")
        matrix = np.stack([layers.labelled() for layers in found], axis=1)
        return Labelled(
            matrix, tuple(names), {name: found[i].ids() for name, i in names.items()}, n_spans, n_outside
        )


class RunTokens(TableTokens):
    """A run's scored tokens."""

    def __init__(self, store: CodesStore) -> None:
        super().__init__(store.windows, store.scored_positions)
        self.store = store

    @cached_property
    def codes(self) -> Columns:
        """The codes of these tokens."""
        return Columns(
            len(self.positions),
            np.asarray(self.store.offsets),
            self.row_of_position[np.asarray(self.store.positions)],
            self.store.values,
        )


@dataclass(frozen=True)
class Labelled:
    """``labels`` bool ``[token, label]``, their ``names``, the ``instances`` of each (int32 ``[token]``, or
    ``[token, depth]`` where some overlap), how many spans there were, and how many of them met no scored
    token."""

    labels: np.ndarray
    names: tuple[str, ...]
    instances: dict[str, np.ndarray]
    n_spans: int
    n_outside: int


class _Layers:
    """Instance ids of one label; an instance that overlaps another goes into a further layer."""

    def __init__(self, n: int) -> None:
        self.n, self.layers = n, [np.full(n, -1, np.int32)]
        self.numbers: dict[str, int] = {}
        self.n_instances = 0

    def add(self, rows: np.ndarray, key: str | None) -> None:
        number = self.n_instances if key is None else self.numbers.setdefault(key, self.n_instances)
        self.n_instances += number == self.n_instances
        for layer in self.layers:
            if np.isin(layer[rows], (-1, number)).all():
                break
        else:
            layer = np.full(self.n, -1, np.int32)
            self.layers.append(layer)
        layer[rows] = number

    def labelled(self) -> np.ndarray:
        return np.asarray((np.stack(self.layers) >= 0).any(0))

    def ids(self) -> np.ndarray:
        return self.layers[0] if len(self.layers) == 1 else np.stack(self.layers, axis=1)


@dataclass(frozen=True)
class _Tokens:
    """One document's scored tokens in order: their ``rows``, the span of what is not white space in each
    (``starts``, ``ends``; all of it where nothing is), and ``blank``: those without such a character."""

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    blank: np.ndarray

    def inside(self, spans: Sequence[Span]) -> Iterator[tuple[Span, np.ndarray]]:
        """The spans that some token belongs to, with the rows of those tokens."""
        first = np.searchsorted(self.ends, [s.start for s in spans], side="left").tolist()
        last = np.searchsorted(self.starts, [s.end for s in spans], side="right").tolist()
        for span, a, b in zip(spans, first, last, strict=True):
            if a < b:
                starts, ends, blank = self.starts[a:b], self.ends[a:b], self.blank[a:b]
                belongs = np.where(
                    blank,
                    (starts >= span.start) & (ends <= span.end),
                    (starts < span.end) & (ends > span.start),
                )
                if belongs.any():
                    yield span, self.rows[a:b][belongs]


def _tokens_of(tokens: TableTokens, document: int) -> _Tokens:
    table = tokens.windows
    first_window, end_window = np.searchsorted(np.asarray(table.documents), (document, document + 1)).tolist()
    rows: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    blank: list[bool] = []
    for window in range(first_window, end_window):
        n, first = int(table.lengths[window]), int(table.chars[window])
        at = 0
        row = tokens.row_of_position[window * table.length : window * table.length + n].tolist()
        for piece, number in zip(table.pieces(window), row, strict=True):
            bare = piece.strip()
            start = at + (len(piece) - len(piece.lstrip()) if bare else 0)
            if number >= 0:
                rows.append(number)
                starts.append(first + start)
                ends.append(first + start + len(bare or piece))
                blank.append(not bare)
            at += len(piece)
    return _Tokens(
        np.array(rows, np.int64), np.array(starts, np.int64), np.array(ends, np.int64), np.array(blank, bool)
    )


def _spans(table: WindowTable, labels: Labels, corpus: Corpus | None) -> Iterator[tuple[int, list[Span]]]:
    """Documents by number, with their spans."""
    ids = table.document_ids()
    if labels.listed is not None:
        number_of = {document: i for i, document in enumerate(ids)}
        for name, spans in labels.listed.items():
            if name not in number_of:
                raise UnknownNameError(
                    f"{labels.source} has spans of the document {name!r}, which the run does not have (it "
                    f"has {ids[0]!r}, …)"
                )
            yield number_of[name], list(spans)
        return
    if corpus is None:
        raise InputError(f"{labels.source} needs the documents' text: name the run's corpus")
    edges = np.searchsorted(np.asarray(table.documents), np.arange(len(ids) + 1)).tolist()
    n_read = 0
    for number, document in enumerate(islice(corpus, len(ids))):
        text = valid_unicode(document.text)
        if not all(
            text.startswith(table.text(w), int(table.chars[w]))
            for w in range(edges[number], edges[number + 1])
        ):
            raise IncompatibleError(
                f"the document {ids[number]!r} of the corpus {corpus.name} is not the one that the run was "
                "made from: give the same corpus"
            )
        yield number, list(labels.of(ids[number], text))
        n_read += 1
    if n_read < len(ids):
        raise IncompatibleError(
            f"the corpus {corpus.name} has fewer documents than the run was made from: give the same corpus"
        )
