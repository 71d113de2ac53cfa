"""One document's text → the token windows that are chosen from it, each with its exact text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from featureinterp.files import valid_unicode

SEGMENT_CHARS = 100_000


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


def piece_ends(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The end of every token's piece, in characters: int64 ``[n]``, never falling, the last one at the end of
    the text.

    What lies between two tokens' spans (white space that a tokenizer trims) goes to the later one; of tokens
    that share a character, the last gets it.
    """
    if not offsets:
        return np.zeros(0, np.int64)
    spans = np.asarray(offsets, np.int64)
    edges = np.append(np.minimum(spans[:-1, 1], spans[1:, 0]), len(text))
    return np.minimum.accumulate(edges[::-1])[::-1]


@dataclass(frozen=True, slots=True)
class Cut:
    """A window: the index of its first token and the place of its first character in the document, its ids,
    its text, and the end of each token in characters of that."""

    start: int
    char: int
    ids: list[int]
    text: str
    ends: np.ndarray


@dataclass(slots=True)
class Available:
    """What a document has: windows, and tokens in them. Counted while it is cut."""

    windows: int = 0
    tokens: int = 0


def cuts(
    text: str, encoder: TextEncoder, length: int, min_length: int, quota: int | None, has: Available
) -> Iterator[Cut]:
    """The chosen windows of a document: all of them, or ``quota`` of them spread evenly over its length.
    Fills ``has``.
    """
    if quota == 0:
        return
    text = valid_unicode(text)
    first = taken = char = 0
    for segment in _segments(text):
        encoding = encoder.encode([segment])[0]
        available = _n_windows(len(encoding.ids), length, min_length)
        char_end = char + len(segment)
        take = available if quota is None else min(available, round(quota * char_end / len(text)) - taken)
        has.windows += available
        has.tokens += min(len(encoding.ids), available * length)
        yield from _windows_of(segment, encoding, first, char, _spread(available, take), length)
        first += len(encoding.ids)
        char = char_end
        taken += take


def _spread(available: int, take: int) -> list[int]:
    """``take`` of ``range(available)``, evenly spaced."""
    return [(2 * j + 1) * available // (2 * take) for j in range(take)]


def _n_windows(n_tokens: int, length: int, min_length: int) -> int:
    full, rest = divmod(n_tokens, length)
    return full + (rest >= min_length)


def _windows_of(
    text: str, encoding: Encoding, start: int, char: int, chosen: Sequence[int], length: int
) -> Iterator[Cut]:
    if not chosen:
        return
    ends = piece_ends(text, encoding.offsets)
    for k in chosen:
        a, b = k * length, min((k + 1) * length, len(encoding.ids))
        left = int(ends[a - 1]) if a else 0
        yield Cut(start + a, char + left, encoding.ids[a:b], text[left : int(ends[b - 1])], ends[a:b] - left)


def _segments(text: str) -> Iterator[str]:
    """A text in parts of about ``SEGMENT_CHARS``, cut before white space where there is any, so that memory
    stays bounded.
    """
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        cut = start + SEGMENT_CHARS
        space = max(text.rfind(" ", start + 1, cut), text.rfind("\n", start + 1, cut))
        cut = space if space > start + SEGMENT_CHARS // 2 else cut
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
