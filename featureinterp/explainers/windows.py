"""What an explainer is shown of a record: training windows, their strongest tokens, and what causes them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.errors import InputError
from featureinterp.prompts import marked


def training_windows(record: FeatureRecord, n: int) -> tuple[Window, ...]:
    """The first ``n`` windows to learn from: top ones of the training split, then importance-weighted
    ones.
    """
    windows = [w for w in (*record.get("train", "top"), *record.get("train", "weighted")) if w.fires][:n]
    if not windows:
        raise InputError(
            f"feature {record.feature.index} fires in no training window: it cannot be explained from this "
            "corpus"
        )
    return tuple(windows)


def top_tokens(windows: tuple[Window, ...], n: int) -> list[str]:
    """The tokens at the windows' peaks, by their summed activation, largest first; at most ``n``."""
    total: dict[str, float] = defaultdict(float)
    for window in windows:
        peak = int(np.argmax(window.activations))
        if window.pieces[peak]:
            total[window.pieces[peak]] += float(window.activations[peak])
    return sorted(total, key=lambda t: -total[t])[:n]


def excerpt(window: Window, context: int) -> str:
    """The part of a window around its strongest token, with strong tokens marked: ``context`` tokens before
    it and half as many after.

    Marked are tokens of at least half of the window's maximum.
    """
    peak = int(np.argmax(window.activations))
    left, right = max(0, peak - context), min(len(window.pieces), peak + context // 2 + 1)
    strong = window.activations[left:right] >= window.max_activation / 2
    return marked(window.pieces[left:right], strong.tolist()).strip()


def causes(windows: tuple[Window, ...]) -> list[list[tuple[str, int]]]:
    """For each window its tokens with a positive holistic activation, in their order, as levels 1–5: 5 · h /
    (the largest of all windows), rounded up; those below 0.5 are left out. Raises ``InputError`` when a
    window has none computed."""
    if any(w.holistic is None for w in windows):
        raise InputError(
            "the windows have no holistic activations, which this style shows: compute them with the "
            "records, or choose a style without causes"
        )
    known = [np.asarray(w.holistic, np.float64) for w in windows]
    largest = max((h.max(initial=0.0) for h in known), default=0.0)
    if largest <= 0:
        return [[] for _ in windows]
    levels = [5 * h / largest for h in known]
    return [
        [(piece, int(np.ceil(x))) for piece, x in zip(w.pieces, level, strict=True) if x >= 0.5]
        for w, level in zip(windows, levels, strict=True)
    ]


def top_causes(windows: tuple[Window, ...], n: int) -> list[str]:
    """The tokens with the largest summed holistic activation over the windows, largest first; at most
    ``n``.
    """
    total: dict[str, float] = defaultdict(float)
    for found in causes(windows):
        for piece, level in found:
            if piece.strip():
                total[piece] += level
    return sorted(total, key=lambda t: -total[t])[:n]
