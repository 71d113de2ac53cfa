"""Training and test tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from featureinterp.corpus.contents import same_texts
from featureinterp.errors import IncompatibleError, InputError


def split_indices(
    n: int, test_fraction: float = 0.4, seed: int = 0, groups: Any = None, texts: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, test rows) of ``n`` tokens, int64 and ascending. With ``groups`` ``[n]`` (documents) no
    group is on both sides: whole groups, in random order, go to the test side as long as they bring it nearer
    to its share. With ``texts`` ``[n]`` (a whole number for the text of each token's window, the same for the
    same text) no text is on both sides, either: groups of the same texts are one, and rows of the test side
    whose text is in training are on no side. Without ``texts`` both sides together are all rows.

    Raises ``InputError`` when one side would be empty.
    """
    if not 0 < test_fraction < 1:
        raise InputError(
            f"a test fraction of {test_fraction:g} leaves one side empty: choose one between 0 and 1"
        )
    rng = np.random.default_rng(seed)
    groups = groups if texts is None else joined(groups, texts)
    if groups is None:
        member, sizes = np.arange(n), np.ones(n, np.int64)
    else:
        groups = np.asarray(groups)
        if groups.shape != (n,):
            raise IncompatibleError(
                f"there are groups of shape {groups.shape} for {n} tokens: give one per token"
            )
        member, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    if len(sizes) < 2:
        what = "tokens" if groups is None else "documents"
        raise InputError(f"{len(sizes)} {what} cannot be split into training and test: at least 2 are needed")
    order = rng.permutation(len(sizes))
    filled = np.cumsum(sizes[order])
    n_test = int(np.argmin(np.abs(filled - test_fraction * n))) + 1
    on_test = np.zeros(len(sizes), bool)
    on_test[order[: min(n_test, len(sizes) - 1)]] = True
    train, test = np.flatnonzero(~on_test[member]), np.flatnonzero(on_test[member])
    if texts is not None:
        test = test[~np.isin(np.asarray(texts)[test], np.asarray(texts)[train])]
        if not len(test):
            raise InputError(
                "every text of the test side is in training, too: more texts that differ are needed"
            )
    return train, test


def joined(groups: Any, texts: Any) -> np.ndarray:
    """Groups (documents) of the same texts as one: the place among all of the first of them, int64
    ``[token]``. Without ``groups`` every text is a group. ``texts`` as in :func:`split_indices`."""
    texts = np.asarray(texts)
    groups = texts if groups is None else np.asarray(groups)
    if groups.shape != texts.shape or texts.ndim != 1:
        raise IncompatibleError(
            f"there are groups of shape {groups.shape} for texts of shape {texts.shape}: give one per token"
        )
    numbers = np.unique(groups, return_inverse=True)[1]
    order = np.argsort(numbers, kind="stable")
    of, text = numbers[order], texts[order]
    starts = np.ones(len(of), bool)  # of the windows
    starts[1:] = (of[1:] != of[:-1]) | (text[1:] != text[:-1])
    first = same_texts(text[starts].astype(np.uint64), of[starts])
    out = np.empty(len(of), np.int64)
    out[order] = np.repeat(first, np.diff(np.flatnonzero(starts), append=len(of)))
    return out
