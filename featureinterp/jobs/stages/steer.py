"""The stage ``steer``: what the subject writes while a feature is pushed."""

from __future__ import annotations

from typing import Any

from featureinterp.domain.intervention import Intervention
from featureinterp.falsification.intervention import Interventions
from featureinterp.interfaces import Parts, settings_of
from featureinterp.jobs.feature import FeatureState
from featureinterp.scorers.detection import FitJudge


class Steer:
    """Has texts written at every dose, and judges how well they fit the explanation."""

    name = "steer"

    def __init__(self, interventions: Interventions) -> None:
        self.interventions = interventions

    @classmethod
    def of_job(cls, parts: Parts) -> Steer:
        """The stage of a job."""
        job, judge = parts.job, FitJudge(parts.judge)
        return cls(Interventions(parts.steerer, parts.activator, judge, job.steering, seed=job.plan.seed))

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the texts and of their judge."""
        return {**settings_of(self.interventions), "judge": settings_of(self.interventions.judge)}

    async def run(self, state: FeatureState) -> None:
        """The texts with their matches, and the effect of the largest dose."""
        written = await self._written(state)
        if written is None:
            return
        judged = await self._judged(state, written)
        state.intervention = found = Intervention.from_json(written if judged is None else judged)
        state.scores.append(found.effect(found.doses[-1]))

    async def _written(self, state: FeatureState) -> Any | None:
        async def work() -> Any:
            return (await self.interventions.write(state.record.feature, state.record.scale)).to_json(), ()

        settings = settings_of(self.interventions)
        return await state.row("steer", {"steering": settings}, work, settings)

    async def _judged(self, state: FeatureState, written: Any) -> Any | None:
        explanation, texts = state.explained, Intervention.from_json(written)

        async def work() -> Any:
            found = await self.interventions.judged(explanation, texts)
            return found.to_json(), ["a text could not be judged" for t in found.texts if t.match is None]

        settings = settings_of(self.interventions.judge)
        depends = {"texts": written, "explanation": explanation.text, "judge": settings}
        return await state.row("steer-judged", depends, work, settings)
