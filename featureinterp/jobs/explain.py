"""Explaining and scoring a list of features: records in, results out, with everything that was paid for kept in a journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord, Source, SplitName, Window
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Failure, Score, Simulation
from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    EndpointRefusedError,
    FeatureInterpError,
    InputError,
    LanguageModelError,
)
from featureinterp.explain.baselines import TopTokens
from featureinterp.files import content_key
from featureinterp.interfaces import Explainer, LanguageModel, Simulator
from featureinterp.jobs.journal import Journal
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

FORMAT = 2
Part = tuple[SplitName, Source]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a screen may show: ``stage`` ("explained", "scored"), the feature, and how many of ``total`` are through it."""

    stage: str
    result: FeatureResult
    done: int
    total: int
    reused: bool = False


@dataclass(frozen=True)
class Plan:
    """How explanations are judged.

    ``n_test``, ``n_valid``: windows per source at most. ``negatives``: the kinds of windows that top windows are put beside, each
    giving a correlation of its own; the first is the main one, and the null and the affine fit use it.
    """

    n_test: int = 10
    n_valid: int = 5
    negatives: tuple[Source, ...] = ("random", "similar_negative", "random_negative")
    detection: bool = True
    fuzzing: bool = True
    complexity: bool = True
    concurrency: int = 4
    seed: int = 0

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


class ExplainJob:
    """Explains and scores features. ``judge`` answers detection, fuzzing and complexity questions; None leaves them out.

    The failure of one feature is a row with its cause and stops nothing; a refused key or model stops everything at once.
    """

    def __init__(
        self,
        journal: Journal,
        explainer: Explainer,
        simulator: Simulator,
        *,
        judge: LanguageModel | None = None,
        plan: Plan | None = None,
        document_name: Callable[[int], str] = str,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.journal, self.explainer, self.simulator, self.judge = journal, explainer, simulator, judge
        self.plan = plan or Plan()
        self.document_name, self.on_event = document_name, on_event
        self.usage = Usage()

    async def run(self, records: Sequence[FeatureRecord]) -> list[FeatureResult]:
        """The results of all features, in order. Explains all of them first, so that each can be the null of another."""
        states = [_State(record) for record in records]
        explained = scored = 0

        async def explain(state: _State) -> None:
            nonlocal explained
            reused = await self._explain(state)
            explained += 1
            self.on_event(Event("explained", self._result(state), explained, len(states), reused))

        async def score(state: _State) -> None:
            nonlocal scored
            reused = await self._score(state)
            scored += 1
            self.on_event(Event("scored", self._result(state), scored, len(states), reused))

        await self._each(explain, states)
        self._choose_nulls(states)
        await self._each(score, states)
        return [self._result(state) for state in states]

    async def _each(self, work: Callable[[_State], Any], states: Sequence[_State]) -> None:
        """``work`` on every state, at most ``concurrency`` at once."""
        slots = anyio.Semaphore(self.plan.concurrency)
        errors: list[BaseException] = []

        async def one(state: _State) -> None:
            try:
                await work(state)
            except (FeatureInterpError, OSError) as error:
                errors.append(error)
            finally:
                slots.release()

        async with anyio.create_task_group() as group:
            for state in states:
                await slots.acquire()
                if errors:
                    slots.release()
                    break
                group.start_soon(one, state)
        if errors:
            raise errors[0]

    def _choose_nulls(self, states: Sequence[_State]) -> None:
        """Each feature's null is the next feature, in a shuffled circle, that has an explanation with another text."""
        ring = [states[i] for i in np.random.default_rng(self.plan.seed).permutation(len(states))]
        for place, state in enumerate(ring):
            for other in (*ring[place + 1 :], *ring[:place]):
                if other.explanation and state.explanation and other.explanation.text != state.explanation.text:
                    state.null = _Null(other.record.feature.index, other.explanation)
                    break

    async def _stage(self, state: _State, stage: str, depends: Mapping[str, Any], work: Callable[[], Any]) -> tuple[Any | None, bool]:
        """The journalled value of a stage, or what ``work`` gives now: (value or None when it failed, whether it was reused)."""
        key = content_key({"format": FORMAT, "stage": stage, "record": record_key(state.record), **depends})
        known = self.journal.get(key)
        if known is not None:
            return known, True
        try:
            value = await work()
        except EndpointRefusedError:
            raise
        except (LanguageModelError, InputError) as error:
            failure = Failure(state.record.feature.index, stage, type(error).__name__, str(error))
            state.failures.append(failure)
            self.journal.failed(key, failure)
            return None, False
        self.journal.done(key, state.record.feature.index, stage, value)
        return value, False

    async def _explain(self, state: _State) -> bool:
        try:
            state.baseline = await TopTokens().explain(state.record)
        except InputError:
            state.baseline = None  # the explainer itself says why, as a failure of its own

        async def work() -> Any:
            explanation = await self.explainer.explain(state.record)
            self.usage += explanation.provenance.usage
            return explanation.to_json()

        value, reused = await self._stage(state, "explain", {"explainer": getattr(self.explainer, "settings", {})}, work)
        state.explanation = Explanation.from_json(value) if value else None
        return reused

    async def _score(self, state: _State) -> bool:
        explanation = state.explanation
        if explanation is None:
            return True
        own, reused = await self._simulated(state, "simulate", explanation, self.plan.parts())
        state.own = own
        if state.null is not None:
            state.null_simulated, again = await self._simulated(state, "simulate-null", state.null.explanation, self.plan.null_parts())
            reused = reused and again
        if self.judge is not None:
            reused = await self._ask(state, explanation, self.judge) and reused
        return reused

    async def _simulated(
        self, state: _State, stage: str, explanation: Explanation, parts: Sequence[tuple[Part, int]]
    ) -> tuple[dict[Part, list[Simulation]], bool]:
        chosen = {part: state.record.get(*part)[:n] for part, n in parts}
        windows = [w for part in chosen.values() for w in part]

        async def work() -> Any:
            simulations = await self.simulator.simulate(explanation, windows)
            if windows and all(s.expected is None for s in simulations):
                raise LanguageModelError(f"no window could be simulated: {simulations[0].failure}")
            return [{"failure": s.failure} if s.expected is None else np.round(s.expected, 5).tolist() for s in simulations]

        depends = {
            "simulator": getattr(self.simulator, "settings", {"simulator": type(self.simulator).__name__}),
            "rules": [[r.activates_on, r.strength] for r in explanation.rules],
            "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
        }
        value, reused = await self._stage(state, stage, depends, work)
        if value is None:
            return {}, reused
        simulations = iter([Simulation(None, v["failure"]) if isinstance(v, dict) else Simulation(np.array(v)) for v in value])
        return {part: [next(simulations) for _ in windows] for part, windows in chosen.items()}, reused

    async def _ask(self, state: _State, explanation: Explanation, judge_model: LanguageModel) -> bool:
        """Detection, fuzzing and complexity; each is a stage of its own."""
        record, reused = state.record, True
        top = record.get("test", "top")[: self.plan.n_test]
        silent = [w for source in self.plan.negatives for w in record.get("test", source)[: self.plan.n_test] if not w.fires][: len(top)]
        for name, wanted, scorer, windows in (
            ("detection", self.plan.detection, Detection(judge_model), (*top, *silent)),
            ("fuzzing", self.plan.fuzzing, Fuzzing(judge_model), top),
        ):
            if not wanted:
                continue

            async def work(scorer: Any = scorer, windows: Sequence[Window] = windows) -> Any:
                _, verdicts, usage = await scorer.run(explanation, windows, seed=self.plan.seed)
                self.usage += usage
                return [[v.label, v.said, v.probability, v.failure, v.row] for v in verdicts]

            depends = {
                "text": explanation.text,
                "model": judge_model.name,
                "prompt": scorer.prompt.hash,
                "seed": self.plan.seed,
                "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
            }
            value, again = await self._stage(state, name, depends, work)
            reused = reused and again
            if value is not None:
                state.asked += judge(name, [Verdict(*v) for v in value], seed=self.plan.seed)
        if self.plan.complexity:
            complexity = Complexity(judge_model)

            async def rate() -> Any:
                score, ratings, usage = await complexity.run(explanation)
                self.usage += usage
                return {"score": score.to_json(), "ratings": ratings}

            depends = {"rules": [r.activates_on for r in explanation.rules], "model": judge_model.name, "prompt": complexity.prompt.hash}
            value, again = await self._stage(state, "complexity", depends, rate)
            reused = reused and again
            if value is not None:
                state.asked.append(Score.from_json(value["score"]))
                state.ratings = tuple(value["ratings"])
        return reused

    def _result(self, state: _State) -> FeatureResult:
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
