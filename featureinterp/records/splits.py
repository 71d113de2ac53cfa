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
        self._split_of: dict[int, int] = {}
        self.used: set[int] = set()

    def take(self, offered: Iterable[int], wanted: dict[SplitName, int]) -> dict[SplitName, list[int]]:
        """Takes from ``offered`` rows, in order, up to ``wanted`` for each split; stops when all are served."""
        taken: tuple[list[int], ...] = tuple([] for _ in SPLITS)
        missing = [wanted.get(s, 0) for s in SPLITS]
        open_places = sum(missing)
        documents, split_of, used = self._documents, self._split_of, self.used
        for row in offered if open_places else ():
            if row in used:
                continue
            document = documents[row]
            split = split_of.get(document)
            if split is None:
                split = split_of[document] = missing.index(max(missing))
            elif not missing[split]:
                continue
            used.add(row)
            taken[split].append(row)
            missing[split] -= 1
            open_places -= 1
            if not open_places:
                break
        return dict(zip(SPLITS, taken, strict=True))
