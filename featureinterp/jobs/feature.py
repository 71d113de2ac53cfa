"""One feature within a job: what is known of it while it is worked on, and the result that is made of
that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from featureinterp.domain.explanation import Explanation, SearchNode
from featureinterp.domain.intervention import Intervention
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Failure, Score, Simulation
from featureinterp.domain.trial import Trial
from featureinterp.files import content_key
from featureinterp.jobs.plan import Part, Plan
from featureinterp.score.correlation import (
    Pairs,
    correlation,
    deviation_explained,
    explained_variance,
    false_positives,
)
from featureinterp.simulate.lexical import Lexical


@dataclass(frozen=True, slots=True)
class Null:
    """Another feature's explanation."""

    feature: int
    explanation: Explanation


@dataclass
class FeatureState:
    """What is known of a feature while a job runs."""

    record: FeatureRecord
    baseline: Explanation | None = None
    explanation: Explanation | None = None
    null: Null | None = None
    own: dict[Part, list[Simulation]] = field(default_factory=dict)
    null_simulated: dict[Part, list[Simulation]] = field(default_factory=dict)
    asked: list[Score] = field(default_factory=list)
    ratings: tuple[float | None, ...] = ()
    search: tuple[SearchNode, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    revised: Explanation | None = None
    revised_correlation: float | None = None
    intervention: Intervention | None = None
    failures: list[Failure] = field(default_factory=list)
    partial: bool = False
    reused: bool = True

    @cached_property
    def record_key(self) -> str:
        """A hash of the record's windows and activations."""
        record = self.record
        windows = [
            [
                split,
                source,
                w.row,
                w.start,
                np.asarray(w.token_ids).tolist(),
                np.round(w.activations.astype(float), 4).tolist(),
            ]
            for split, by_source in record.splits.items()
            for source, ws in by_source.items()
            for w in ws
        ]
        return content_key([record.feature.sae, record.feature.index, round(record.scale, 6), windows])

    @property
    def status(self) -> str:
        if self.failures:
            return "failed"
        return "partial" if self.partial else "done"


def result_of(state: FeatureState, plan: Plan, document_name: Callable[[int], str] = str) -> FeatureResult:
    """What a job says of a feature: its windows, its explanation, and the scores of what was simulated and
    asked.
    """
    record = state.record
    own = _scores(state, plan, state.own) if state.own else []
    if own and state.null_simulated:
        own = with_nulls(own, _scores(state, plan, state.null_simulated))
    baseline: list[Score] = []
    if state.baseline is not None:
        parts = {part: Lexical().predict(state.baseline, record.get(*part)[:n]) for part, n in plan.parts()}
        baseline = _scores(state, plan, parts)
    return FeatureResult(
        feature=record.feature.index,
        sae=record.feature.sae,
        scale=record.scale,
        density=record.density,
        count=record.count,
        windows=tuple(_shown(state, plan, document_name)),
        explanation=replace(state.explanation, search=state.search)
        if state.explanation and state.search
        else state.explanation,
        scores=(*own, *state.asked, *_trial_scores(state.trials), *_steering_scores(state.intervention)),
        baseline=state.baseline,
        baseline_scores=tuple(baseline),
        null_of=state.null.feature if state.null else None,
        failures=tuple(state.failures),
        shortfalls=dict(record.shortfalls),
        complexity=state.ratings,
        holistic=record.holistic,
        trials=tuple(state.trials),
        revised=state.revised,
        revised_correlation=state.revised_correlation,
        intervention=state.intervention,
    )


def _steering_scores(found: Intervention | None) -> list[Score]:
    """The effect of the largest dose."""
    return [] if found is None else [found.effect(found.doses[-1])]


def _trial_scores(trials: Sequence[Trial]) -> list[Score]:
    """Precision and recall of the feature's explanation on texts that were written to test it."""
    if not trials:
        return []
    first = trials[0]
    none = "the feature fires on none of the texts"
    return [
        first.precision.score("trial_precision", "no text was written"),
        first.recall.score("trial_recall", none),
    ]


def with_nulls(scores: Sequence[Score], nulls: Sequence[Score]) -> list[Score]:
    """The scores with the nulls' values and intervals, by name."""
    known = {null.name: null for null in nulls}
    found = [(s, known.get(s.name)) for s in scores]
    return [
        s if n is None else replace(s, null=n.value, null_interval=n.interval, null_failed=n.n_failed)
        for s, n in found
    ]


def _scores(state: FeatureState, plan: Plan, simulated: Mapping[Part, list[Simulation]]) -> list[Score]:
    def pairs(part: Part) -> Pairs:
        simulations = simulated.get(part, [])
        return Pairs.of(state.record.get(*part)[: len(simulations)], simulations)

    main = plan.negatives[0]
    top, valid = pairs(("test", "top")), pairs(("valid", "top"))
    scores = [
        correlation(
            top + pairs(("test", s)), "correlation" if s == main else f"correlation_{s}", seed=plan.seed
        )
        for s in plan.negatives
    ]
    fit, test = valid + pairs(("valid", main)), top + pairs(("test", main))
    scores += [explained_variance(fit, test, seed=plan.seed), deviation_explained(fit, test, seed=plan.seed)]
    silent = [s for s in plan.negatives if s.endswith("negative")]
    return scores + [
        false_positives(valid, pairs(("test", s)), f"false_positives_{s}", seed=plan.seed) for s in silent
    ]


def _shown(state: FeatureState, plan: Plan, document_name: Callable[[int], str]) -> list[ShownWindow]:
    record = state.record
    parts: list[tuple[Part, int]] = [
        (("train", "top"), plan.n_test),
        (("train", "weighted"), plan.n_test),
        *plan.parts(),
    ]
    shown = []
    for part, n in parts:
        own, null = state.own.get(part, []), state.null_simulated.get(part, [])
        for i, window in enumerate(record.get(*part)[:n]):
            mine = own[i] if i < len(own) else None
            other = null[i] if i < len(null) else None
            shown.append(
                ShownWindow(
                    part[0],
                    part[1],
                    window.row,
                    document_name(window.document),
                    window.pieces,
                    tuple(np.round(window.activations.astype(float), 4).tolist()),
                    _levels(mine),
                    _levels(other),
                    mine.failure if mine else None,
                    None
                    if window.holistic is None
                    else tuple(np.round(window.holistic.astype(float), 5).tolist()),
                )
            )
    return shown


def _levels(simulation: Simulation | None) -> tuple[float, ...] | None:
    return (
        None
        if simulation is None or simulation.expected is None
        else tuple(np.round(simulation.expected, 3).tolist())
    )
