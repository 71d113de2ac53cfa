"""How many windows each document gives, so that about as many tokens come out as were asked for.

The first pass over a corpus hands windows out as it goes; what short documents leave over goes to later ones.
Where that ends short of the aim because the last documents were short, another pass hands out by what is
known of all documents: none gives more windows than another as long as that one has some left.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

TOLERANCE = 0.01
"""So large a share of the tokens may be missing before the corpus is read again."""
MOST_ROUNDS = 6
UNKNOWN = -1


@dataclass(slots=True)
class Seen:
    """What passes over the documents found: of each the windows that it has (``UNKNOWN`` where no tokens were
    counted yet), the tokens in them, and the windows that the last pass took."""

    windows: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    taken: array[int] = field(default_factory=lambda: array("q"))

    def add(self, windows: int, tokens: int, taken: int) -> None:
        """The next document."""
        self.windows.append(windows)
        self.tokens.append(tokens)
        self.taken.append(taken)

    def learn(self, earlier: Seen) -> None:
        """Takes over what an earlier pass counted and this one did not look at."""
        for number, windows in enumerate(earlier.windows):
            if self.windows[number] == UNKNOWN:
                self.windows[number], self.tokens[number] = windows, earlier.tokens[number]


@dataclass(slots=True)
class Plan:
    """Windows per document, int64 ``[document]``. ``extra``: so many more windows are to come from documents
    whose quota is ``UNKNOWN``, one of each; fewer as they come."""

    quotas: np.ndarray
    extra: int = 0

    def ends(self, number: int) -> bool:
        """Whether no document from this one on gives anything."""
        return number >= len(self.quotas)

    def quota(self, number: int) -> int:
        """How many windows a document may give."""
        quota = int(self.quotas[number])
        return quota if quota != UNKNOWN else int(self.extra > 0)

    def took(self, number: int, n: int) -> None:
        """Counts the windows that a document gave."""
        self.extra -= n * int(self.quotas[number] == UNKNOWN)


def lacks_much(n_tokens: int, aim: int, length: int) -> bool:
    """Whether tokens are missing that are worth another pass, or a word."""
    return aim - n_tokens >= max(length, TOLERANCE * aim)


def next_plan(
    seen: Seen, n_tokens: int, aim: int, length: int, most: int | None, round_number: int
) -> Plan | None:
    """How to read the corpus again after a pass that gave ``n_tokens`` of ``aim``; None when that is near
    enough, or there is no more.

    ``length``: tokens of a full window. ``most``: windows per document at most.
    """
    if not lacks_much(n_tokens, aim, length) or round_number >= MOST_ROUNDS:
        return None
    windows, tokens, taken = (np.asarray(part, np.int64) for part in (seen.windows, seen.tokens, seen.taken))
    unknown = np.flatnonzero(windows == UNKNOWN)
    if len(unknown):
        wanted = -(-(aim - n_tokens) // length)
        stride = max(1, len(unknown) // (4 * wanted)) if round_number == 1 else 1
        quotas = taken.copy()
        quotas[unknown[::stride]] = UNKNOWN
        return Plan(quotas, wanted)
    room = windows if most is None else np.minimum(windows, most)
    quotas = even_quotas(windows, tokens, room, aim, length)
    return Plan(quotas) if quotas.sum() > taken.sum() else None


def even_quotas(
    windows: np.ndarray, tokens: np.ndarray, room: np.ndarray, aim: int, length: int
) -> np.ndarray:
    """The smallest even quotas that give ``aim`` tokens, int64 ``[document]``; all of ``room`` where that is
    less.

    ``windows``, ``tokens``: what each document has; ``room``: windows that it may give.
    """
    low, high = 0, int(room.max(initial=0))
    if high == 0 or _tokens_of(room, windows, tokens, length).sum() <= aim:
        return room.copy()
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if _tokens_of(np.minimum(room, middle), windows, tokens, length).sum() >= aim
            else (middle, high)
        )
    quotas: np.ndarray = np.minimum(room, low)
    before = _tokens_of(quotas, windows, tokens, length)
    more = np.flatnonzero(room > low)
    gains = (_tokens_of(np.minimum(room, high), windows, tokens, length) - before)[more]
    needed = aim - int(before.sum())
    n = min(len(more), max(0, -(-needed * len(more) // max(1, int(gains.sum())))))
    while n > 0 and gains[_evenly(len(more), n - 1)].sum() >= needed:
        n -= 1
    while n < len(more) and gains[_evenly(len(more), n)].sum() < needed:
        n += 1
    quotas[more[_evenly(len(more), n)]] += 1
    return quotas


def _evenly(available: int, n: int) -> np.ndarray:
    """``n`` of ``range(available)``, evenly spaced."""
    chosen: np.ndarray = (2 * np.arange(n) + 1) * available // (2 * max(n, 1))
    return chosen


def _tokens_of(quotas: np.ndarray, windows: np.ndarray, tokens: np.ndarray, length: int) -> np.ndarray:
    """About how many tokens the documents give in so many windows: the last window of a document may be
    short, and is among them or not.
    """
    lacking = windows * length - tokens
    last = (quotas > 0) & ((2 * quotas - 1) * windows // np.maximum(2 * quotas, 1) == windows - 1)
    tokens_given: np.ndarray = quotas * length - np.where(last, lacking, 0)
    return tokens_given
