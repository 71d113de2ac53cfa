"""The stage ``explain``: what a feature means, and beside it the list of its top tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio.to_thread

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.score import Score
from featureinterp.errors import InputError
from featureinterp.explainers.baselines import TopTokens
from featureinterp.interfaces import Explainer, Parts, settings_of
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.kept import working_on
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.scores import simulated_scores
from featureinterp.simulators.lexical import Lexical


class Explain:
    """Asks the explainer. The baseline, top tokens matched by text, is scored on the plan's windows."""

    name = "explain"

    def __init__(self, explainer: Explainer, plan: Plan) -> None:
        self.explainer, self.plan = explainer, plan

    @classmethod
    def of_job(cls, parts: Parts) -> Explain:
        """The stage of a job."""
        return cls(parts.explainer, parts.job.plan)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the explainer."""
        return settings_of(self.explainer)

    async def run(self, state: FeatureState) -> None:
        """The explanation; a feature without one has a failure with its cause."""
        try:
            state.baseline = await TopTokens().explain(state.record)
        except InputError:
            state.baseline = None  # the explainer itself says why, as a failure of its own
        else:
            found = partial(baseline_scores, state.record, state.baseline, self.plan)
            state.baseline_scores = await anyio.to_thread.run_sync(found)

        async def work() -> Any:
            with working_on(state.record.feature.index):
                explanation = await self.explainer.explain(state.record)
            return explanation.to_json(), [node.failure for node in explanation.search if node.failure]

        settings = self.settings
        causes = {} if state.record.holistic is None else {"holistic": state.record.holistic}
        value = await state.row("explain", {"explainer": settings, **causes}, work, settings)
        state.explanation = Explanation.from_json(value) if value else None


def baseline_scores(record: FeatureRecord, baseline: Explanation, plan: Plan) -> list[Score]:
    """What a list of tokens predicts, by text alone."""
    parts = {part: Lexical().predict(baseline, record.get(*part)[:n]) for part, n in plan.parts()}
    return simulated_scores(record, plan, parts)
