"""Which windows have the same text: equal tokens are one, wherever they stand."""

from __future__ import annotations

import numpy as np

CHUNK_ROWS = 65_536


def hash_of(tokens: np.ndarray) -> np.ndarray:
    """A hash of each row of token ids ``[window, token]``, uint64 ``[window]``; −1 after the end of a short
    window counts for nothing.

    Two of n different windows share a hash with a probability of about n² / 2⁶⁵.
    """
    places = np.arange(tokens.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mixed(
            (tokens.astype(np.int64) + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            + _mixed(places + np.uint64(1))
        )
        return np.asarray(_mixed(np.where(tokens >= 0, mixed, np.uint64(0)).sum(1, dtype=np.uint64)))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def hashes_of(tokens: np.ndarray) -> np.ndarray:
    """The same for a large table, part by part."""
    parts = [
        hash_of(np.asarray(tokens[start : start + CHUNK_ROWS])) for start in range(0, len(tokens), CHUNK_ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def same_texts(hashes: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """A group for every document, the number of the first of those whose windows are the same, each for each:
    int64 ``[window]``, of the window's document.

    ``hashes``, ``documents``: of every window; the windows of a document stand together.
    """
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    with np.errstate(over="ignore"):
        place = np.arange(len(hashes)) - np.repeat(starts, np.diff(starts, append=len(hashes)))
        whole = (
            np.add.reduceat(_mixed(hashes + _mixed(place.astype(np.uint64) + np.uint64(1))), starts)
            if len(starts)
            else hashes
        )
    first, group = np.unique(whole, return_index=True, return_inverse=True)[1:]
    return np.asarray(
        np.repeat(documents[starts[first[group]]], np.diff(starts, append=len(hashes))), np.int64
    )


def repeated_share(hashes: np.ndarray) -> float:
    """The share of windows that have the text of an earlier one, in [0, 1)."""
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0
