"""The stage ``falsify``: texts that are written to contradict an explanation, and its revision by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.score import Score
from featureinterp.domain.trial import Trial
from featureinterp.explainers.tree import Tree
from featureinterp.falsification.counterexamples import Falsifier, with_counterexamples
from featureinterp.interfaces import Parts, Reviser, Simulator, settings_of
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.kept import working_on
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.scores import main_correlation
from featureinterp.jobs.stages.simulate import simulated
from featureinterp.scorers.detection import FitJudge


class Falsify:
    """The explanation's trial, and while texts contradict it and rounds are left, a revision and its trial.
    ``reviser`` None: only the trial."""

    name = "falsify"

    def __init__(
        self, falsifier: Falsifier, reviser: Reviser | None, simulator: Simulator, plan: Plan
    ) -> None:
        self.falsifier, self.reviser, self.simulator, self.plan = falsifier, reviser, simulator, plan

    @classmethod
    def of_job(cls, parts: Parts) -> Falsify:
        """The stage of a job; what revises is one level of a search."""
        job = parts.job
        judge = FitJudge(parts.judge)
        falsifier = Falsifier(parts.model, parts.activator, judge, job.trial, seed=job.plan.seed)
        reviser = Tree.shaped(parts, replace(job.tree, roots=1, depth=1, width=1))
        return cls(falsifier, reviser, parts.simulator, job.plan)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the trial and of what revises."""
        reviser = settings_of(self.reviser) if self.reviser else None
        return {**settings_of(self.falsifier), "rounds": self.falsifier.trial.rounds, "reviser": reviser}

    async def run(self, state: FeatureState) -> None:
        """Trials, scores of the first one, and the last revision."""
        await self._rounds(state)
        if state.trials:
            state.scores += _scores(state.trials[0])

    async def _rounds(self, state: FeatureState) -> None:
        rounds = self.falsifier.trial.rounds
        for number in range(rounds):
            tried = state.revised or state.explained
            trial = await self._trial(state, tried)
            if trial is None:
                return
            state.trials.append(trial)
            if number + 1 == rounds or self.reviser is None or not trial.contradictions:
                return
            revised = await self._revised(state, tried, self.reviser)
            if revised is None or revised.rules == tried.rules:
                return
            state.revised = revised
            parts = self.plan.main_parts()
            found = await simulated(state, self.simulator, "simulate-revised", revised, parts)
            state.revised_correlation = main_correlation(state.record, self.plan, found)

    async def _trial(self, state: FeatureState, tried: Explanation) -> Trial | None:
        async def work() -> Any:
            return (await self.falsifier.run(tried, state.record)).to_json(), ()

        settings = settings_of(self.falsifier)
        rules = [[r.activates_on, r.strength] for r in tried.rules]
        value = await state.row("falsify", {"falsifier": settings, "rules": rules}, work, settings)
        return None if value is None else Trial.from_json(value)

    async def _revised(self, state: FeatureState, tried: Explanation, reviser: Reviser) -> Explanation | None:
        """What the reviser makes of an explanation that was contradicted."""
        record = with_counterexamples(state.record, state.trials)

        async def work() -> Any:
            with working_on(record.feature.index):
                return (await reviser.revise(record, tried)).to_json(), ()

        settings = settings_of(reviser)
        depends = {
            "reviser": settings,
            "trials": [t.to_json() for t in state.trials],
            "rules": [[r.activates_on, r.strength] for r in tried.rules],
        }
        value = await state.row("revise", depends, work, settings)
        return Explanation.from_json(value) if value else None


def _scores(first: Trial) -> list[Score]:
    """Precision and recall of the feature's explanation on texts that were written to test it."""
    none = "the feature fires on none of the texts"
    return [
        first.precision.score("trial_precision", "no text was written"),
        first.recall.score("trial_recall", none),
    ]
