"""Handing windows to train, valid and test so that no text, no window and no document is in two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from featureinterp.domain.record import SPLITS, SplitName


class SplitAssigner:
    """One feature's bookkeeping: which texts are used, and which split each document belongs to.

    A document is given to a split when its first window is taken and stays there. The split that lacks most
    takes next, so that windows offered by rank are interleaved and every split is equally strong.
    ``contents``: a value of each row that is the same for rows of the same tokens; a text is taken once at
    most, whichever of its rows is offered first.
    """

    def __init__(self, documents: Sequence[int], contents: Sequence[int]) -> None:
        self._documents, self._contents = documents, contents
        self._split_of: dict[int, int] = {}
        self.used: set[int] = set()
        self.texts: set[int] = set()

    def take(
        self, offered: Iterable[int], wanted: dict[SplitName, int], cut: Callable[[int], int] | None = None
    ) -> dict[SplitName, list[int]]:
        """Takes from ``offered`` rows, in order, up to ``wanted`` for each split; stops when all are served.
        ``cut``: the content of the part that is kept of a row, where that is not the whole of it."""
        taken: tuple[list[int], ...] = tuple([] for _ in SPLITS)
        missing = [wanted.get(s, 0) for s in SPLITS]
        open_places = sum(missing)
        documents, contents, split_of, texts = self._documents, self._contents, self._split_of, self.texts
        for row in offered if open_places else ():
            text = contents[row]
            if text in texts:
                continue
            part = text if cut is None else cut(row)
            if part in texts:
                continue
            document = documents[row]
            split = split_of.get(document)
            if split is None:
                split = split_of[document] = missing.index(max(missing))
            elif not missing[split]:
                continue
            self.used.add(row)
            texts.update((text, part))
            taken[split].append(row)
            missing[split] -= 1
            open_places -= 1
            if not open_places:
                break
        return dict(zip(SPLITS, taken, strict=True))
