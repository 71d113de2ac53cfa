"""Bootstrap intervals over windows or documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from featureinterp.domain.score import Interval

N_RESAMPLES = 2000
CONFIDENCE = 0.95


def resample_counts(n: int, rng: np.random.Generator, n_resamples: int = N_RESAMPLES) -> np.ndarray:
    """How often each of ``n`` units is in each bootstrap sample: int64 ``[n_resamples, n]``, every row sums
    to n.
    """
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)


def interval_of(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval | None:
    """The percentile interval of resampled ``values``; those that are undefined (NaN) are left out, and with
    fewer than half of them defined there is no interval."""
    defined = values[np.isfinite(values)]
    if len(defined) * 2 < len(values) or not len(defined):
        return None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(float(low), float(high))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    rng: np.random.Generator,
    n_resamples: int = N_RESAMPLES,
) -> Interval | None:
    """The interval of a statistic that takes counts ``[resample, unit]`` and gives one value per resample
    (NaN: undefined).
    """
    if n < 2:
        return None
    return interval_of(statistic(resample_counts(n, rng, n_resamples)))


def weighted_aurocs(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """P(score of a positive > score of a negative) + ½ P(equal), with units weighted by ``counts [resample,
    unit]``.
    """
    order = np.argsort(scores, kind="stable")
    positive, negative = counts[:, order] * labels[order], counts[:, order] * ~labels[order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    p, q = np.add.reduceat(positive, starts, axis=1), np.add.reduceat(negative, starts, axis=1)
    below = np.cumsum(q, axis=1) - q
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((p * (below + q / 2)).sum(1) / (p.sum(1) * q.sum(1)))
