"""One feature within a job: what is known of it while it is worked on, and the result that is made of
that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from featureinterp.domain.explanation import Explanation, SearchNode
from featureinterp.domain.intervention import Intervention
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Failure, Score, Simulation
from featureinterp.domain.trial import Trial
from featureinterp.files import content_key
from featureinterp.interfaces import Stage, Work, settings_of
from featureinterp.jobs.keeping import FORMAT, Keeper
from featureinterp.jobs.plan import Part, Plan


@dataclass(frozen=True, slots=True)
class Null:
    """Another feature's explanation."""

    feature: int
    explanation: Explanation


@dataclass
class FeatureState:
    """What is known of a feature while a job runs, and where its stages put what they find."""

    record: FeatureRecord
    keeper: Keeper
    baseline: Explanation | None = None
    baseline_scores: list[Score] = field(default_factory=list)
    explanation: Explanation | None = None
    null: Null | None = None
    own: dict[Part, list[Simulation]] = field(default_factory=dict)
    null_simulated: dict[Part, list[Simulation]] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    ratings: tuple[float | None, ...] = ()
    search: tuple[SearchNode, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    revised: Explanation | None = None
    revised_correlation: float | None = None
    intervention: Intervention | None = None
    failures: list[Failure] = field(default_factory=list)
    partial: bool = False
    reused: bool = True

    @property
    def explained(self) -> Explanation:
        """The explanation, of a feature that has one."""
        assert self.explanation is not None, "stages after explain run on features with an explanation"
        return self.explanation

    @property
    def other(self) -> Explanation | None:
        """Another feature's explanation."""
        return self.null.explanation if self.null else None

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
        """As the journal has it."""
        if self.failures:
            return "failed"
        return "partial" if self.partial else "done"

    async def kept(self, stage: Stage[Any], depends: Mapping[str, Any], work: Work) -> Any | None:
        """What the journal holds for a stage, its settings and ``depends``, or what ``work`` gives now; None
        when it failed. ``work`` gives a value and why parts of it failed."""
        settings = settings_of(stage)
        return await self.row(stage.name, {"settings": settings, "depends": dict(depends)}, work, settings)

    async def row(
        self, stage: str, depends: Mapping[str, Any], work: Work, provenance: Mapping[str, Any]
    ) -> Any | None:
        """The same with a key and a provenance of the stage's own: ``depends`` holds everything that the
        value depends on besides the record."""
        key = content_key({"format": FORMAT, "stage": stage, "record": self.record_key, **depends})
        kept = await self.keeper.keep(key, self.record.feature.index, stage, work, provenance)
        self.reused = self.reused and kept.reused
        self.partial = self.partial or kept.partial
        if kept.failure is not None:
            self.failures.append(kept.failure)
        return kept.value


def result_of(state: FeatureState, plan: Plan, document_name: Callable[[int], str] = str) -> FeatureResult:
    """What a job says of a feature: its windows, its explanation, and what its stages found."""
    record = state.record
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
        scores=tuple(state.scores),
        baseline=state.baseline,
        baseline_scores=tuple(state.baseline_scores),
        null_of=state.null.feature if state.null else None,
        failures=tuple(state.failures),
        shortfalls=dict(record.shortfalls),
        complexity=state.ratings,
        holistic=record.holistic,
        trials=tuple(state.trials),
        revised=state.revised,
        revised_correlation=state.revised_correlation,
        intervention=state.intervention,
        notes=dict(state.notes),
    )


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
