"""Top-activating windows."""

from __future__ import annotations

import numpy as np


def top_candidates(maxima: np.ndarray, n_windows: int, n_wanted: int, n_quantiles: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which firing windows are offered as "top": indices into ``maxima [firing window]``.

    ``n_wanted`` are drawn from the top quantile of all ``n_windows`` windows (the ranking cut into ``n_quantiles``; at least
    ``n_wanted`` windows) and offered by rank, then the rest of that quantile, then everything else by rank.
    """
    ranked = np.argsort(-maxima, kind="stable")
    pool = min(len(ranked), max(n_wanted, -(-n_windows // n_quantiles)))
    drawn = rng.permutation(pool)
    return ranked[np.concatenate([np.sort(drawn[:n_wanted]), np.sort(drawn[n_wanted:]), np.arange(pool, len(ranked))]).astype(int)]
