"""The stage ``score``: the job's scorers, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featureinterp.interfaces import Parts, Stage, settings_of
from featureinterp.jobs.feature import FeatureState
from featureinterp.registry import SCORERS, traits_of


class Scoring:
    """Runs scorers, which are stages of their own."""

    name = "score"

    def __init__(self, scorers: Sequence[Stage[FeatureState]]) -> None:
        self.scorers = scorers
        self.traits = sorted({trait for scorer in scorers for trait in traits_of(scorer)})

    @classmethod
    def of_job(cls, parts: Parts) -> Scoring:
        """The stage of a job."""
        return cls([SCORERS.load(name)(parts) for name in parts.job.scorers])

    @property
    def settings(self) -> dict[str, Any]:
        """Those of every scorer, by its name."""
        return {scorer.name: settings_of(scorer) for scorer in self.scorers}

    async def run(self, state: FeatureState) -> None:
        """What each scorer finds."""
        for scorer in self.scorers:
            await scorer.run(state)
