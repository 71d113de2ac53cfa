"""Does an explanation agree with the concept that a feature was annotated with? Judged by what the
explanation predicts on the windows that were simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Interval
from featureinterp.probing.annotate import Annotation
from featureinterp.probing.auroc import auroc_vec
from featureinterp.probing.nulls import auroc_interval

Verdict = Literal["agrees", "disagrees", "unknown"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """An annotation beside the explanation of the same feature. ``predicted``: AUROC of the predicted levels
    for the concept's tokens on the simulated test windows, with a 95 % interval over windows; ``actual``:
    that of the feature's activations there. ``n_tokens``: simulated tokens; ``n_labelled``: those of the
    concept."""

    annotation: Annotation
    predicted: float | None
    interval: Interval | None
    actual: float | None
    n_tokens: int
    n_labelled: int

    @property
    def verdict(self) -> Verdict:
        """``disagrees`` when the predictions find the concept's tokens at most half as well as the feature
        does (the interval lies below the middle of ½ and ``actual``), ``agrees`` when they find them better
        than chance (the interval lies above ½), and otherwise ``unknown``; so too when the feature's own
        activations do not find them in these windows."""
        if self.interval is None or self.actual is None or self.actual <= 0.5:
            return "unknown"
        if self.interval.high < (0.5 + self.actual) / 2:
            return "disagrees"
        return "agrees" if self.interval.low > 0.5 else "unknown"


def agreement_with(
    result: FeatureResult, annotation: Annotation, labelled: np.ndarray, window_length: int
) -> Agreement:
    """``labelled``: positions of the concept's tokens, ascending (row of the window · ``window_length`` +
    offset).
    """
    windows = [w for w in result.windows if w.split == "test" and w.predicted is not None]
    tokens = [_tokens(w, labelled, window_length) for w in windows]
    if not tokens:
        return Agreement(annotation, None, None, None, 0, 0)
    predicted, actual, label = (np.concatenate(column) for column in zip(*tokens, strict=True))
    unit = np.repeat(np.arange(len(windows)), [len(w.pieces) for w in windows])
    values = [auroc_vec(scores, label) for scores in (predicted, actual)]
    known = [None if np.isnan(v) else v for v in values]
    interval = None if known[0] is None else auroc_interval(predicted, label, unit)
    return Agreement(annotation, known[0], interval, known[1], len(label), int(label.sum()))


def _tokens(
    window: ShownWindow, labelled: np.ndarray, window_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted levels, activations, and whether each token has the label."""
    positions = window.row * window_length + np.arange(len(window.pieces))
    return (
        np.array(window.predicted, float),
        np.array(window.activations, float),
        np.isin(positions, labelled),
    )


def agreements(
    results: Sequence[FeatureResult],
    annotations: Sequence[Annotation],
    labelled: Mapping[str, np.ndarray],
    window_length: int,
) -> dict[int, list[Agreement]]:
    """Per feature that has annotations: one agreement for each of its labels, its best annotation standing
    for it.
    """
    found: dict[int, dict[str, Annotation]] = {}
    for annotation in annotations:
        mine = found.setdefault(annotation.feature_id, {})
        if (
            annotation.label not in mine or annotation.auroc is not None
        ):  # what was found by AUROC is compared with an AUROC
            mine[annotation.label] = annotation
    return {
        r.feature: [agreement_with(r, a, labelled[a.label], window_length) for a in found[r.feature].values()]
        for r in results
        if r.feature in found
    }
