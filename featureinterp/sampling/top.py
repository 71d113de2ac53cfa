"""Top-activating windows."""

from __future__ import annotations

import numpy as np


def top_order(
    n_firing: int, n_windows: int, n_wanted: int, n_quantiles: int, rng: np.random.Generator
) -> np.ndarray:
    """The order in which firing windows are offered as "top": their ranks, int64 ``[firing window]``, 0 the
    strongest.

    ``n_wanted`` are drawn from the top quantile of all ``n_windows`` windows (the ranking cut into
    ``n_quantiles``; at least ``n_wanted`` windows) and offered by rank, then the rest of that quantile, then
    everything else by rank.
    """
    pool = min(n_firing, max(n_wanted, -(-n_windows // n_quantiles)))
    drawn = rng.permutation(pool)
    return np.concatenate([np.sort(drawn[:n_wanted]), np.sort(drawn[n_wanted:]), np.arange(pool, n_firing)])
