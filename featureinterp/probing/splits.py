"""Training and test tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from featureinterp.errors import IncompatibleError, InputError


def split_indices(n: int, test_fraction: float = 0.4, seed: int = 0, groups: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, test rows) of ``n`` tokens, int64 and ascending; together all of them. With ``groups`` ``[n]`` (documents) no group is on both sides:
    whole groups, in random order, go to the test side as long as they bring it nearer to its share.

    Raises ``InputError`` when one side would be empty.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"a test fraction of {test_fraction:g} leaves one side empty: choose one between 0 and 1")
    rng = np.random.default_rng(seed)
    if groups is None:
        member, sizes = np.arange(n), np.ones(n, np.int64)
    else:
        groups = np.asarray(groups)
        if groups.shape != (n,):
            raise IncompatibleError(f"there are groups of shape {groups.shape} for {n} tokens: give one per token")
        member, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    if len(sizes) < 2:
        what = "tokens" if groups is None else "documents"
        raise InputError(f"{len(sizes)} {what} cannot be split into training and test: at least 2 are needed")
    order = rng.permutation(len(sizes))
    filled = np.cumsum(sizes[order])
    n_test = int(np.argmin(np.abs(filled - test_fraction * n))) + 1
    on_test = np.zeros(len(sizes), bool)
    on_test[order[: min(n_test, len(sizes) - 1)]] = True
    return np.flatnonzero(~on_test[member]), np.flatnonzero(on_test[member])
