"""Windows drawn uniformly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_FIRST_DRAW = 256


def uniform_rows(n_windows: int, rng: np.random.Generator) -> Iterator[int]:
    """All rows in random order, each once; cheap when only the first few are used."""
    if n_windows <= 8 * _FIRST_DRAW:
        yield from rng.permutation(n_windows).tolist()
        return
    first = list(dict.fromkeys(rng.integers(n_windows, size=_FIRST_DRAW).tolist()))
    yield from first
    rest = np.setdiff1d(np.arange(n_windows), first, assume_unique=True)
    yield from rng.permutation(rest).tolist()
