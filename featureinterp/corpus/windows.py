"""Documents → a table of fixed token windows on disk, which knows every token's exact text.

A window is ``length`` consecutive tokens of one document (the last of a document may be shorter, down to
``min_length``). The table holds text tokens alone: special tokens that a model wants in front (BOS) are added
when the model runs and are never part of a window. Strings of the text that look like special tokens
(``<|endoftext|>``) are encoded as the text that they are.

Pieces are exact: the pieces of a window join to the very span of the document that its tokens cover. A
character whose bytes are spread over several tokens belongs to the last of them; the others have an empty
piece.

Files of a table: ``tokens.bin`` int32 ``[n, length]`` (−1 after the end of a short window), ``ends.bin``
uint32 ``[n, length]`` (end of each token in characters of the window's text), ``lengths.bin`` int32 ``[n]``,
``documents.bin`` int32 ``[n]``, ``starts.bin`` int64 ``[n]`` (first token's index in its document),
``chars.bin`` int64 ``[n]`` (first character's place in it), ``text.bin`` UTF-8, ``spans.bin`` int64 ``[n +
1]`` (byte offsets into ``text.bin``), ``documents.jsonl``; ``windows.json`` is written last, marks it
complete and holds the checksums of the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.corpus.contents import hashes_of
from featureinterp.corpus.cut import TextEncoder
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.writing import ARRAYS, write_table
from featureinterp.errors import (
    DamagedStoreError,
    IncompatibleError,
    IncompleteStoreError,
    InputError,
)
from featureinterp.files import content_key, explained_storage, parse_json
from featureinterp.stored.arrays import mapped, read_whole, rising, within
from featureinterp.stored.sums import Sums, checked_bytes, described, read_marker, write_marker

FORMAT = 2
MARKER = "windows.json"


@dataclass(frozen=True, slots=True)
class WindowPolicy:
    """How documents become windows.

    ``length``: tokens per window. ``min_length``: a shorter rest of a document is dropped. ``max_tokens``:
    about how many tokens to take in all (None: all of them), spread evenly over the documents and, within a
    document, over its length, so that one document gives few windows. ``max_per_document``: windows of one
    document at most; None means as many as ``max_tokens`` asks for, or 8 where the number of documents is
    unknown.
    """

    length: int = 32
    min_length: int = 8
    max_tokens: int | None = None
    max_per_document: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.length <= 8192:
            raise InputError(f"a window of {self.length} tokens is not possible: choose from 2 to 8192")
        if not 1 <= self.min_length <= self.length:
            raise InputError(
                f"the shortest window ({self.min_length} tokens) must have from 1 to {self.length} tokens"
            )
        if self.max_tokens is not None and self.max_tokens < self.length:
            raise InputError(
                f"{self.max_tokens} tokens are less than one window of {self.length}: ask for more tokens"
            )
        if self.max_per_document is not None and self.max_per_document < 1:
            raise InputError(
                f"{self.max_per_document} windows per document leave nothing: ask for at least 1"
            )


@dataclass(frozen=True)
class WindowTable:
    """A complete table, memory-mapped. Shapes are in the module's docstring."""

    folder: Path
    meta: dict[str, Any]
    tokens: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    chars: np.ndarray
    spans: np.ndarray
    _bytes: np.ndarray
    _files: Mapping[str, Sums] | None = None

    @classmethod
    def open(cls, folder: Path) -> WindowTable:
        """Opens a complete table. Raises ``IncompleteStoreError`` when there is none or its writing never
        finished, and ``DamagedStoreError`` when it is not what was written; ids, ends and texts are checked
        where they are read."""
        path = folder / MARKER
        if not path.exists():
            raise IncompleteStoreError(
                f"{folder} holds no complete table of windows: run 'featureinterp collect' again"
            )
        remedy = _remedy(folder)
        marker = read_marker(path, remedy)
        meta, arrays = marker.value, {}
        with described(path, remedy):
            if meta["format"] != FORMAT:
                another = "was made by another version of featureinterp"
                raise IncompleteStoreError(f"{folder} {another}: delete {folder.parent} and collect again")
            n, length = meta["n_windows"], meta["policy"]["length"]
            _check_numbers(meta)
            shapes = {"tokens": (n, length), "ends": (n, length), "spans": (n + 1,)}
            for name, dtype in ARRAYS.items():
                shape, array = shapes.get(name, (n,)), folder / f"{name}.bin"
                if name in ("tokens", "ends"):
                    arrays[name] = mapped(
                        array, dtype, shape, marker.files, marker=MARKER, remedy=remedy, valid=_no_less
                    )
                else:
                    arrays[name] = read_whole(array, dtype, shape, marker.files, marker=MARKER, remedy=remedy)
            bytes_ = mapped(
                folder / "text.bin",
                np.uint8,
                (int(arrays["spans"][-1]),),
                marker.files,
                marker="spans.bin",
                remedy=remedy,
            )
        table = cls(folder, meta, **arrays, _bytes=bytes_, _files=marker.files)
        table._check_ranges(remedy)
        return table

    def _check_ranges(self, remedy: str) -> None:
        """What must hold of the arrays whoever wrote them."""
        folder, n = self.folder, len(self)
        within(self.lengths, 1, self.length + 1, folder / "lengths.bin", remedy)
        within(self.documents, 0, int(self.meta["n_documents"]), folder / "documents.bin", remedy)
        rising(self.documents, folder / "documents.bin", remedy)
        rising(self.spans, folder / "spans.bin", remedy, first=0)
        for name in ("starts", "chars"):
            within(getattr(self, name), 0, 2**62, folder / f"{name}.bin", remedy)
        if int(self.lengths.sum()) != self.n_tokens or n != len(self.lengths):
            raise DamagedStoreError(
                f"{folder / 'lengths.bin'} has not the {self.n_tokens:,} tokens that {MARKER} declares: "
                f"{remedy}"
            )

    def __len__(self) -> int:
        return int(self.meta["n_windows"])

    @property
    def length(self) -> int:
        """Tokens of a full window."""
        return int(self.meta["policy"]["length"])

    @property
    def n_tokens(self) -> int:
        """Tokens in all windows together."""
        return int(self.meta["n_tokens"])

    @property
    def fingerprint(self) -> str:
        """Hash of the ids, texts and documents of all windows."""
        return str(self.meta["fingerprint"])

    def text(self, row: int) -> str:
        """The text of a window."""
        data: bytes = self._bytes[self.spans[row] : self.spans[row + 1]].tobytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:  # of a table without checksums
            raise DamagedStoreError(
                f"{self.folder / 'text.bin'} is damaged: {error}; {_remedy(self.folder)}"
            ) from error

    def texts(self) -> Iterator[str]:
        """The texts of all windows, in order."""
        return map(self.text, range(len(self)))

    def pieces(self, row: int) -> tuple[str, ...]:
        """The exact text of each token; joined they are ``text(row)``."""
        text, ends = self.text(row), self.ends[row, : self.lengths[row]].tolist()
        if ends[-1] != len(text) or (self._files is None and ends != sorted(ends)):
            raise DamagedStoreError(
                f"{self.folder / 'ends.bin'} is damaged: the pieces of window {row} are not its text; "
                f"{_remedy(self.folder)}"
            )
        return tuple(text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))

    def ids(self, row: int) -> np.ndarray:
        """Token ids, int32 ``[n]`` with n the window's own length."""
        return np.asarray(self.tokens[row, : self.lengths[row]])

    @cached_property
    def contents(self) -> np.ndarray:
        """A hash of every window's tokens, uint64 ``[n]``: equal for windows of the same text."""
        return hashes_of(self.tokens)

    @property
    def notes(self) -> list[str]:
        """What a user should know of how the text was read: tokens that are missing, rows without text, files
        that were not read.
        """
        return list(self.meta.get("notes", []))

    def check(self) -> None:
        """Reads all. Raises ``DamagedStoreError`` for what is not what was written."""
        for array in (self.tokens, self.ends, self._bytes):
            np.asarray(array)
        self.document_ids()

    def document_ids(self) -> list[str]:
        """The corpus's id of every document, by its number."""
        path, remedy = self.folder / "documents.jsonl", _remedy(self.folder)
        content = checked_bytes(path, None if self._files is None else self._files.get(path.name), remedy)
        with described(path, remedy):
            names = [parse_json(line) for line in content.decode().splitlines()]
        if len(names) != self.meta["n_documents"]:
            raise DamagedStoreError(
                f"{path} names {len(names):,} documents instead of {self.meta['n_documents']:,}: {remedy}"
            )
        return names


def _no_less(values: np.ndarray) -> bool:
    """Whether ids or ends are at least −1, which stands after a short window's end."""
    return int(values.min()) >= -1


def _remedy(folder: Path) -> str:
    """What brings a damaged table back."""
    return (
        f"delete {folder} and run the same 'featureinterp collect' (or extract) again, which makes the "
        "windows anew and keeps the rest"
    )


def _check_numbers(meta: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for numbers that no table has."""
    for value in (meta["n_windows"], meta["n_tokens"], meta["n_documents"], meta["policy"]["length"]):
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is no count")


def build_windows(corpus: Corpus, encoder: TextEncoder, policy: WindowPolicy, folder: Path) -> WindowTable:
    """Cuts a corpus into windows and writes the table into ``folder``; a complete one of the same text and
    policy is reused.

    Memory is bounded by one segment of a document. Raises ``CorpusError`` when no window comes out, and
    ``IncompatibleError`` when a complete table of other windows is there: it is never replaced.
    """
    asked = {
        "format": FORMAT,
        "policy": asdict(policy),
        "tokenizer": encoder.fingerprint,
        "content": corpus.fingerprint,
    }
    key = content_key(asked)
    there = WindowTable.open(folder) if (folder / MARKER).exists() else None
    if there is not None:
        if there.meta["key"] == key:
            return there
        _check_same(there, there.meta, asked)
    target = folder if there is None else folder.with_name(f"{folder.name}.new")
    with explained_storage(target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            meta, files = write_table(corpus, encoder, policy, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    if there is not None:
        shutil.rmtree(target, ignore_errors=True)
        _check_same(there, meta, asked)
        return there
    write_marker(
        folder / MARKER,
        {"key": key, "corpus": corpus.name, "reading": dict(corpus.settings), **asked, **meta},
        files,
    )
    return WindowTable.open(folder)


def _check_same(there: WindowTable, meta: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises ``IncompatibleError`` for a table of other windows. One of an earlier version, which did not
    record its content, may be the same.
    """
    if there.fingerprint == meta["fingerprint"] and all(
        there.meta[name] == asked[name] for name in ("policy", "tokenizer")
    ):
        return
    raise IncompatibleError(
        f"{there.folder} holds windows of other text, or of another policy or tokenizer: give another "
        "folder, or start anew with --replace"
    )


def check_documents(windows: WindowTable, n_splits: int, at_least: int = 0) -> None:
    """Raises ``InputError`` when the windows are of fewer documents than splits that share none;
    ``at_least``: for so many tokens and more.
    """
    n = len(np.unique(windows.documents))
    if n >= n_splits or windows.n_tokens < at_least:
        return
    name = windows.meta["corpus"]
    raise InputError(
        f"the {windows.n_tokens:,} tokens of {name} are read as {n} document{'s' * (n != 1)}, and "
        f"{n_splits} are needed so that training and test share"
        " none: say what separates documents (--document-separator lines, blank-lines or the text between "
        "them; corpus.document_separator of a"
        " recipe), or give a folder or rows"
    )


def copy_windows(table: WindowTable, folder: Path) -> None:
    """Puts a table into another folder as well: by links where the file system has them, else as copies. The
    same one stays when it is there already; another complete one is refused with ``IncompatibleError``."""
    if folder == table.folder:
        return
    if (folder / MARKER).exists():
        _check_same(WindowTable.open(folder), table.meta, table.meta)
        return
    with explained_storage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in sorted(table.folder.iterdir(), key=lambda p: p.name == MARKER):
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
