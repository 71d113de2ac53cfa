"""Everything that a run found out about one feature, as it is written to ``results.jsonl`` and drawn in the
report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.intervention import Intervention
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
class FeatureResult:
    """One feature of a run. ``explanation`` is None when there is none, and ``failures`` says why.
    ``baseline``: the top-token list and its scores on the same windows. ``null_of``: the feature whose
    explanation was the null. ``holistic``: the method of its windows' holistic activations. ``trials``: the
    explanation, and then what was made of it, on texts that were written to test it; ``revised``: what was
    made of it last, with its correlation on the main test windows. ``intervention``: what the subject writes
    when the feature is pushed."""

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

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form that :meth:`from_json` reads back to an equal value."""
        out: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "feature",
                "sae",
                "scale",
                "density",
                "count",
                "null_of",
                "holistic",
                "revised_correlation",
            )
        }
        out["explanation"] = self.explanation.to_json() if self.explanation else None
        out["baseline"] = self.baseline.to_json() if self.baseline else None
        out["revised"] = self.revised.to_json() if self.revised else None
        out["trials"] = [t.to_json() for t in self.trials]
        out["intervention"] = self.intervention.to_json() if self.intervention else None
        out["scores"] = [s.to_json() for s in self.scores]
        out["baseline_scores"] = [s.to_json() for s in self.baseline_scores]
        out["failures"] = [{n: getattr(f, n) for n in Failure.__dataclass_fields__} for f in self.failures]
        out["shortfalls"] = dict(self.shortfalls)
        out["complexity"] = list(self.complexity)
        out["windows"] = [{n: getattr(w, n) for n in ShownWindow.__dataclass_fields__} for w in self.windows]
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FeatureResult:
        """Reads what :meth:`to_json` wrote."""
        out = dict(value)
        for name in ("explanation", "baseline", "revised"):
            out[name] = Explanation.from_json(out[name]) if out.get(name) else None
        out["trials"] = tuple(Trial.from_json(t) for t in out.get("trials", ()))
        out["intervention"] = Intervention.from_json(out["intervention"]) if out.get("intervention") else None
        for name in ("scores", "baseline_scores"):
            out[name] = tuple(Score.from_json(s) for s in out[name])
        out["failures"] = tuple(Failure(**f) for f in out["failures"])
        out["complexity"] = tuple(out["complexity"])
        out["windows"] = tuple(_window(w) for w in out["windows"])
        return cls(**out)


def _window(value: Mapping[str, Any]) -> ShownWindow:
    arrays = {
        n: None if value.get(n) is None else tuple(value[n])
        for n in ("pieces", "activations", "predicted", "null_predicted", "holistic")
    }
    return ShownWindow(**{**value, **arrays})
