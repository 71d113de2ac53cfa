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
``documents.jsonl``; ``windows.json`` is written last, marks it complete and holds the checksums of the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featureinterp.corpus.text import Corpus
from featureinterp.errors import CorpusError, DamagedStoreError, IncompleteStoreError, InputError
from featureinterp.files import content_key, explained_storage
from featureinterp.stored.arrays import mapped, read_whole, rising, within
from featureinterp.stored.sums import SummedFile, Sums, checked_bytes, described, read_marker, write_marker

FORMAT = 2
MARKER = "windows.json"
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
    _bytes: np.ndarray
    _files: Mapping[str, Sums] | None = None

    @classmethod
    def open(cls, folder: Path) -> WindowTable:
        """Opens a complete table. Raises ``IncompleteStoreError`` when there is none or its writing never finished, and
        ``DamagedStoreError`` when it is not what was written; ids, ends and texts are checked where they are read."""
        path = folder / MARKER
        if not path.exists():
            raise IncompleteStoreError(f"{folder} holds no complete table of windows: run 'featureinterp collect' again")
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
            for name, dtype in _ARRAYS.items():
                shape, array = shapes.get(name, (n,)), folder / f"{name}.bin"
                if name in ("tokens", "ends"):
                    arrays[name] = mapped(array, dtype, shape, marker.files, marker=MARKER, remedy=remedy, valid=_no_less)
                else:
                    arrays[name] = read_whole(array, dtype, shape, marker.files, marker=MARKER, remedy=remedy)
            bytes_ = mapped(folder / "text.bin", np.uint8, (int(arrays["spans"][-1]),), marker.files, marker="spans.bin", remedy=remedy)
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
            raise DamagedStoreError(f"{folder / 'lengths.bin'} has not the {self.n_tokens:,} tokens that {MARKER} declares: {remedy}")

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
            raise DamagedStoreError(f"{self.folder / 'text.bin'} is damaged: {error}; {_remedy(self.folder)}") from error

    def texts(self) -> Iterator[str]:
        """The texts of all windows, in order."""
        return map(self.text, range(len(self)))

    def pieces(self, row: int) -> tuple[str, ...]:
        """The exact text of each token; joined they are ``text(row)``."""
        text, ends = self.text(row), self.ends[row, : self.lengths[row]].tolist()
        if ends[-1] != len(text) or (self._files is None and ends != sorted(ends)):
            raise DamagedStoreError(f"{self.folder / 'ends.bin'} is damaged: the pieces of window {row} are not its text; {_remedy(self.folder)}")
        return tuple(text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))

    def ids(self, row: int) -> np.ndarray:
        """Token ids, int32 ``[n]`` with n the window's own length."""
        return np.asarray(self.tokens[row, : self.lengths[row]])

    def document_ids(self) -> list[str]:
        """The corpus's id of every document, by its number."""
        path, remedy = self.folder / "documents.jsonl", _remedy(self.folder)
        content = checked_bytes(path, None if self._files is None else self._files.get(path.name), remedy)
        with described(path, remedy):
            names = [json.loads(line) for line in content.decode().splitlines()]
        if len(names) != self.meta["n_documents"]:
            raise DamagedStoreError(f"{path} names {len(names):,} documents instead of {self.meta['n_documents']:,}: {remedy}")
        return names


def _no_less(values: np.ndarray) -> bool:
    """Whether ids or ends are at least −1, which stands after a short window's end."""
    return int(values.min()) >= -1


def _remedy(folder: Path) -> str:
    """What brings a damaged table back."""
    return f"delete {folder} and run the same 'featureinterp collect' (or extract) again, which makes the windows anew and keeps the rest"


def _check_numbers(meta: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for numbers that no table has."""
    for value in (meta["n_windows"], meta["n_tokens"], meta["n_documents"], meta["policy"]["length"]):
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is no count")


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
    if (folder / MARKER).exists():
        with suppress(IncompleteStoreError):  # a table of another version is made anew
            table = WindowTable.open(folder)
            if table.meta["key"] == key:
                return table
    with explained_storage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            meta, files = _write(corpus, encoder, policy, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    write_marker(folder / MARKER, {"key": key, **request, **meta}, files)
    return WindowTable.open(folder)


def copy_windows(table: WindowTable, folder: Path) -> None:
    """Puts a table into another folder as well: by links where the file system has them, else as copies. One that is there already stays."""
    if folder == table.folder:
        return
    if (folder / MARKER).exists() and WindowTable.open(folder).meta["key"] == table.meta["key"]:
        return
    with explained_storage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in sorted(table.folder.iterdir(), key=lambda p: p.name == MARKER):
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


def _write(corpus: Corpus, encoder: TextEncoder, policy: WindowPolicy, folder: Path) -> tuple[dict[str, Any], dict[str, Sums]]:
    digest = hashlib.sha256()
    n_windows = n_tokens = n_documents = span = 0
    with ExitStack() as stack:
        paths = [*(f"{name}.bin" for name in _ARRAYS), "text.bin", "documents.jsonl"]
        files = {name: SummedFile(stack.enter_context((folder / name).open("wb"))) for name in paths}

        def put(name: str, value: Any) -> None:
            files[f"{name}.bin"].write(np.asarray(value, _ARRAYS[name]).tobytes())

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
                files["text.bin"].write(data)
                digest.update(ids.tobytes() + data + n_documents.to_bytes(8, "little"))
                n_windows += 1
                n_tokens += len(cut.ids)
            files["documents.jsonl"].write((json.dumps(document.id) + "\n").encode())
            n_documents += 1
    if not n_windows:
        raise CorpusError(f"the corpus {corpus.name} gives no window of at least {policy.min_length} tokens: is it empty?")
    meta = {"n_windows": n_windows, "n_tokens": n_tokens, "n_documents": n_documents, "fingerprint": digest.hexdigest()}
    return meta, {name: file.sums for name, file in files.items()}


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
