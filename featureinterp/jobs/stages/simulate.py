"""The stage ``simulate``: what an explanation predicts, and how well that agrees with what is true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import anyio.to_thread

from featureinterp.domain.explanation import Explanation, Rule, SearchNode
from featureinterp.domain.score import Score, Simulation
from featureinterp.errors import LanguageModelError
from featureinterp.interfaces import Parts, Simulator, settings_of
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.kept import simulations_of, value_of
from featureinterp.jobs.plan import Part, Plan
from featureinterp.jobs.scores import main_correlation, simulated_scores, with_nulls
from featureinterp.tasks import each


class Simulate:
    """Simulates the plan's windows by the feature's explanation and by another one's, and the main test
    windows by every explanation that a search went through."""

    name = "simulate"
    traits = ("null",)

    def __init__(self, simulator: Simulator, plan: Plan) -> None:
        self.simulator, self.plan = simulator, plan

    @classmethod
    def of_job(cls, parts: Parts) -> Simulate:
        """The stage of a job."""
        return cls(parts.simulator, parts.job.plan)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the simulator."""
        return settings_of(self.simulator)

    async def run(self, state: FeatureState) -> None:
        """Predictions, and scores beside their nulls."""
        plan, explanation = self.plan, state.explained
        state.own = await simulated(state, self.simulator, "simulate", explanation, plan.parts())
        if state.other is not None:
            state.null_simulated = await simulated(
                state, self.simulator, "simulate-null", state.other, plan.parts()
            )
        state.search = await self._search(state, explanation)
        if state.own:
            state.scores += await anyio.to_thread.run_sync(partial(_scores, state, plan))

    async def _search(self, state: FeatureState, explanation: Explanation) -> tuple[SearchNode, ...]:
        """The nodes of a search with their correlations on the test windows, which the search itself never
        sees.
        """
        parts = self.plan.main_parts()
        correlations: dict[tuple[Rule, ...], float | None] = {}

        async def test(rules: tuple[Rule, ...]) -> None:
            found = state.own
            if rules != explanation.rules:
                tried = replace(explanation, rules=rules)
                found = await simulated(state, self.simulator, "simulate-search-test", tried, parts)
            correlations[rules] = main_correlation(state.record, self.plan, found)

        await each(test, dict.fromkeys(node.rules for node in explanation.search if node.rules))
        return tuple(replace(node, test=correlations.get(node.rules)) for node in explanation.search)


def _scores(state: FeatureState, plan: Plan) -> list[Score]:
    own = simulated_scores(state.record, plan, state.own)
    if not state.null_simulated:
        return own
    return with_nulls(own, simulated_scores(state.record, plan, state.null_simulated))


async def simulated(
    state: FeatureState,
    simulator: Simulator,
    stage: str,
    explanation: Explanation,
    parts: Sequence[tuple[Part, int]],
) -> dict[Part, list[Simulation]]:
    """Simulations of windows of the feature's record, kept in the journal as ``stage``; nothing when they
    failed."""
    chosen = {part: state.record.get(*part)[:n] for part, n in parts}
    windows = [w for part in chosen.values() for w in part]

    async def work() -> Any:
        simulations = await simulator.simulate(explanation, windows)
        failed = [str(s.failure) for s in simulations if s.expected is None]
        if windows and len(failed) == len(windows):
            raise LanguageModelError(f"no window could be simulated: {failed[0]}")
        return value_of(simulations), failed

    settings = settings_of(simulator)
    depends = {
        "simulator": settings,
        "rules": [[r.activates_on, r.strength] for r in explanation.rules],
        "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
    }
    value = await state.row(stage, depends, work, settings)
    if value is None:
        return {}
    found = iter(simulations_of(value))
    return {part: [next(found) for _ in windows] for part, windows in chosen.items()}
