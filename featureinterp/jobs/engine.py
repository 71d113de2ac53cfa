"""A job's stages on every feature: records in, results out, with everything that was paid for kept in a
journal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio.to_thread
import numpy as np

from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult
from featureinterp.files import content_key
from featureinterp.interfaces import Stage, settings_of
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.jobs.feature import FeatureState, result_of
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.keeping import FORMAT, Keeper
from featureinterp.jobs.plan import Event, Outcome, Plan
from featureinterp.jobs.schedule import RecordsOf, Run
from featureinterp.llm.metered import Meter
from featureinterp.registry import traits_of


class Engine:
    """Takes features through ``stages``, of which the first explains them; the others run in order on those
    that have an explanation.

    Features are worked on in an order that depends on their indices and the seed alone, so that each can take
    the next one's explanation as its null, few records are in memory at once, and another list of features
    changes few nulls. The failure of one feature is a row with its cause and stops nothing; a refused key or
    model, a spent budget and a failure rate above ``max_failure_rate`` stop the job.

    ``source``: what the records come from, as part of the job's key. ``meter``: that of all models, for
    budget and progress.
    """

    def __init__(
        self,
        journal: Journal,
        stages: Sequence[Stage[FeatureState]],
        *,
        plan: Plan | None = None,
        source: Any = None,
        meter: Meter | None = None,
        budget: Budget | None = None,
        max_failure_rate: float = 0.5,
        document_name: Callable[[int], str] = str,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.journal, self.plan, self.meter = journal, plan or Plan(), meter or Meter()
        self.first, *self.rest = stages
        self.needs_null = any("null" in traits_of(stage) for stage in self.rest)
        self.document_name, self.on_event = document_name, on_event
        self.guard = Guard(budget or Budget(), lambda: self.meter.usage, max_failure_rate=max_failure_rate)
        self.meter.before, self.meter.fits = self.guard.before, self.guard.fits
        self.keeper = Keeper(journal, self.guard)
        plan = self.plan
        about = [plan.n_test, plan.n_valid, list(plan.negatives), plan.seed]
        done = [[stage.name, settings_of(stage)] for stage in stages]
        self.key = content_key({"format": FORMAT, "source": source, "stages": done, "plan": about})

    def order(self, features: Sequence[int]) -> list[int]:
        """The circle in which each feature's null is the next one that has another explanation."""
        indices = np.array(list(dict.fromkeys(features)), np.uint64)
        return [int(f) for f in indices[np.argsort(_scrambled(indices, self.plan.seed), kind="stable")]]

    def remaining(self, features: Sequence[int]) -> list[int]:
        """The features that the journal does not hold as done, in the order of work."""
        finished = self.journal.finished(self.key)
        return [f for f in self.order(features) if finished.get(f) != "done"]

    async def run(self, features: Sequence[int], records: RecordsOf) -> Outcome:
        """Works on every feature that is not done yet. ``records`` gives the records of features, in order.

        Raises ``EndpointRefusedError`` and ``StorageError``; other ends are in the outcome.
        """
        ring = self.order(features)
        left = self.remaining(features)
        number = self.journal.start(self.key, len(left))
        work = Run(self, ring, left)
        ended = "interrupted"
        try:
            stopped = await work.go(records)
            ended = type(stopped).__name__ if stopped else "done"
        except Exception as error:
            ended = type(error).__name__
            raise
        finally:
            self.journal.end(number, ended, self.meter.usage)
        finished = self.journal.finished(self.key)
        status = {f: finished[f] for f in ring if f in finished}
        worked = set(left) - work.worked
        return Outcome(
            self.key,
            status,
            tuple(f for f in left if f in worked),
            work.progress(),
            stopped,
            work.price_of_the_rest(),
        )

    def state(self, record: FeatureRecord) -> FeatureState:
        """A feature that nothing is known of yet."""
        return FeatureState(record, self.keeper)

    async def explain(self, state: FeatureState) -> None:
        """The first stage."""
        await self.first.run(state)

    async def judge(self, state: FeatureState) -> None:
        """The stages after it, for a feature that has an explanation."""
        if state.explanation is not None:
            for stage in self.rest:
                await stage.run(state)

    async def result(self, state: FeatureState) -> FeatureResult:
        """What is known of a feature, as a result."""
        return await anyio.to_thread.run_sync(result_of, state, self.plan, self.document_name)


def _scrambled(indices: np.ndarray, seed: int) -> np.ndarray:
    """Numbers that look random, each from its index and the seed alone (SplitMix64, Steele et al. 2014),
    uint64 ``[index]``.
    """
    z = indices * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed + 1) * 0xD1B54A32D192ED03 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
