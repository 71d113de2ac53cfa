"""Handing windows to train, valid and test so that no window and no document is in two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from featureinterp.domain.record import SPLITS, SplitName


class SplitAssigner:
    """One feature's bookkeeping: which rows are used, and which split each document belongs to.

    A document is given to a split when its first window is taken and stays there. The split that lacks most takes next, so
    that windows offered by rank are interleaved and every split is equally strong.
    """

    def __init__(self, documents: Sequence[int]) -> None:
        self._documents = documents
        self._split_of: dict[int, SplitName] = {}
        self.used: set[int] = set()

    def take(self, offered: Iterable[int], wanted: dict[SplitName, int]) -> dict[SplitName, list[int]]:
        """Takes from ``offered`` rows, in order, up to ``wanted`` for each split; stops when all are served."""
        taken: dict[SplitName, list[int]] = {s: [] for s in SPLITS}
        missing = {s: wanted.get(s, 0) for s in SPLITS}
        open_places = sum(missing.values())
        if not open_places:
            return taken
        for row in offered:
            if row in self.used:
                continue
            document = self._documents[row]
            split = self._split_of.get(document)
            if split is None:
                split = max(SPLITS, key=missing.__getitem__)
                self._split_of[document] = split
            elif not missing[split]:
                continue
            self.used.add(row)
            taken[split].append(row)
            missing[split] -= 1
            open_places -= 1
            if not open_places:
                break
        return taken
