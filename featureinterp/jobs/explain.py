"""A job from its parts, for callers that put them together themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from featureinterp.falsification.counterexamples import Falsifier
from featureinterp.falsification.intervention import Interventions
from featureinterp.interfaces import Explainer, LanguageModel, Reviser, Simulator, Stage
from featureinterp.jobs.budget import Budget
from featureinterp.jobs.engine import Engine
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Event, Plan
from featureinterp.jobs.stages.complexity import Rate
from featureinterp.jobs.stages.detection import Detect
from featureinterp.jobs.stages.explain import Explain
from featureinterp.jobs.stages.falsify import Falsify
from featureinterp.jobs.stages.fuzzing import Fuzz
from featureinterp.jobs.stages.score import Scoring
from featureinterp.jobs.stages.simulate import Simulate
from featureinterp.jobs.stages.steer import Steer
from featureinterp.llm.metered import Meter


class ExplainJob(Engine):
    """Explains and scores features. ``judge`` answers detection, fuzzing and complexity questions;
    ``falsifier`` puts explanations on trial, and ``reviser`` improves those that were contradicted;
    ``interventions`` push the subject along the feature while it writes. None leaves them out. ``stages``:
    further ones, after these. The rest as in :class:`featureinterp.jobs.engine.Engine`.
    """

    def __init__(
        self,
        journal: Journal,
        explainer: Explainer,
        simulator: Simulator,
        *,
        judge: LanguageModel | None = None,
        falsifier: Falsifier | None = None,
        reviser: Reviser | None = None,
        interventions: Interventions | None = None,
        stages: tuple[Stage[FeatureState], ...] = (),
        plan: Plan | None = None,
        source: Any = None,
        meter: Meter | None = None,
        budget: Budget | None = None,
        max_failure_rate: float = 0.5,
        document_name: Callable[[int], str] = str,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        plan = plan or Plan()
        made: list[Stage[FeatureState]] = [Explain(explainer, plan)]
        if plan.simulate:
            made.append(Simulate(simulator, plan))
        if judge is not None and (scorers := scorers_of(judge, plan)):
            made.append(Scoring(scorers))
        if falsifier is not None:
            made.append(Falsify(falsifier, reviser, simulator, plan))
        if interventions is not None:
            made.append(Steer(interventions))
        super().__init__(
            journal,
            [*made, *stages],
            plan=plan,
            source=source,
            meter=meter,
            budget=budget,
            max_failure_rate=max_failure_rate,
            document_name=document_name,
            on_event=on_event,
        )


def scorers_of(judge: LanguageModel, plan: Plan) -> list[Stage[FeatureState]]:
    """The scorers that a plan wants."""
    wanted: list[tuple[bool, Callable[[], Stage[FeatureState]]]] = [
        (plan.detection, lambda: Detect(judge, plan)),
        (plan.fuzzing, lambda: Fuzz(judge, plan)),
        (plan.complexity, lambda: Rate(judge)),
    ]
    return [make() for on, make in wanted if on]
