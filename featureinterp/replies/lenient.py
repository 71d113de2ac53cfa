"""JSON with small errors that leave no doubt about what is meant: another kind of quotation marks, line
breaks within a text, a comma too many, names without quotation marks, Python's constants, an end that is
missing. Whatever else is wrong is refused, and nothing is left out.
"""

from __future__ import annotations

import re
from typing import Any

from featureinterp.files import valid_unicode
from featureinterp.replies.strict import UnreadableError

_MAX_DEPTH = 20
_CLOSING = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_NUMBER = re.compile(r"-?\d{1,18}(?:\.\d{1,18})?(?=\s*[,}\]])")
_WORD = re.compile(r"[A-Za-z_]\w{0,60}")
_TEXT_OR_BRACKET = re.compile(r'"(?:\\.|[^"\\])*"|[\[\]{}]', re.DOTALL)
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_UNIT = re.compile(r"\\u([0-9a-fA-F]{4})")
_CUT_ESCAPE = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")
"""What is left of an escape where the text ends within it."""


def parse_lenient(text: str, start: int, end: int) -> tuple[Any, int, bool]:
    """The value that begins at ``start``, where it ends, and whether the text ends (at ``end``) before it
    does. Raises ``UnreadableError``.
    """
    reader = _Reader(text[start:end].rstrip())
    value = reader.value(0)
    return value, start + reader.at, reader.cut


def balanced_end(text: str, start: int, end: int) -> int:
    """Where the bracket at ``start`` is closed, counting those outside of quotation marks; ``end`` where it
    is not.
    """
    depth = 0
    for found in _TEXT_OR_BRACKET.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return end


class _Reader:
    """Reads from the front. ``cut``: the text ended before the value did."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.cut = text, 0, False

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise UnreadableError("its brackets are nested too deeply")
        first = self._next()
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._list(depth)
        if first in _CLOSING:
            return self._string(",}]")
        if number := _NUMBER.match(self.text, self.at):
            self.at = number.end()
            return float(number[0]) if "." in number[0] else int(number[0])
        word = _WORD.match(self.text, self.at)
        if word is None or word[0] not in _CONSTANTS:
            raise self._odd()
        self.at = word.end()
        return _CONSTANTS[word[0]]

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        while self._next() != "}":
            if self.cut:
                return found
            key = self._key()
            if self.cut:  # a name without a value says nothing
                return found
            value = self.value(depth + 1)
            if key in found and found[key] != value:
                raise UnreadableError(f"it says {key[:40]!r} twice")
            found[key] = value
            self._comma("}")
        self.at += 1
        return found

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        while self._next() != "]":
            if self.cut:
                return found
            found.append(self.value(depth + 1))
            self._comma("]")
        self.at += 1
        return found

    def _key(self) -> str:
        word = _WORD.match(self.text, self.at)
        if word is not None:
            self.at = word.end()
        key = word[0] if word is not None else self._string(":")
        if self._next() != ":" and not self.cut:
            raise self._odd()
        self.at += 1
        self._next()
        return key

    def _comma(self, closing: str) -> None:
        found = self._next()
        if found == ",":
            self.at += 1
        elif found != closing and not self.cut:
            raise self._odd()

    def _next(self) -> str:
        """The next character that is no white space, where the reader then stands."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        self.cut = self.at >= len(self.text)
        return self.text[self.at : self.at + 1]

    def _string(self, behind: str) -> str:
        """A text up to its quotation mark, behind which one of ``behind`` has to stand, or nothing."""
        opening = self._next()
        if opening not in _CLOSING:
            raise self._odd()
        closing, out = _CLOSING[opening], []
        self.at += 1
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "\\":
                out.append(self._escape())
                continue
            self.at += 1
            if character == opening != closing:
                raise UnreadableError("a text in it holds its own quotation mark")
            if character != closing or self._apostrophe(closing):
                out.append(character)
            else:
                if self._next() not in behind and not self.cut:
                    raise UnreadableError("a text in it holds its own quotation mark")
                return valid_unicode("".join(out))
        self.cut = True
        return valid_unicode("".join(out))

    def _apostrophe(self, closing: str) -> bool:
        around = self.text[self.at - 2 : self.at - 1] + self.text[self.at : self.at + 1]
        return closing in "'’" and len(around) == 2 and around.isalpha()

    def _escape(self) -> str:
        unit = _UNIT.match(self.text, self.at)
        if unit is not None:
            self.at, code = unit.end(), int(unit[1], 16)
            half = 0xD800 <= code < 0xDC00 and _CUT_ESCAPE.fullmatch(self.text, self.at)
            return "" if half else chr(code)
        if _CUT_ESCAPE.fullmatch(self.text, self.at):
            self.at = len(self.text)
            return ""
        following = self.text[self.at + 1]
        self.at += 2
        return _ESCAPES.get(following, "\\" + following)

    def _odd(self) -> UnreadableError:
        return UnreadableError(f"{self.text[self.at : self.at + 12]!r} stands where it cannot")
