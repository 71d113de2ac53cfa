"""Explaining and scoring features: records in, results out, with everything that was paid for kept in a
journal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import numpy as np

from featureinterp.domain.explanation import Explanation, Rule, SearchNode
from featureinterp.domain.intervention import Intervention
from featureinterp.domain.record import Window
from featureinterp.domain.result import FeatureResult
from featureinterp.domain.score import Failure, Score, Simulation
from featureinterp.domain.trial import Trial
from featureinterp.errors import (
    EndpointRefusedError,
    FeatureInterpError,
    InputError,
    JobStoppedError,
    LanguageModelError,
    StorageError,
)
from featureinterp.explain.baselines import TopTokens
from featureinterp.falsify.counterexamples import Falsifier, with_counterexamples
from featureinterp.falsify.intervention import Interventions
from featureinterp.files import content_key
from featureinterp.interfaces import Explainer, LanguageModel, Reviser, Simulator
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.jobs.feature import FeatureState, result_of, with_nulls
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.kept import simulations_of, value_of, working_on
from featureinterp.jobs.plan import Event, Outcome, Part, Plan
from featureinterp.jobs.schedule import RecordsOf, Run
from featureinterp.llm.metered import Meter
from featureinterp.llm.tally import count, tally
from featureinterp.score.complexity import Complexity
from featureinterp.score.correlation import agreement
from featureinterp.score.detection import Detection
from featureinterp.score.fuzzing import Fuzzing
from featureinterp.score.verdicts import Verdict, judge
from featureinterp.tasks import each

FORMAT = 3


class ExplainJob:
    """Explains and scores features. ``judge`` answers detection, fuzzing and complexity questions;
    ``falsifier`` puts explanations on trial, and ``reviser`` improves those that were contradicted;
    ``interventions`` push the subject along the feature while it writes. None leaves them out.

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
        explainer: Explainer,
        simulator: Simulator,
        *,
        judge: LanguageModel | None = None,
        falsifier: Falsifier | None = None,
        reviser: Reviser | None = None,
        interventions: Interventions | None = None,
        plan: Plan | None = None,
        source: Any = None,
        meter: Meter | None = None,
        budget: Budget | None = None,
        max_failure_rate: float = 0.5,
        document_name: Callable[[int], str] = str,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.journal, self.explainer, self.simulator, self.judge = journal, explainer, simulator, judge
        self.falsifier, self.reviser, self.interventions = falsifier, reviser, interventions
        self.plan = plan or Plan()
        self.meter = meter or Meter()
        self.document_name, self.on_event = document_name, on_event
        self.guard = Guard(budget or Budget(), lambda: self.meter.usage, max_failure_rate=max_failure_rate)
        self.meter.before, self.meter.fits = self.guard.before, self.guard.fits
        self.key = content_key({"format": FORMAT, "source": source, **self._settings()})

    def _settings(self) -> dict[str, Any]:
        plan, asked = self.plan, []
        if self.judge is not None:
            wanted = ((plan.detection, Detection), (plan.fuzzing, Fuzzing), (plan.complexity, Complexity))
            asked = [kind(self.judge).prompt.name + kind(self.judge).prompt.hash for on, kind in wanted if on]
        trial: dict[str, Any] = {}
        if self.falsifier is not None:
            trial["trial"] = [
                settings_of(self.falsifier),
                self.falsifier.trial.rounds,
                self.reviser and settings_of(self.reviser),
            ]
        if self.interventions is not None:
            trial["steering"] = settings_of(self.interventions)
        return {
            **trial,
            "explainer": settings_of(self.explainer),
            "simulator": settings_of(self.simulator) if plan.simulate else None,
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

    async def result(self, state: FeatureState) -> FeatureResult:
        """What is known of a feature, as a result."""
        return await anyio.to_thread.run_sync(result_of, state, self.plan, self.document_name)

    async def _stage(
        self,
        state: FeatureState,
        stage: str,
        depends: Mapping[str, Any],
        work: Callable[[], Any],
        provenance: Mapping[str, Any],
    ) -> Any | None:
        """The journalled value of a stage, or what ``work`` gives now; None when it failed. ``work`` returns
        (value, why parts of it failed).
        """
        key = content_key({"format": FORMAT, "stage": stage, "record": state.record_key, **depends})
        known = self.journal.get(key)
        if known is not None and known.status == "done":
            count(known.usage)
            return known.value
        state.reused = False
        with tally() as spent:
            try:
                value, gaps = await work()
            except (EndpointRefusedError, JobStoppedError, StorageError):
                raise
            except (
                FeatureInterpError
            ) as error:  # what goes wrong with one feature is a row and stops no other; a bug stops the run
                failure = Failure(state.record.feature.index, stage, type(error).__name__, str(error))
                if (
                    known is not None
                ):  # with gaps from an earlier run, which is more than nothing and holds their causes
                    state.partial = True
                else:
                    state.failures.append(failure)
                    self.journal.failed(key, failure, usage=spent.usage)
                self.guard.outcome(failure)
                return known.value if known is not None else None
            self.journal.stage(
                key,
                state.record.feature.index,
                stage,
                value,
                usage=spent.usage,
                provenance=provenance,
                gaps=gaps,
            )
        self.guard.outcome(None)
        state.partial = state.partial or bool(gaps)
        return value

    async def explain(self, state: FeatureState) -> None:
        """The stage ``explain``, and the baseline."""
        try:
            state.baseline = await TopTokens().explain(state.record)
        except InputError:
            state.baseline = None  # the explainer itself says why, as a failure of its own

        async def work() -> Any:
            with working_on(state.record.feature.index):
                explanation = await self.explainer.explain(state.record)
            return explanation.to_json(), [node.failure for node in explanation.search if node.failure]

        settings = settings_of(self.explainer)
        causes = {} if state.record.holistic is None else {"holistic": state.record.holistic}
        value = await self._stage(state, "explain", {"explainer": settings, **causes}, work, settings)
        state.explanation = Explanation.from_json(value) if value else None

    async def score(self, state: FeatureState) -> None:
        """The stages after ``explain``, for a feature that has an explanation."""
        explanation = state.explanation
        if explanation is None:
            return
        if self.plan.simulate:
            state.own = await self._simulated(state, "simulate", explanation, self.plan.parts())
            if state.null is not None:
                state.null_simulated = await self._simulated(
                    state, "simulate-null", state.null.explanation, self.plan.parts()
                )
            state.search = await self._search(state, explanation)
        if self.judge is not None:
            await self._ask(state, explanation, self.judge)
        if self.falsifier is not None:
            await self._try(state, explanation, self.falsifier)
        if self.interventions is not None:
            await self._steer(state, explanation, self.interventions)

    async def _simulated(
        self, state: FeatureState, stage: str, explanation: Explanation, parts: Sequence[tuple[Part, int]]
    ) -> dict[Part, list[Simulation]]:
        chosen = {part: state.record.get(*part)[:n] for part, n in parts}
        windows = [w for part in chosen.values() for w in part]

        async def work() -> Any:
            simulations = await self.simulator.simulate(explanation, windows)
            failed = [str(s.failure) for s in simulations if s.expected is None]
            if windows and len(failed) == len(windows):
                raise LanguageModelError(f"no window could be simulated: {failed[0]}")
            return value_of(simulations), failed

        settings = settings_of(self.simulator)
        depends = {
            "simulator": settings,
            "rules": [[r.activates_on, r.strength] for r in explanation.rules],
            "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
        }
        value = await self._stage(state, stage, depends, work, settings)
        if value is None:
            return {}
        simulations = iter(simulations_of(value))
        return {part: [next(simulations) for _ in windows] for part, windows in chosen.items()}

    async def _search(self, state: FeatureState, explanation: Explanation) -> tuple[SearchNode, ...]:
        """The nodes of a search with their correlations on the test windows, which the search itself never
        sees.
        """
        parts = self.plan.main_parts()
        simulated: dict[tuple[Rule, ...], float | None] = {}

        async def test(rules: tuple[Rule, ...]) -> None:
            chosen = rules == explanation.rules
            found = (
                state.own
                if chosen
                else await self._simulated(
                    state, "simulate-search-test", replace(explanation, rules=rules), parts
                )
            )
            simulations = [
                (w, s)
                for part, _ in parts
                for w, s in zip(state.record.get(*part), found.get(part, ()), strict=False)
            ]
            simulated[rules] = agreement([w for w, _ in simulations], [s for _, s in simulations]).value

        await each(test, dict.fromkeys(node.rules for node in explanation.search if node.rules))
        return tuple(replace(node, test=simulated.get(node.rules)) for node in explanation.search)

    async def _try(self, state: FeatureState, explanation: Explanation, falsifier: Falsifier) -> None:
        """Explain, falsify, revise: the explanation's trial, and while texts contradict it and rounds are
        left, a revision and its trial.
        """
        record, rounds = state.record, falsifier.trial.rounds
        settings = settings_of(falsifier)
        for number in range(rounds):
            tried = state.revised or explanation

            async def trial(tried: Explanation = tried) -> Any:
                return (await falsifier.run(tried, record)).to_json(), ()

            rules = [[r.activates_on, r.strength] for r in tried.rules]
            value = await self._stage(
                state, "falsify", {"falsifier": settings, "rules": rules}, trial, settings
            )
            if value is None:
                return
            state.trials.append(Trial.from_json(value))
            if number + 1 == rounds or self.reviser is None or not state.trials[-1].contradictions:
                return
            revised = await self._revised(state, tried, self.reviser)
            if revised is None or revised.rules == tried.rules:
                return
            state.revised = revised
            simulated = await self._simulated(state, "simulate-revised", revised, self.plan.main_parts())
            pairs = [
                (w, s)
                for part, _ in self.plan.main_parts()
                for w, s in zip(record.get(*part), simulated.get(part, ()), strict=False)
            ]
            state.revised_correlation = agreement([w for w, _ in pairs], [s for _, s in pairs]).value

    async def _revised(self, state: FeatureState, tried: Explanation, reviser: Reviser) -> Explanation | None:
        """What the reviser makes of an explanation that was contradicted."""
        record = with_counterexamples(state.record, state.trials)

        async def revise() -> Any:
            with working_on(record.feature.index):
                return (await reviser.revise(record, tried)).to_json(), ()

        settings = settings_of(reviser)
        depends = {
            "reviser": settings,
            "trials": [t.to_json() for t in state.trials],
            "rules": [[r.activates_on, r.strength] for r in tried.rules],
        }
        value = await self._stage(state, "revise", depends, revise, settings)
        return Explanation.from_json(value) if value else None

    async def _steer(
        self, state: FeatureState, explanation: Explanation, interventions: Interventions
    ) -> None:
        """What the subject writes at every dose, and how well it fits the explanation."""
        settings = settings_of(interventions)

        async def write() -> Any:
            return (await interventions.write(state.record.feature, state.record.scale)).to_json(), ()

        value = await self._stage(state, "steer", {"steering": settings}, write, settings)
        if value is None:
            return
        written = Intervention.from_json(value)

        async def judge() -> Any:
            found = await interventions.judged(explanation, written)
            return found.to_json(), ["a text could not be judged" for t in found.texts if t.match is None]

        judge_settings = settings_of(interventions.judge)
        value = await self._stage(
            state,
            "steer-judged",
            {"texts": value, "explanation": explanation.text, "judge": judge_settings},
            judge,
            judge_settings,
        )
        state.intervention = written if value is None else Intervention.from_json(value)

    async def _asked(
        self,
        state: FeatureState,
        stage: str,
        scorer: Detection | Fuzzing,
        explanation: Explanation,
        windows: Sequence[Window],
    ) -> list[Score] | None:
        """The scores of a stage of questions; None when it failed."""

        async def work() -> Any:
            _, verdicts, _ = await scorer.run(explanation, windows, seed=self.plan.seed)
            failed = [v.failure for v in verdicts if v.failure]
            if verdicts and len(failed) == len(verdicts):
                raise LanguageModelError(f"no question was answered: {failed[0]}")
            return [[v.label, v.said, v.probability, v.failure, v.row] for v in verdicts], failed

        provenance = {
            "model": scorer.model.name,
            "prompt": scorer.prompt.name,
            "prompt_hash": scorer.prompt.hash,
        }
        depends = {
            "text": explanation.text,
            "model": scorer.model.name,
            "prompt": scorer.prompt.hash,
            "seed": self.plan.seed,
            "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
        }
        value = await self._stage(state, stage, depends, work, provenance)
        if value is None:
            return None
        verdicts = [Verdict(*v) for v in value]
        return await anyio.to_thread.run_sync(
            partial(judge, stage.removesuffix("-null"), verdicts, seed=self.plan.seed)
        )

    async def _ask(self, state: FeatureState, explanation: Explanation, judge_model: LanguageModel) -> None:
        """Detection, fuzzing and complexity; each is a stage of its own."""
        record = state.record
        top = record.get("test", "top")[: self.plan.n_test]
        by_kind = (
            [w for w in record.get("test", source)[: self.plan.n_test] if not w.fires]
            for source in self.plan.negatives
        )
        silent = [w for of_each in zip_longest(*by_kind) for w in of_each if w is not None][: len(top)]
        for name, wanted, scorer, windows in (
            ("detection", self.plan.detection, Detection(judge_model), (*top, *silent)),
            ("fuzzing", self.plan.fuzzing, Fuzzing(judge_model), top),
        ):
            if not wanted:
                continue
            scores = await self._asked(state, name, scorer, explanation, windows)
            if scores is None:
                continue
            nulls = (
                await self._asked(state, f"{name}-null", scorer, state.null.explanation, windows)
                if state.null is not None
                else None
            )
            state.asked += with_nulls(scores, nulls or [])
        if self.plan.complexity:
            complexity = Complexity(judge_model)

            async def rate() -> Any:
                score, ratings, _ = await complexity.run(explanation)
                if ratings and not any(r is not None for r in ratings):
                    raise LanguageModelError(f"no rule could be rated: {score.undefined}")
                return {"score": score.to_json(), "ratings": ratings}, [
                    "a rule could not be rated" for r in ratings if r is None
                ]

            provenance = {
                "model": judge_model.name,
                "prompt": complexity.prompt.name,
                "prompt_hash": complexity.prompt.hash,
            }
            depends = {
                "rules": [r.activates_on for r in explanation.rules],
                "model": judge_model.name,
                "prompt": complexity.prompt.hash,
            }
            value = await self._stage(state, "complexity", depends, rate, provenance)
            if value is not None:
                state.asked.append(Score.from_json(value["score"]))
                state.ratings = tuple(value["ratings"])


def _scrambled(indices: np.ndarray, seed: int) -> np.ndarray:
    """Numbers that look random, each from its index and the seed alone (SplitMix64, Steele et al. 2014),
    uint64 ``[index]``.
    """
    z = indices * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed + 1) * 0xD1B54A32D192ED03 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def settings_of(part: Any) -> dict[str, Any]:
    """Everything that a part's work depends on, as it says itself."""
    return getattr(part, "settings", None) or {"kind": type(part).__name__}
