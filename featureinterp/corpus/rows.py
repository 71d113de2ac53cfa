"""Texts in files of rows: JSON lines, JSON, CSV, TSV, parquet and Arrow, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from featureinterp.errors import CorpusError
from featureinterp.files import UnparsedError, explained_storage, parse_json

MAX_DOCUMENT_BYTES = 512 * 2**20
_COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
    ".jl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
READABLE = (
    "text (.txt, .md), JSON lines (.jsonl), JSON, CSV, TSV, parquet or Arrow, all but the last two "
    "also as .gz, .bz2 or .xz"
)
RIGHT_FIELD = "name the right one with --text-field (corpus.text_field of a recipe)"
Numbered = tuple[int, str | None]
"""The number of a row in its file, and its text; None where the row has none."""


@dataclass(slots=True)
class Tally:
    """What reading a corpus left out. ``n_null``: rows whose text is null."""

    n_null: int = 0


def kind_of(path: Path) -> str | None:
    """text, jsonl, json, csv, parquet or arrow by a file's name; None for other names."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind in ("parquet", "arrow") else kind
    return _KINDS.get(suffixes[-1]) if suffixes else None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where its name says so. What goes wrong is a ``StorageError``, or a
    ``CorpusError`` when it is damaged.
    """
    how = _COMPRESSED.get(path.suffix.lower())
    with explained_storage(path):
        try:
            with how(path) if how else path.open("rb") as stream:
                yield stream
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the system; those of the decompressors have no number
            raise CorpusError(
                f"{path} is damaged, or is not compressed as its name says ({error}): fetch it again"
            ) from error


def decode_utf8(data: bytes, where: str) -> str:
    """UTF-8 text of ``data``, without a byte-order mark. Raises ``CorpusError`` for binary or otherwise
    encoded data.
    """
    if b"\x00" in data[:4096] and data.count(b"\x00") > len(data) // 100:
        raise CorpusError(f"{where} is binary, not text: give {READABLE}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): convert it, "
            "for example with iconv -t utf-8"
        ) from error


def bounded(stream: IO[bytes], path: Path) -> bytes:
    """All of a stream. Raises ``CorpusError`` when that is more than one document may have."""
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"{path} has more bytes than are read at once ({MAX_DOCUMENT_BYTES:,}): give it as JSONL or "
            "parquet"
        )
    return data


def read_rows(path: Path, field: str) -> Iterator[Numbered]:
    """The texts of a file of rows. Raises ``CorpusError`` when it is not what its name says, or lacks the
    field.
    """
    match kind_of(path):
        case "jsonl":
            return _jsonl(path, field)
        case "json":
            return _json(path, field)
        case "csv":
            return _csv(path, field)
        case "parquet":
            return _parquet(path, field)
        case "arrow":
            return _arrow(path, field)
    raise CorpusError(f"{path} is no file of rows: give {READABLE}")


def _listed(names: Iterable[Any]) -> str:
    """Names for a message, bounded: they come from the file."""
    shown = [str(name)[:40] for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def lacks(where: str, field: str, have: Iterable[Any]) -> CorpusError:
    """What a user reads when the text is not where it was looked for."""
    return CorpusError(f"{where} has no text in the field {field!r} (it has: {_listed(have)}): {RIGHT_FIELD}")


def parsed(text: str, where: str) -> Any:
    """JSON. Raises ``CorpusError`` for what is none, is nested too deeply, or holds a number of thousands of
    digits.
    """
    try:
        return parse_json(text)
    except UnparsedError as error:
        raise CorpusError(f"{where} {error.says}") from error


def _text_in(row: Any, field: str, where: str) -> str | None:
    """The text of an object; None where it is null."""
    if not isinstance(row, dict):
        raise lacks(where, field, [type(row).__name__])
    text = row.get(field, 0)
    if text is not None and not isinstance(text, str):
        raise lacks(where, field, sorted(row))
    return text


def _jsonl(path: Path, field: str) -> Iterator[Numbered]:
    with opened(path) as lines:
        number = 0
        while line := lines.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            where = f"line {number} of {path}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise CorpusError(
                    f"{where} has more bytes than one document may have ({MAX_DOCUMENT_BYTES:,}): cut it "
                    "into several"
                )
            if line.strip():
                yield number, _text_in(parsed(decode_utf8(line, where), where), field, where)


def _json(path: Path, field: str) -> Iterator[Numbered]:
    """One document of JSON: an array of objects or texts, an object with a column of texts or with one array
    of objects, or a single object. Lines of objects are read as JSON lines."""
    with opened(path) as stream:
        first = b"\n"
        while first and not first.strip():
            first = stream.readline(MAX_DOCUMENT_BYTES)
        if _is_row(first, field):
            yield from _jsonl(path, field)
            return
        stream.seek(0)
        found = parsed(decode_utf8(bounded(stream, path), str(path)), str(path))
    if isinstance(found, dict):
        arrays = [
            value
            for value in found.values()
            if isinstance(value, list) and all(isinstance(row, dict) for row in value)
        ]
        if isinstance(found.get(field), list):
            found = found[field]
        elif field not in found and len(arrays) == 1:
            found = arrays[0]
        else:
            found = [found]
    if not isinstance(found, list):
        raise lacks(str(path), field, [type(found).__name__])
    for number, row in enumerate(found):
        yield (
            number,
            row if isinstance(row, str) or row is None else _text_in(row, field, f"entry {number} of {path}"),
        )


def _is_row(line: bytes, field: str) -> bool:
    """Whether a line alone is an object with text."""
    try:
        row = parse_json(line)
    except UnparsedError:
        return False
    return isinstance(row, dict) and isinstance(row.get(field), str | None) and field in row


def _csv(path: Path, field: str) -> Iterator[Numbered]:
    """Rows under a header. A column is looked for between commas, semicolons and tabs."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    with opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            header = text.readline(1 << 20)
            delimiter, names = _columns(
                header, field, ("\t",) if ".tsv" in path.name.lower() else (",", ";", "\t")
            )
            if field not in names:
                raise lacks(str(path), field, names)
            if names.count(field) > 1:
                raise CorpusError(
                    f"{path} has {names.count(field)} columns named {field!r}: rename the others"
                )
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            column = names.index(field)
            for number, row in enumerate(rows, 1):
                if row and len(row) != len(names):
                    raise CorpusError(
                        f"row {number} of {path} has {len(row)} columns under a header of {len(names)}: "
                        "put texts with separators in quotes, or give JSONL"
                    )
                if row:
                    yield number, row[column]
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}): convert it, for example "
                "with iconv -t utf-8"
            ) from error
        except csv.Error as error:
            raise CorpusError(
                f"{path} is not CSV as its name says ({error}): write it again, or give it as JSONL"
            ) from error


def _columns(header: str, field: str, delimiters: tuple[str, ...]) -> tuple[str, list[str]]:
    """(delimiter, names of the columns): the delimiter that has the field among its columns, else the
    first.
    """
    found = [
        (delimiter, next(csv.reader([header], delimiter=delimiter, strict=True), []))
        for delimiter in delimiters
    ]
    return next((pair for pair in found if field in pair[1]), found[0])


def _parquet(path: Path, field: str) -> Iterator[Numbered]:
    file = parquet_file(path, field)
    with _arrow_errors(path, "a parquet file"):
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in _texts(batch.column(0), path):
                yield number, text
                number += 1


def parquet_file(path: Path, field: str) -> Any:
    """An open parquet file whose column ``field`` holds text."""
    import pyarrow.parquet as pq

    with _arrow_errors(path, "a parquet file"):
        file = pq.ParquetFile(path)
    _check_column(path, file.schema_arrow, field)
    return file


def _arrow(path: Path, field: str) -> Iterator[Numbered]:
    """An Arrow file or stream."""
    import pyarrow as pa

    with _arrow_errors(path, "an Arrow file"), pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        _check_column(path, reader.schema, field)
        number = 0
        for batch in batches:
            for text in _texts(batch.column(field), path):
                yield number, text
                number += 1


@contextmanager
def _arrow_errors(path: Path, what: str) -> Iterator[None]:
    import pyarrow as pa

    with explained_storage(path):
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if (
                isinstance(error, OSError) and error.errno is not None
            ):  # of the system; the library's own have no number
                raise
            raise CorpusError(
                f"{path} is not {what}, or is damaged ({str(error).splitlines()[0]}): fetch or write it again"
            ) from error


def _check_column(path: Path, schema: Any, field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise CorpusError(f"{path} has no column {field!r} (it has: {_listed(schema.names)}): {RIGHT_FIELD}")
    kind = schema.field(field).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)):
        raise CorpusError(f"the column {field!r} of {path} holds {kind}, not text: {RIGHT_FIELD}")


def _texts(column: Any, path: Path) -> list[str | None]:
    """A column's texts. Bytes that are not UTF-8 are no text."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} holds text that is not UTF-8 (byte 0x{error.object[error.start]:02x}): write it again"
        ) from error
