"""Labelled spans of documents, and where they come from: a JSONL file, regular expressions, a Python
function.

Spans are in characters of the document's text, from ``start`` to before ``end``.
"""

from __future__ import annotations

import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from featureinterp.corpus.rows import decode_utf8
from featureinterp.errors import InputError, UnknownNameError
from featureinterp.files import UnparsedError, explained_storage, parse_json, parse_toml, valid_unicode


@dataclass(frozen=True, slots=True)
class Span:
    """``label`` from ``start`` to before ``end``. Spans of a document with the same label and ``instance``
    are parts of one; None: an instance of its own.
    """

    start: int
    end: int
    label: str
    instance: str | None = None


Marker = Callable[[str], Iterable[Any]]
"""A document's text → spans: :class:`Span`, or tuples (start, end, label) and (start, end, label, instance).
"""


@dataclass(frozen=True)
class Labels:
    """A set of labels. ``names``: those that are known beforehand. Either ``listed`` (document id → spans),
    or ``mark``, which needs the documents' text.
    """

    names: tuple[str, ...]
    source: str
    listed: Mapping[str, tuple[Span, ...]] | None = None
    mark: Marker | None = None

    def of(self, document: str, text: str) -> Iterator[Span]:
        """The spans of one document. Raises ``InputError`` for one that lies outside the text or has no
        label.
        """
        if self.listed is not None:
            yield from self.listed.get(document, ())
            return
        assert self.mark is not None
        spans = self.mark(text)
        if not isinstance(spans, Iterable):
            raise InputError(
                f"{self.source} gives {spans!r} instead of spans: give a list, which may be empty"
            )
        for found in spans:
            span = found if isinstance(found, Span) else _span_of(found, self.source)
            if not 0 <= span.start <= span.end <= len(text):
                raise InputError(
                    f"{self.source} gives a span from {span.start} to {span.end} in the document "
                    f"{document!r} of {len(text)} characters"
                )
            if span.end > span.start:
                yield span


def _span_of(found: Any, source: str) -> Span:
    try:
        start, end, label, *rest = found
        place = operator.index(start), operator.index(end)
        return Span(*place, valid_unicode(str(label)), None if not rest or rest[0] is None else str(rest[0]))
    except (TypeError, ValueError) as error:
        raise InputError(f"{source} gives {found!r}, which is no span: give (start, end, label)") from error


def load_labels(source: str | Path | Mapping[str, str] | Marker | None) -> Labels:
    """Labels from what a user names.

    ``source``: None or ``ready`` (the concepts that ship, :func:`ready_labels`); names of those, separated by
    commas; a ``.jsonl`` file with one span per line (``document``, ``start``, ``end``, ``label`` and perhaps
    ``instance``); a ``.toml`` file or a mapping with a regular expression per label; or a function of a
    document's text. Raises ``UnknownNameError`` and ``InputError``.
    """
    if source is None or source == "ready":
        return ready_labels()
    if isinstance(source, Mapping):
        return pattern_labels(source, "the mapping")
    if callable(source):
        return Labels((), getattr(source, "__name__", "the function"), mark=source)
    path = Path(source)
    if path.suffix == ".toml" and path.exists():
        return _toml(path)
    if path.suffix in (".jsonl", ".ndjson") and path.exists():
        return _jsonl(path)
    known, names = ready_labels(), [name.strip() for name in str(source).split(",")]
    if unknown := [name for name in names if name not in known.names]:
        choice = ", ".join(known.names)
        raise UnknownNameError(
            f"there are no labels {unknown[0]!r}: give a .jsonl or .toml file that exists, or names among "
            f"{choice}"
        )
    return _ready(names)


def ready_labels() -> Labels:
    """Concepts that are computed from English text: years, numbers, months, money, names, quotations,
    sentence starts, negation, function words.
    """
    return _ready(None)


def _ready(names: Iterable[str] | None) -> Labels:
    table = tomllib.loads(
        (resources.files("featureinterp.probing") / "concepts.toml").read_text(encoding="utf-8")
    )
    return pattern_labels(
        {name: table[name]["pattern"] for name in (table if names is None else names)}, "the ready labels"
    )


def pattern_labels(patterns: Mapping[str, str], source: str) -> Labels:
    """A label per regular expression; where it has a group ``x``, that group is the span. ``^`` and ``$`` are
    the ends of lines.
    """
    compiled = {}
    for name, pattern in patterns.items():
        try:
            compiled[name] = re.compile(pattern, re.MULTILINE)
        except (re.error, TypeError) as error:
            raise InputError(
                f"the pattern of {name!r} in {source} is no regular expression ({error})"
            ) from error

    def mark(text: str) -> Iterator[Span]:
        for name, pattern in compiled.items():
            group = "x" if "x" in pattern.groupindex else 0
            for match in pattern.finditer(text):
                if match.start(group) >= 0:
                    yield Span(match.start(group), match.end(group), name)

    return Labels(tuple(compiled), source, mark=mark)


def _toml(path: Path) -> Labels:
    with explained_storage(path):
        text = decode_utf8(path.read_bytes(), str(path))
    try:
        table = parse_toml(text)
    except UnparsedError as error:
        raise InputError(f"{path} {error.says}") from error
    patterns: dict[str, Any] = {
        name: value.get("pattern") if isinstance(value, dict) else value for name, value in table.items()
    }
    if not patterns:
        raise InputError(f"{path} holds no label: write name = 'regular expression', one per line")
    return pattern_labels(patterns, str(path))


def _jsonl(path: Path) -> Labels:
    listed: dict[str, list[Span]] = {}
    names: dict[str, None] = {}
    with explained_storage(path), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"line {number} of {path}"
            if not line.strip():
                continue
            try:
                row = parse_json(decode_utf8(line, where))
            except UnparsedError as error:
                raise InputError(f"{where} {error.says}; each line must be one object") from error
            span = _listed(row, where)
            listed.setdefault(row["document"], []).append(span)
            names[span.label] = None
    if not listed:
        raise InputError(f"{path} holds no span")
    return Labels(
        tuple(names), str(path), listed={document: tuple(spans) for document, spans in listed.items()}
    )


def _listed(row: Any, where: str) -> Span:
    fields = {"document": str, "start": int, "end": int, "label": str}
    for name, kind in fields.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(
                f"{where} has no {name!r} that is {'text' if kind is str else 'a whole number'}: write "
                "document, start, end and label"
            )
    if not 0 <= row["start"] < row["end"]:
        raise InputError(
            f"{where} has a span from {row['start']} to {row['end']}: it must have at least one character"
        )
    instance = row.get("instance")
    return Span(
        row["start"], row["end"], valid_unicode(row["label"]), None if instance is None else str(instance)
    )
