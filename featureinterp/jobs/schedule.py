"""The order of work in a job: which features are under way, and what waits for what."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import anyio
import anyio.to_thread

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult
from featureinterp.domain.usage import Usage
from featureinterp.errors import JobStoppedError
from featureinterp.jobs.feature import FeatureState, Null
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Event, Plan, Progress
from featureinterp.llm.metered import Meter
from featureinterp.llm.tally import Tally, tally

NULL_REACH = 8
"""How many of the following features are looked at for an explanation that can be a null."""
REMEMBERED = 64
"""Explanations of finished features that are kept in memory; those of others are read from the journal again.
"""
RecordsOf = Callable[[Sequence[int]], Iterator[FeatureRecord]]


class Work(Protocol):
    """What is done with every feature, for whoever decides when. ``needs_null``: whether a stage after the
    first compares with another feature's explanation."""

    key: str
    plan: Plan
    journal: Journal
    meter: Meter
    on_event: Callable[[Event], None]
    needs_null: bool

    def state(self, record: FeatureRecord) -> FeatureState:
        """A feature that nothing is known of yet."""
        ...

    async def explain(self, state: FeatureState) -> None:
        """The first stage."""
        ...

    async def judge(self, state: FeatureState) -> None:
        """The stages after it."""
        ...

    async def result(self, state: FeatureState) -> FeatureResult:
        """What is known of the feature."""
        ...


class Run:
    """One run of a job: which features are under way, which explanations are known, and why it stops."""

    def __init__(self, job: Work, ring: list[int], left: list[int]) -> None:
        self.job, self.ring, self.left = job, ring, left
        self.worked: set[int] = set()
        self._place = {feature: i for i, feature in enumerate(ring)}
        self._todo = set(left)
        self._explained: dict[int, Explanation | None] = {}
        self._finished: deque[int] = deque()
        self._events: dict[int, anyio.Event] = {}
        self._error: Exception | None = None
        self._slots = anyio.Semaphore(job.plan.features_at_once)
        self._backlog = anyio.Semaphore(job.plan.features_at_once + NULL_REACH + 1)
        self._start = time.monotonic()
        self._failed = 0
        self._n_explained = 0
        self._spent = Usage()
        self._begun: dict[int, Tally] = {}

    async def go(self, records: RecordsOf) -> JobStoppedError | None:
        """Works on all features; returns why it stopped early, and raises what no run can go on after."""
        if not self.left:
            return None
        found = records(self.left)
        async with anyio.create_task_group() as group:
            for feature in self.left:
                await self._backlog.acquire()
                if self._error is not None:
                    break
                try:
                    record = await anyio.to_thread.run_sync(next, found)
                except Exception as error:
                    self._give_up(error)
                    break
                group.start_soon(self._feature, feature, record)
        if self._error is not None and not isinstance(self._error, JobStoppedError):
            raise self._error
        return self._error

    async def _feature(self, feature: int, record: FeatureRecord) -> None:
        try:
            with tally() as self._begun[feature]:
                await self._work(self.job.state(record))
        except Exception as error:
            # Bugs, too: what is in flight is let finish, as it may be paid for, and then they are raised.
            self._give_up(error)
        finally:
            self._backlog.release()
        if feature in self.worked:
            self._spent += self._begun.pop(feature).usage

    async def _work(self, state: FeatureState) -> None:
        feature = state.record.feature.index
        async with self._slots:
            if self._error is None:
                await self.job.explain(state)
        if self._error is not None:
            return
        self._explained[feature] = state.explanation
        self._event(feature).set()
        result = await self.job.result(state)
        self._n_explained += 1  # counted when it is said, so that the counts come in order
        self._say("explained", state, self._n_explained, result)
        if self.job.needs_null and state.explanation is not None:
            state.null = await self._null(feature, state.explanation)
        async with self._slots:
            if self._error is None:
                await self.job.judge(state)
            if self._error is not None:
                return
            result = await self.job.result(state)
            self.job.journal.finish(self.job.key, result, state.status)
        self.worked.add(feature)
        self._forget(feature)
        self._failed += bool(state.failures)
        self._say("scored", state, len(self.worked), result)

    def _give_up(self, error: Exception) -> None:
        """Begins nothing more; what waits for another feature waits no longer."""
        self._error = self._error or error
        for event in self._events.values():
            event.set()

    async def _null(self, feature: int, explanation: Explanation) -> Null | None:
        """The explanation of the next feature in the circle that has one with another text."""
        place, n = self._place[feature], len(self.ring)
        for step in range(1, min(NULL_REACH, n - 1) + 1):
            other = self.ring[(place + step) % n]
            if other in self._todo:
                await self._event(other).wait()
                if self._error is not None:
                    return None
            if other not in self._explained:
                known = next(self.job.journal.features(self.job.key, [other]), None)
                self._explained[other] = known.explanation if known else None
                self._forget(other)
            found = self._explained.get(other)
            if found is not None and found.text != explanation.text:
                return Null(other, found)
        return None

    def _forget(self, feature: int) -> None:
        """Keeps the explanations of the features that are under way, and of few others: the journal has
        them.
        """
        self._finished.append(feature)
        if len(self._finished) > REMEMBERED:
            self._explained.pop(self._finished.popleft(), None)

    def _event(self, feature: int) -> anyio.Event:
        event = self._events.setdefault(feature, anyio.Event())
        if self._error is not None:
            event.set()
        return event

    def _say(self, stage: str, state: FeatureState, done: int, result: FeatureResult) -> None:
        self.job.on_event(Event(stage, result, done, len(self.left), self.progress(), state.reused))

    def price_of_the_rest(self) -> float | None:
        """USD for what is left: the mean of the features that are through, less what those that were
        interrupted hold of their answers.
        """
        total, held, n = (
            self._spent.cost_usd,
            sum((t.usage for t in self._begun.values()), Usage()).cost_usd,
            len(self.worked),
        )
        if total is None or held is None or not n:
            return None
        return max(0.0, total / n * (len(self.left) - n) - held)

    def progress(self) -> Progress:
        """How far the run is."""
        meter, seconds = self.job.meter, time.monotonic() - self._start
        usage, n = meter.usage, len(self.worked)
        left = seconds / n * (len(self.left) - n) if n else None
        return Progress(
            n - self._failed,
            self._failed,
            len(self.left),
            meter.in_flight,
            usage.requests,
            usage.prompt_tokens + usage.completion_tokens,
            usage.cost_usd,
            seconds,
            left,
            usage.estimated,
        )
