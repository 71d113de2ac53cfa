"""Windows spread evenly over the activation range."""

from __future__ import annotations

import numpy as np


def quantile_order(maxima: np.ndarray, scale: float, n_bins: int, rng: np.random.Generator) -> np.ndarray:
    """An order of ``maxima [window]`` in (0, scale] that takes one random window from each of ``n_bins``
    equal bins of the activation range in turn, strongest bin first, skipping bins that have run out."""
    bins = np.minimum((maxima.astype(np.float64) * n_bins / scale).astype(int), n_bins - 1)
    shuffled = rng.permutation(len(maxima))
    by_bin = shuffled[np.argsort(bins[shuffled], kind="stable")]
    starts = np.searchsorted(bins[by_bin], np.arange(n_bins))
    turn = np.arange(len(by_bin)) - starts[bins[by_bin]]
    return by_bin[np.lexsort((-bins[by_bin], turn))]
