"""Explaining and scoring features: records in, results out, with everything that was paid for kept in a journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import numpy as np
import pydantic

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord, Source, SplitName, Window
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Failure, Score, Simulation
from featureinterp.errors import (
    EndpointRefusedError,
    FeatureInterpError,
    InputError,
    JobStoppedError,
    LanguageModelError,
    StorageError,
)
from featureinterp.explain.baselines import TopTokens
from featureinterp.files import content_key
from featureinterp.interfaces import Explainer, LanguageModel, Simulator
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.jobs.journal import Journal
from featureinterp.llm.metered import Meter
from featureinterp.llm.tally import tally
from featureinterp.score.complexity import Complexity
from featureinterp.score.correlation import (
    Pairs,
    correlation,
    deviation_explained,
    explained_variance,
    false_positives,
)
from featureinterp.score.detection import Detection
from featureinterp.score.fuzzing import Fuzzing
from featureinterp.score.verdicts import Verdict, judge
from featureinterp.simulate.lexical import Lexical

FORMAT = 3
NULL_REACH = 8
"""How many of the following features are looked at for an explanation that can be a null."""
Part = tuple[SplitName, Source]
RecordsOf = Callable[[Sequence[int]], Iterator[FeatureRecord]]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. ``in_flight``: requests under way. ``cost_usd`` None: the price is not known. ``seconds`` since the run began,
    ``left_s`` until it is likely to end (None: not known yet)."""

    done: int
    failed: int
    total: int
    in_flight: int
    requests: int
    tokens: int
    cost_usd: float | None
    seconds: float
    left_s: float | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a screen may show: ``stage`` ("explained", "scored"), the feature, and how many of ``total`` are through it."""

    stage: str
    result: FeatureResult
    done: int
    total: int
    progress: Progress
    reused: bool = False


@dataclass(frozen=True)
class Plan:
    """How explanations are judged.

    ``n_test``, ``n_valid``: windows per source at most. ``negatives``: the kinds of windows that top windows are put beside, each
    giving a correlation of its own; the first is the main one, and the null and the affine fit use it. ``concurrency``: how many
    features are worked on at once. ``simulate``: whether explanations are simulated at all.
    """

    n_test: int = 10
    n_valid: int = 5
    negatives: tuple[Source, ...] = ("random", "similar_negative", "random_negative")
    simulate: bool = True
    detection: bool = True
    fuzzing: bool = True
    complexity: bool = True
    concurrency: int = 4
    seed: int = 0

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def parts(self) -> list[tuple[Part, int]]:
        """What is simulated with the feature's own explanation."""
        main = self.negatives[0]
        return [
            (("test", "top"), self.n_test),
            *((("test", source), self.n_test) for source in self.negatives),
            (("valid", "top"), self.n_valid),
            (("valid", main), self.n_valid),
        ]

    def null_parts(self) -> list[tuple[Part, int]]:
        """What is simulated with another feature's explanation."""
        return [(("test", "top"), self.n_test), (("test", self.negatives[0]), self.n_test)]


@dataclass(frozen=True)
class Outcome:
    """How a run of a job ended. ``status`` of every feature that it is through with ("done", "partial", "failed"), those of earlier
    runs included; ``left``: the features that it is not through with. ``stopped``: why it ended before it was through."""

    job: str
    status: Mapping[int, str]
    left: tuple[int, ...]
    progress: Progress
    stopped: JobStoppedError | None = None

    @property
    def price_of_the_rest(self) -> float | None:
        """USD that the features left would take, if they cost what those of this run did; None when that is not known."""
        worked = self.progress.done + self.progress.failed
        if self.progress.cost_usd is None or not worked:
            return None
        return self.progress.cost_usd / worked * len(self.left)


@dataclass(frozen=True, slots=True)
class _Null:
    """Another feature's explanation."""

    feature: int
    explanation: Explanation


@dataclass
class _State:
    """What is known of a feature while a job runs."""

    record: FeatureRecord
    baseline: Explanation | None = None
    explanation: Explanation | None = None
    null: _Null | None = None
    own: dict[Part, list[Simulation]] = field(default_factory=dict)
    null_simulated: dict[Part, list[Simulation]] = field(default_factory=dict)
    asked: list[Score] = field(default_factory=list)
    ratings: tuple[float | None, ...] = ()
    failures: list[Failure] = field(default_factory=list)
    partial: bool = False
    reused: bool = True

    @property
    def status(self) -> str:
        if self.failures:
            return "failed"
        return "partial" if self.partial else "done"


class ExplainJob:
    """Explains and scores features. ``judge`` answers detection, fuzzing and complexity questions; None leaves them out.

    Features are worked on in an order that depends on their indices and the seed alone, so that each can take the next one's explanation
    as its null, few records are in memory at once, and another list of features changes few nulls. The failure of one feature is a row
    with its cause and stops nothing; a refused key or model, a spent budget and a failure rate above ``max_failure_rate`` stop the job.

    ``source``: what the records come from, as part of the job's key. ``meter``: that of all models, for budget and progress.
    """

    def __init__(
        self,
        journal: Journal,
        explainer: Explainer,
        simulator: Simulator,
        *,
        judge: LanguageModel | None = None,
        plan: Plan | None = None,
        source: Any = None,
        meter: Meter | None = None,
        budget: Budget | None = None,
        max_failure_rate: float = 0.5,
        document_name: Callable[[int], str] = str,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.journal, self.explainer, self.simulator, self.judge = journal, explainer, simulator, judge
        self.plan = plan or Plan()
        self.meter = meter or Meter()
        self.document_name, self.on_event = document_name, on_event
        self.guard = Guard(budget or Budget(), lambda: self.meter.usage, max_failure_rate=max_failure_rate)
        self.meter.before = self.guard.before
        self.key = content_key({"format": FORMAT, "source": source, **self._settings()})

    def _settings(self) -> dict[str, Any]:
        plan, asked = self.plan, []
        if self.judge is not None:
            wanted = ((plan.detection, Detection), (plan.fuzzing, Fuzzing), (plan.complexity, Complexity))
            asked = [kind(self.judge).prompt.name + kind(self.judge).prompt.hash for on, kind in wanted if on]
        return {
            "explainer": _settings_of(self.explainer),
            "simulator": _settings_of(self.simulator) if plan.simulate else None,
            "judge": [self.judge.name, *asked] if self.judge is not None else None,
            "plan": [plan.n_test, plan.n_valid, list(plan.negatives), plan.seed],
        }

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
        work = _Run(self, ring, left)
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
        return Outcome(self.key, status, tuple(f for f in left if f in worked), work.progress(), stopped)

    async def _stage(self, state: _State, stage: str, depends: Mapping[str, Any], work: Callable[[], Any], provenance: Mapping[str, Any]) -> Any | None:
        """The journalled value of a stage, or what ``work`` gives now; None when it failed. ``work`` returns (value, whether a part of it failed)."""
        key = content_key({"format": FORMAT, "stage": stage, "record": record_key(state.record), **depends})
        known = self.journal.get(key)
        if known is not None and known.status == "done":
            return known.value
        state.reused = False
        with tally() as spent:
            try:
                value, incomplete = await work()
            except (EndpointRefusedError, JobStoppedError, StorageError, OSError):
                raise
            except Exception as error:  # whatever goes wrong with one feature is a row and stops no other
                failure = Failure(state.record.feature.index, stage, type(error).__name__, str(error))
                if known is not None:  # with gaps from an earlier run, which is more than nothing and holds their causes
                    state.partial = True
                else:
                    state.failures.append(failure)
                    self.journal.failed(key, failure, usage=spent.usage)
                self.guard.outcome(failure)
                return known.value if known is not None else None
            self.journal.stage(key, state.record.feature.index, stage, value, usage=spent.usage, provenance=provenance, partial=incomplete)
        self.guard.outcome(None)
        state.partial = state.partial or incomplete
        return value

    async def explain(self, state: _State) -> None:
        """The stage ``explain``, and the baseline."""
        try:
            state.baseline = await TopTokens().explain(state.record)
        except InputError:
            state.baseline = None  # the explainer itself says why, as a failure of its own

        async def work() -> Any:
            return (await self.explainer.explain(state.record)).to_json(), False

        settings = _settings_of(self.explainer)
        value = await self._stage(state, "explain", {"explainer": settings}, work, settings)
        state.explanation = Explanation.from_json(value) if value else None

    async def score(self, state: _State) -> None:
        """The stages after ``explain``, for a feature that has an explanation."""
        explanation = state.explanation
        if explanation is None:
            return
        if self.plan.simulate:
            state.own = await self._simulated(state, "simulate", explanation, self.plan.parts())
            if state.null is not None:
                state.null_simulated = await self._simulated(state, "simulate-null", state.null.explanation, self.plan.null_parts())
        if self.judge is not None:
            await self._ask(state, explanation, self.judge)

    async def _simulated(self, state: _State, stage: str, explanation: Explanation, parts: Sequence[tuple[Part, int]]) -> dict[Part, list[Simulation]]:
        chosen = {part: state.record.get(*part)[:n] for part, n in parts}
        windows = [w for part in chosen.values() for w in part]

        async def work() -> Any:
            simulations = await self.simulator.simulate(explanation, windows)
            failed = [s.failure for s in simulations if s.expected is None]
            if windows and len(failed) == len(windows):
                raise LanguageModelError(f"no window could be simulated: {failed[0]}")
            return [{"failure": s.failure} if s.expected is None else np.round(s.expected, 5).tolist() for s in simulations], bool(failed)

        settings = _settings_of(self.simulator)
        depends = {
            "simulator": settings,
            "rules": [[r.activates_on, r.strength] for r in explanation.rules],
            "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
        }
        value = await self._stage(state, stage, depends, work, settings)
        if value is None:
            return {}
        simulations = iter([Simulation(None, v["failure"]) if isinstance(v, dict) else Simulation(np.array(v)) for v in value])
        return {part: [next(simulations) for _ in windows] for part, windows in chosen.items()}

    async def _ask(self, state: _State, explanation: Explanation, judge_model: LanguageModel) -> None:
        """Detection, fuzzing and complexity; each is a stage of its own."""
        record = state.record
        top = record.get("test", "top")[: self.plan.n_test]
        silent = [w for source in self.plan.negatives for w in record.get("test", source)[: self.plan.n_test] if not w.fires][: len(top)]
        for name, wanted, scorer, windows in (
            ("detection", self.plan.detection, Detection(judge_model), (*top, *silent)),
            ("fuzzing", self.plan.fuzzing, Fuzzing(judge_model), top),
        ):
            if not wanted:
                continue

            async def work(scorer: Any = scorer, windows: Sequence[Window] = windows) -> Any:
                _, verdicts, _ = await scorer.run(explanation, windows, seed=self.plan.seed)
                return [[v.label, v.said, v.probability, v.failure, v.row] for v in verdicts], any(v.failure for v in verdicts)

            provenance = {"model": judge_model.name, "prompt": scorer.prompt.name, "prompt_hash": scorer.prompt.hash}
            depends = {
                "text": explanation.text,
                "model": judge_model.name,
                "prompt": scorer.prompt.hash,
                "seed": self.plan.seed,
                "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
            }
            value = await self._stage(state, name, depends, work, provenance)
            if value is not None:
                verdicts = [Verdict(*v) for v in value]
                state.asked += await anyio.to_thread.run_sync(partial(judge, name, verdicts, seed=self.plan.seed))
        if self.plan.complexity:
            complexity = Complexity(judge_model)

            async def rate() -> Any:
                score, ratings, _ = await complexity.run(explanation)
                return {"score": score.to_json(), "ratings": ratings}, None in ratings

            provenance = {"model": judge_model.name, "prompt": complexity.prompt.name, "prompt_hash": complexity.prompt.hash}
            depends = {"rules": [r.activates_on for r in explanation.rules], "model": judge_model.name, "prompt": complexity.prompt.hash}
            value = await self._stage(state, "complexity", depends, rate, provenance)
            if value is not None:
                state.asked.append(Score.from_json(value["score"]))
                state.ratings = tuple(value["ratings"])

    def result(self, state: _State) -> FeatureResult:
        record, plan = state.record, self.plan
        own = self._scores(state, state.own) if state.own else []
        baseline: list[Score] = []
        if state.baseline is not None:
            parts = {part: Lexical().predict(state.baseline, record.get(*part)[:n]) for part, n in plan.parts()}
            baseline = self._scores(state, parts, nulls=False)
        return FeatureResult(
            feature=record.feature.index,
            sae=record.feature.sae,
            scale=record.scale,
            density=record.density,
            count=record.count,
            windows=tuple(self._shown(state)),
            explanation=state.explanation,
            scores=(*own, *state.asked),
            baseline=state.baseline,
            baseline_scores=tuple(baseline),
            null_of=state.null.feature if state.null else None,
            failures=tuple(state.failures),
            shortfalls=dict(record.shortfalls),
            complexity=state.ratings,
        )

    def _scores(self, state: _State, simulated: Mapping[Part, list[Simulation]], nulls: bool = True) -> list[Score]:
        record, plan = state.record, self.plan

        def pairs(part: Part, source: Mapping[Part, list[Simulation]] = simulated) -> Pairs:
            simulations = source.get(part, [])
            return Pairs.of(record.get(*part)[: len(simulations)], simulations)

        main = plan.negatives[0]
        top = pairs(("test", "top"))
        scores = []
        for source in plan.negatives:
            name = "correlation" if source == main else f"correlation_{source}"
            score = correlation(top + pairs(("test", source)), name, seed=plan.seed)
            if source == main and nulls and state.null_simulated:
                null = correlation(pairs(("test", "top"), state.null_simulated) + pairs(("test", main), state.null_simulated), seed=plan.seed)
                score = Score(name, score.value, score.n_scored, score.n_failed, score.interval, score.undefined, null.value, null.interval)
            scores.append(score)
        valid = pairs(("valid", "top")) + pairs(("valid", main))
        test = top + pairs(("test", main))
        scores += [explained_variance(valid, test, seed=plan.seed), deviation_explained(valid, test, seed=plan.seed)]
        scores += [false_positives(pairs(("test", s)), f"false_positives_{s}", seed=plan.seed) for s in plan.negatives if s.endswith("negative")]
        return scores

    def _shown(self, state: _State) -> list[ShownWindow]:
        record = state.record
        parts: list[tuple[Part, int]] = [(("train", "top"), self.plan.n_test), (("train", "weighted"), self.plan.n_test), *self.plan.parts()]
        shown = []
        for part, n in parts:
            own, null = state.own.get(part, []), state.null_simulated.get(part, [])
            for i, window in enumerate(record.get(*part)[:n]):
                mine = own[i] if i < len(own) else None
                other = null[i] if i < len(null) else None
                shown.append(
                    ShownWindow(
                        part[0],
                        part[1],
                        window.row,
                        self.document_name(window.document),
                        window.pieces,
                        tuple(np.round(window.activations.astype(float), 4).tolist()),
                        _levels(mine),
                        _levels(other),
                        mine.failure if mine else None,
                    )
                )
        return shown


class _Run:
    """One run of a job: which features are under way, which explanations are known, and why it stops."""

    def __init__(self, job: ExplainJob, ring: list[int], left: list[int]) -> None:
        self.job, self.ring, self.left = job, ring, left
        self.worked: set[int] = set()
        self._place = {feature: i for i, feature in enumerate(ring)}
        self._todo = set(left)
        self._explained: dict[int, Explanation | None] = {}
        self._events: dict[int, anyio.Event] = {}
        self._error: Exception | None = None
        self._slots = anyio.Semaphore(job.plan.concurrency)
        self._backlog = anyio.Semaphore(job.plan.concurrency + NULL_REACH + 1)
        self._start = time.monotonic()
        self._failed = 0
        self._n_explained = 0

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
                except (FeatureInterpError, OSError) as error:
                    self._give_up(error)
                    break
                group.start_soon(self._feature, feature, record)
        if self._error is not None and not isinstance(self._error, JobStoppedError):
            raise self._error
        return self._error

    async def _feature(self, feature: int, record: FeatureRecord) -> None:
        state = _State(record)
        try:
            async with self._slots:
                if self._error is None:
                    await self.job.explain(state)
            if self._error is not None:
                return
            self._explained[feature] = state.explanation
            self._event(feature).set()
            self._n_explained += 1
            await self._say("explained", state, self._n_explained)
            if self.job.plan.simulate and state.explanation is not None:
                state.null = await self._null(feature, state.explanation)
            async with self._slots:
                if self._error is None:
                    await self.job.score(state)
                if self._error is not None:
                    return
                result = await anyio.to_thread.run_sync(self.job.result, state)
                self.job.journal.finish(self.job.key, result, state.status)
            self.worked.add(feature)
            self._failed += bool(state.failures)
            await self._say("scored", state, len(self.worked), result)
        except (FeatureInterpError, OSError) as error:
            self._give_up(error)
        finally:
            self._backlog.release()

    def _give_up(self, error: Exception) -> None:
        """Begins nothing more; what waits for another feature waits no longer."""
        self._error = self._error or error
        for event in self._events.values():
            event.set()

    async def _null(self, feature: int, explanation: Explanation) -> _Null | None:
        """The explanation of the next feature in the circle that has one with another text."""
        place, n = self._place[feature], len(self.ring)
        for step in range(1, min(NULL_REACH, n - 1) + 1):
            other = self.ring[(place + step) % n]
            if other in self._todo:
                await self._event(other).wait()
                if self._error is not None:
                    return None
            elif other not in self._explained:
                known = next(self.job.journal.features(self.job.key, [other]), None)
                self._explained[other] = known.explanation if known else None
            found = self._explained.get(other)
            if found is not None and found.text != explanation.text:
                return _Null(other, found)
        return None

    def _event(self, feature: int) -> anyio.Event:
        event = self._events.setdefault(feature, anyio.Event())
        if self._error is not None:
            event.set()
        return event

    async def _say(self, stage: str, state: _State, done: int, result: FeatureResult | None = None) -> None:
        if result is None:
            result = await anyio.to_thread.run_sync(self.job.result, state)
        self.job.on_event(Event(stage, result, done, len(self.left), self.progress(), state.reused))

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
        )


def _scrambled(indices: np.ndarray, seed: int) -> np.ndarray:
    """Numbers that look random, each from its index and the seed alone (SplitMix64, Steele et al. 2014), uint64 ``[index]``."""
    z = indices * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed + 1) * 0xD1B54A32D192ED03 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _settings_of(part: Any) -> dict[str, Any]:
    """Everything that a part's work depends on, as it says itself."""
    return getattr(part, "settings", None) or {"kind": type(part).__name__}


def _levels(simulation: Simulation | None) -> tuple[float, ...] | None:
    return None if simulation is None or simulation.expected is None else tuple(np.round(simulation.expected, 3).tolist())


def record_key(record: FeatureRecord) -> str:
    """A hash of a record's windows and activations."""
    windows = [
        [split, source, w.row, w.start, np.asarray(w.token_ids).tolist(), np.round(w.activations.astype(float), 4).tolist()]
        for split, by_source in record.splits.items()
        for source, ws in by_source.items()
        for w in ws
    ]
    return content_key([record.feature.sae, record.feature.index, round(record.scale, 6), windows])
