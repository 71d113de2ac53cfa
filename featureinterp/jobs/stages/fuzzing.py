"""The scorer ``fuzzing``: are the marked tokens those that the explanation describes?"""

from __future__ import annotations

from typing import Any

from featureinterp.interfaces import LanguageModel, Parts
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.stages.questions import add_scores, settings_of_questions
from featureinterp.scorers.fuzzing import Fuzzing


class Fuzz:
    """Asks about the top windows, once with the right tokens marked and once with others."""

    name = "fuzzing"
    traits = ("asks", "null")

    def __init__(self, judge: LanguageModel, plan: Plan) -> None:
        self.questions, self.plan = Fuzzing(judge), plan

    @classmethod
    def of_job(cls, parts: Parts) -> Fuzz:
        """The scorer of a job."""
        return cls(parts.judge, parts.job.plan)

    @property
    def settings(self) -> dict[str, Any]:
        """Model, prompt and seed."""
        return settings_of_questions(self.questions, self.plan.seed)

    async def run(self, state: FeatureState) -> None:
        """Scores ``fuzzing_…``."""
        windows = state.record.get("test", "top")[: self.plan.n_test]
        await add_scores(state, self.name, self.questions, windows, self.plan.seed)
