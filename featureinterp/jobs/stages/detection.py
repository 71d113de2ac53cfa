"""The scorer ``detection``: in which windows is what the explanation describes?"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from featureinterp.domain.record import Window
from featureinterp.interfaces import LanguageModel, Parts
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.stages.questions import add_scores, settings_of_questions
from featureinterp.scorers.detection import Detection


class Detect:
    """Asks about top windows and as many silent ones of the plan's kinds, in turn."""

    name = "detection"
    traits = ("asks", "null")

    def __init__(self, judge: LanguageModel, plan: Plan) -> None:
        self.questions, self.plan = Detection(judge), plan

    @classmethod
    def of_job(cls, parts: Parts) -> Detect:
        """The scorer of a job."""
        return cls(parts.judge, parts.job.plan)

    @property
    def settings(self) -> dict[str, Any]:
        """Model, prompt and seed."""
        return settings_of_questions(self.questions, self.plan.seed)

    async def run(self, state: FeatureState) -> None:
        """Scores ``detection_…``."""
        await add_scores(state, self.name, self.questions, self._windows(state), self.plan.seed)

    def _windows(self, state: FeatureState) -> tuple[Window, ...]:
        n, record = self.plan.n_test, state.record
        top = record.get("test", "top")[:n]
        by_kind = (
            [w for w in record.get("test", source)[:n] if not w.fires] for source in self.plan.negatives
        )
        silent = [w for of_each in zip_longest(*by_kind) for w in of_each if w is not None][: len(top)]
        return (*top, *silent)
