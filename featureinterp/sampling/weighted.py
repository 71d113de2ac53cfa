"""Importance-weighted token positions."""

from __future__ import annotations

import numpy as np


def weighted_order(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of positions that is weighted sampling without replacement with p ∝ a², for ``values
    [nonzero]`` > 0.

    Exponential keys: position i gets −log(u) / a², and the smallest keys come first (Efraimidis and Spirakis
    2006).
    """
    weights = np.square(values.astype(np.float64))
    return np.argsort(rng.exponential(size=len(values)) / weights, kind="stable")
