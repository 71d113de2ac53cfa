"""Documents → a table of fixed token windows on disk, which knows every token's exact text.

A window is ``length`` consecutive tokens of one document (the last of a document may be shorter, down to
``min_length``). The table holds text tokens alone: special tokens that a model wants in front (BOS) are added when the
model runs and are never part of a window. Strings of the text that look like special tokens (``<|endoftext|>``) are
encoded as the text that they are.

Pieces are exact: the pieces of a window join to the very span of the document that its tokens cover. A character whose
bytes are spread over several tokens belongs to the last of them; the others have an empty piece.

Files of a table: ``tokens.bin`` int32 ``[n, length]`` (−1 after the end of a short window), ``ends.bin`` uint32
``[n, length]`` (end of each token in characters of the window's text), ``lengths.bin`` int32 ``[n]``, ``documents.bin``
int32 ``[n]``, ``starts.bin`` int64 ``[n]`` (first token's index in its document), ``chars.bin`` int64 ``[n]`` (first
character's place in it), ``text.bin`` UTF-8, ``spans.bin`` int64 ``[n + 1]`` (byte offsets into ``text.bin``),
``documents.jsonl``; ``windows.json`` is written last and marks it complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featureinterp.corpus.text import Corpus
from featureinterp.errors import CorpusError, IncompleteStoreError, InputError
from featureinterp.files import content_key, explained_storage, write_json

FORMAT = 2
SEGMENT_CHARS = 100_000
STREAMED_WINDOWS_PER_DOCUMENT = 8
_ARRAYS = {"tokens": np.int32, "ends": np.uint32, "lengths": np.int32, "documents": np.int32, "starts": np.int64, "chars": np.int64, "spans": np.int64}


class Encoding(Protocol):
    """What is needed of a tokenizer's result for one text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class TextEncoder(Protocol):
    """Text → token ids with the character span of each; never yields special tokens."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes when the same text would be encoded otherwise."""
        ...

    def encode(self, texts: Sequence[str]) -> Sequence[Encoding]:
        """One encoding per text."""
        ...


@dataclass(frozen=True, slots=True)
class WindowPolicy:
    """How documents become windows.

    ``length``: tokens per window. ``min_length``: a shorter rest of a document is dropped. ``max_tokens``: about how many
    tokens to take in all (None: all of them), spread evenly over the documents and, within a document, over its length, so
    that one document gives few windows. ``max_per_document``: windows of one document at most; None means as many as
    ``max_tokens`` asks for, or 8 where the number of documents is unknown.
    """

    length: int = 32
    min_length: int = 8
    max_tokens: int | None = None
    max_per_document: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.length <= 8192:
            raise InputError(f"a window of {self.length} tokens is not possible: choose from 2 to 8192")
        if not 1 <= self.min_length <= self.length:
            raise InputError(f"the shortest window ({self.min_length} tokens) must have from 1 to {self.length} tokens")
        if self.max_tokens is not None and self.max_tokens < self.length:
            raise InputError(f"{self.max_tokens} tokens are less than one window of {self.length}: ask for more tokens")
        if self.max_per_document is not None and self.max_per_document < 1:
            raise InputError(f"{self.max_per_document} windows per document leave nothing: ask for at least 1")


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

    @classmethod
    def open(cls, folder: Path) -> WindowTable:
        """Opens a complete table. Raises ``IncompleteStoreError`` when there is none or its writing never finished."""
        marker = folder / "windows.json"
        if not marker.exists():
            raise IncompleteStoreError(f"{folder} holds no complete table of windows: run 'featureinterp collect' again")
        with explained_storage(folder):
            meta = json.loads(marker.read_text())
            if meta["format"] != FORMAT:
                raise IncompleteStoreError(f"{folder} was made by another version of featureinterp: delete {folder.parent} and collect again")
            n, length = meta["n_windows"], meta["policy"]["length"]
            shapes = {"tokens": (n, length), "ends": (n, length), "spans": (n + 1,)}
            arrays: dict[str, np.ndarray] = {}
            for name, dtype in _ARRAYS.items():
                shape = shapes.get(name, (n,))
                path = folder / f"{name}.bin"
                if path.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
                    raise IncompleteStoreError(f"{path} has not the size that windows.json declares: delete {folder} and collect again")
                arrays[name] = np.asarray(np.memmap(path, dtype, "r", shape=shape))
        return cls(folder, meta, **arrays)

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

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.asarray(np.memmap(self.folder / "text.bin", np.uint8, "r")) if self.spans[-1] else np.zeros(0, np.uint8)

    def text(self, row: int) -> str:
        """The text of a window."""
        return self._bytes[self.spans[row] : self.spans[row + 1]].tobytes().decode()

    def texts(self) -> Iterator[str]:
        """The texts of all windows, in order."""
        sizes = np.diff(self.spans)
        with (self.folder / "text.bin").open("rb") as file:
            for size in sizes:
                yield file.read(int(size)).decode()

    def pieces(self, row: int) -> tuple[str, ...]:
        """The exact text of each token; joined they are ``text(row)``."""
        text, ends = self.text(row), self.ends[row, : self.lengths[row]].tolist()
        return tuple(text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))

    def ids(self, row: int) -> np.ndarray:
        """Token ids, int32 ``[n]`` with n the window's own length."""
        return np.asarray(self.tokens[row, : self.lengths[row]])

    def document_ids(self) -> list[str]:
        """The corpus's id of every document, by its number."""
        return [json.loads(line) for line in (self.folder / "documents.jsonl").read_text().splitlines()]


def piece_ends(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The end of every token's piece, in characters: int64 ``[n]``, never falling, the last one at the end of the text.

    What lies between two tokens' spans (white space that a tokenizer trims) goes to the later one; of tokens that share a
    character, the last gets it.
    """
    if not offsets:
        return np.zeros(0, np.int64)
    spans = np.asarray(offsets, np.int64)
    edges = np.append(np.minimum(spans[:-1, 1], spans[1:, 0]), len(text))
    return np.minimum.accumulate(edges[::-1])[::-1]


def build_windows(corpus: Corpus, encoder: TextEncoder, policy: WindowPolicy, folder: Path) -> WindowTable:
    """Cuts a corpus into windows and writes the table into ``folder``; a complete one for the same request is reused.

    Memory is bounded by one segment of a document. Raises ``CorpusError`` when no window comes out.
    """
    request = {"format": FORMAT, "corpus": corpus.name, "policy": asdict(policy), "tokenizer": encoder.fingerprint}
    key = content_key(request)
    if (folder / "windows.json").exists():
        with suppress(IncompleteStoreError):  # a table of another version is made anew
            table = WindowTable.open(folder)
            if table.meta["key"] == key:
                return table
    with explained_storage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            meta = _write(corpus, encoder, policy, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    write_json(folder / "windows.json", {"key": key, **request, **meta})
    return WindowTable.open(folder)


def copy_windows(table: WindowTable, folder: Path) -> None:
    """Puts a table into another folder as well: by links where the file system has them, else as copies. One that is there already stays."""
    if folder == table.folder:
        return
    if (folder / "windows.json").exists() and WindowTable.open(folder).meta["key"] == table.meta["key"]:
        return
    with explained_storage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in sorted(table.folder.iterdir(), key=lambda p: p.name == "windows.json"):
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True, slots=True)
class _Cut:
    start: int
    char: int
    ids: list[int]
    text: str
    ends: np.ndarray


def _write(corpus: Corpus, encoder: TextEncoder, policy: WindowPolicy, folder: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    n_windows = n_tokens = n_documents = span = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _ARRAYS}
        text_file = stack.enter_context((folder / "text.bin").open("wb"))
        names = stack.enter_context((folder / "documents.jsonl").open("w"))

        def put(name: str, value: Any) -> None:
            files[name].write(np.asarray(value, _ARRAYS[name]).tobytes())

        put("spans", 0)
        for document in corpus:
            if policy.max_tokens is not None and n_tokens >= policy.max_tokens:
                break
            quota = _quota(policy, corpus.n_documents, n_documents, n_tokens)
            for cut in _cuts(document.text, encoder, policy, quota):
                pad = policy.length - len(cut.ids)
                data = cut.text.encode()
                span += len(data)
                ids = np.pad(np.asarray(cut.ids, np.int32), (0, pad), constant_values=-1)
                put("tokens", ids)
                put("ends", np.pad(cut.ends, (0, pad), mode="edge"))
                put("lengths", len(cut.ids))
                put("documents", n_documents)
                put("starts", cut.start)
                put("chars", cut.char)
                put("spans", span)
                text_file.write(data)
                digest.update(ids.tobytes() + data + n_documents.to_bytes(8, "little"))
                n_windows += 1
                n_tokens += len(cut.ids)
            names.write(json.dumps(document.id) + "\n")
            n_documents += 1
    if not n_windows:
        raise CorpusError(f"the corpus {corpus.name} gives no window of at least {policy.min_length} tokens: is it empty?")
    return {"n_windows": n_windows, "n_tokens": n_tokens, "n_documents": n_documents, "fingerprint": digest.hexdigest()}


def _quota(policy: WindowPolicy, n_documents: int | None, done: int, taken: int) -> int | None:
    """How many windows the next document may give; None: all of them. What short documents left over goes to later ones."""
    if policy.max_tokens is None:
        return policy.max_per_document
    if n_documents is None:
        left = math.ceil((policy.max_tokens - taken) / policy.length)
        return min(policy.max_per_document or STREAMED_WINDOWS_PER_DOCUMENT, left)
    due = policy.max_tokens * (done + 1) / n_documents - taken
    quota = max(0, round(due / policy.length))
    return quota if policy.max_per_document is None else min(quota, policy.max_per_document)


def _cuts(text: str, encoder: TextEncoder, policy: WindowPolicy, quota: int | None) -> Iterator[_Cut]:
    """The chosen windows of a document: all of them, or ``quota`` of them spread evenly over it."""
    if quota == 0:
        return
    segments = list(_segments(valid_unicode(text)))
    first = taken = char = 0
    for number, segment in enumerate(segments, 1):
        encoding = encoder.encode([segment])[0]
        available = _n_windows(len(encoding.ids), policy)
        take = available if quota is None else min(available, round(quota * number / len(segments)) - taken)
        yield from _windows_of(segment, encoding, first, char, _spread(available, take), policy)
        first += len(encoding.ids)
        char += len(segment)
        taken += take


def _spread(available: int, take: int) -> list[int]:
    """``take`` of ``range(available)``, evenly spaced."""
    return [(2 * j + 1) * available // (2 * take) for j in range(take)]


def _n_windows(n_tokens: int, policy: WindowPolicy) -> int:
    full, rest = divmod(n_tokens, policy.length)
    return full + (rest >= policy.min_length)


def _windows_of(text: str, encoding: Encoding, start: int, char: int, chosen: Sequence[int], policy: WindowPolicy) -> Iterator[_Cut]:
    if not chosen:
        return
    ends = piece_ends(text, encoding.offsets)
    for k in chosen:
        a, b = k * policy.length, min((k + 1) * policy.length, len(encoding.ids))
        left = int(ends[a - 1]) if a else 0
        yield _Cut(start + a, char + left, encoding.ids[a:b], text[left : int(ends[b - 1])], ends[a:b] - left)


def _segments(text: str) -> Iterator[str]:
    """A text in parts of about ``SEGMENT_CHARS``, cut before white space where there is any, so that memory stays bounded."""
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        cut = start + SEGMENT_CHARS
        space = max(text.rfind(" ", start + 1, cut), text.rfind("\n", start + 1, cut))
        cut = space if space > start + SEGMENT_CHARS // 2 else cut
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def valid_unicode(text: str) -> str:
    """The text with lone surrogates (which JSON can carry and UTF-8 cannot) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
