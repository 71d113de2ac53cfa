"""Everything that a run found out about one feature, as it is written to ``results.jsonl`` and drawn in the
report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.intervention import Intervention
from featureinterp.domain.plain import Plain
from featureinterp.domain.score import Failure, Score
from featureinterp.domain.trial import Trial


@dataclass(frozen=True, slots=True)
class ShownWindow:
    """A window as a page shows it. ``pieces``, ``activations`` (raw units) and, where it was simulated,
    ``predicted`` (levels 0–5) and ``null_predicted`` (by another feature's explanation) have one entry per
    token; so has ``holistic`` (raw units) where it was computed."""

    split: str
    source: str
    row: int
    document: str
    pieces: tuple[str, ...]
    activations: tuple[float, ...]
    predicted: tuple[float, ...] | None = None
    null_predicted: tuple[float, ...] | None = None
    failure: str | None = None
    holistic: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class FeatureResult(Plain):
    """One feature of a run. ``explanation`` is None when there is none, and ``failures`` says why.
    ``baseline``: the top-token list and its scores on the same windows. ``null_of``: the feature whose
    explanation was the null. ``holistic``: the method of its windows' holistic activations. ``trials``: the
    explanation, and then what was made of it, on texts that were written to test it; ``revised``: what was
    made of it last, with its correlation on the main test windows. ``intervention``: what the subject writes
    when the feature is pushed. ``notes``: what further stages found, by their names."""

    feature: int
    sae: str
    scale: float
    density: float
    count: int
    windows: tuple[ShownWindow, ...]
    explanation: Explanation | None = None
    scores: tuple[Score, ...] = ()
    baseline: Explanation | None = None
    baseline_scores: tuple[Score, ...] = ()
    null_of: int | None = None
    failures: tuple[Failure, ...] = ()
    shortfalls: Mapping[str, str] = field(default_factory=dict)
    complexity: tuple[float | None, ...] = ()
    holistic: str | None = None
    trials: tuple[Trial, ...] = ()
    revised: Explanation | None = None
    revised_correlation: float | None = None
    intervention: Intervention | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def score(self, name: str) -> Score | None:
        """The explanation's score of that name."""
        return next((s for s in self.scores if s.name == name), None)

    def baseline_score(self, name: str) -> Score | None:
        """The top-token baseline's score of that name."""
        return next((s for s in self.baseline_scores if s.name == name), None)

    def beats_baseline(self, name: str = "correlation") -> bool | None:
        """Whether the explanation's score is above the top-token baseline's; None when either is
        undefined.
        """
        own, floor = self.score(name), self.baseline_score(name)
        if own is None or floor is None or own.value is None or floor.value is None:
            return None
        return own.value > floor.value
