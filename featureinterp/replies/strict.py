"""JSON as it is defined: no key twice with two values, no NaN, no number beyond a float."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_BRACKET = re.compile(r"[\[{]")
_MAX_STARTS = 500


class UnreadableError(ValueError):
    """A text that cannot be read. Its message says why, for the end of a sentence."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise UnreadableError(f"it says {key[:40]!r} twice")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise UnreadableError(f"{text[:20]} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _no_number(text)


decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def spans(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each whole object or list in a text, the outermost ones, in order."""
    start = failed = 0
    while failed < _MAX_STARTS and (bracket := _BRACKET.search(text, start)) is not None:
        start = bracket.start()
        try:
            _, end = decoder.raw_decode(text, start)
            yield start, end
            start = end
        except (ValueError, RecursionError):
            start, failed = start + 1, failed + 1
