"""The scorer ``complexity``: how abstract each rule of an explanation is."""

from __future__ import annotations

from typing import Any

from featureinterp.domain.score import Score
from featureinterp.errors import LanguageModelError
from featureinterp.interfaces import LanguageModel, Parts
from featureinterp.jobs.feature import FeatureState
from featureinterp.scorers.complexity import Complexity


class Rate:
    """Asks for a rating of every rule."""

    name = "complexity"
    traits = ("asks",)

    def __init__(self, judge: LanguageModel) -> None:
        self.complexity = Complexity(judge)

    @classmethod
    def of_job(cls, parts: Parts) -> Rate:
        """The scorer of a job."""
        return cls(parts.judge)

    @property
    def settings(self) -> dict[str, Any]:
        """Model and prompt."""
        prompt = self.complexity.prompt
        return {"model": self.complexity.model.name, "prompt": prompt.name, "prompt_hash": prompt.hash}

    async def run(self, state: FeatureState) -> None:
        """The score ``complexity``, and the rating of each rule."""

        async def rate() -> Any:
            score, ratings, _ = await self.complexity.run(state.explained)
            if ratings and not any(r is not None for r in ratings):
                raise LanguageModelError(f"no rule could be rated: {score.undefined}")
            gaps = ["a rule could not be rated" for r in ratings if r is None]
            return {"score": score.to_json(), "ratings": ratings}, gaps

        depends = {
            "rules": [r.activates_on for r in state.explained.rules],
            "model": self.complexity.model.name,
            "prompt": self.complexity.prompt.hash,
        }
        value = await state.row(self.name, depends, rate, self.settings)
        if value is not None:
            state.scores.append(Score.from_json(value["score"]))
            state.ratings = tuple(value["ratings"])
