"""Documents in one plain text: parts between separators, lines, or passages of paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from featureinterp.errors import InputError

PASSAGE_CHARS = 4000
LEAST_DOCUMENTS = 3
"""So many documents are needed for training, validation and test windows of one feature."""
LINES, BLANK_LINES, NONE = "lines", "blank-lines", "none"
END_OF_TEXT = "<|endoftext|>"

_END = r"(?:\r\n|\r(?!\n)|\n)"
_LINE_END = re.compile(_END)
_BLANK_LINE = re.compile(rf"{_END}[ \t]*{_END}\s*")
_MARKED = re.compile(
    rf"(?:\A|[\r\n])[ \t]*{re.escape(END_OF_TEXT)}|{re.escape(END_OF_TEXT)}[ \t]*(?:[\r\n]|\Z)"
)


def parts_of(text: str, separator: str | None, *, whole: bool = False) -> Iterator[str]:
    """The documents of a plain text.

    ``separator``: ``lines`` (every line), ``blank-lines`` (passages, see :func:`passages`), ``none`` (all of
    it), or the text between documents, in which ``\\n``, ``\\r`` and ``\\t`` stand for line ends and tabs.
    None: between ``<|endoftext|>`` where the text has that at the edge of a line; else all of it where
    ``whole``; else passages.
    """
    if separator is None and _MARKED.search(text):
        separator = END_OF_TEXT
    match separator:
        case None if whole:
            yield text
        case None:
            yield from passages(text)
        case "lines":
            yield from (line for line in _LINE_END.split(text) if line.strip())
        case "blank-lines":
            yield from _cut(text, _BLANK_LINE, PASSAGE_CHARS)
        case "none":
            yield text
        case _:
            yield from (part for part in _between(separator).split(text) if part.strip())


def check_separator(separator: str | None) -> None:
    """Raises ``InputError`` for one that can separate nothing."""
    if separator is not None and not _plain(separator).strip(" \t"):
        raise InputError(
            f"documents cannot be separated by {separator!r}: give 'lines', 'blank-lines', 'none', or the "
            "text between them"
        )


def passages(text: str, size: int = PASSAGE_CHARS) -> Iterator[str]:
    """Cuts a text at blank lines into passages of at least ``size`` characters (the last may be shorter); a
    text that is long and has hardly any blank lines is cut at line ends instead. Lines may end in LF, CRLF or
    CR. Joining the passages gives the text back, character for character."""
    found = list(_cut(text, _BLANK_LINE, size))
    if len(found) < LEAST_DOCUMENTS and len(text) >= 2 * size:
        found = max(found, list(_cut(text, _LINE_END, size)), key=len)
    yield from found


def _cut(text: str, gap: re.Pattern[str], size: int) -> Iterator[str]:
    start = 0
    for match in gap.finditer(text):
        if match.end() - start >= size:
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]


def _plain(separator: str) -> str:
    return separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def _between(separator: str) -> re.Pattern[str]:
    """The separator with what is left of its line; a line end in it is any line end."""
    words = [re.escape(part) for part in _LINE_END.split(_plain(separator))]
    return re.compile(_END.join(words) + rf"(?:[ \t]*{_END})?")
