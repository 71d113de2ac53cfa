"""What a job would do and cost, found by going through it with stand-ins for everything that costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from featureinterp.codes.store import CodesStore
from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.score import Simulation
from featureinterp.domain.usage import Usage
from featureinterp.interfaces import Activator, Simulator, Steerer, settings_of
from featureinterp.jobs.journal import Journal, Rehearsal
from featureinterp.jobs.resolved import ResolvedJob, resolve
from featureinterp.jobs.run import engine_of
from featureinterp.jobs.spec import Job
from featureinterp.jobs.wiring import Local, Records, Steps, Wired, records_of
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.tally import Tallied
from featureinterp.registry import SIMULATORS

REHEARSED = 24
"""How many of a job's features a dry run goes through; the rest are taken to be like them."""


@dataclass(frozen=True)
class DryRun:
    """What a job would do. Requests, tokens and USD are estimates for all features that are left, from going
    through a sample of them with a model that answers at once; what an answer costs is guessed from its form.
    ``cost_usd`` None: the price is not known."""

    features: int
    done: int
    left: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


async def dry_run(job: Job, store: CodesStore, local: Local, *, steps: Steps = lambda *_: None) -> DryRun:
    """What a job would do and cost, without asking any model or writing anything."""
    settled = resolve(job, store)
    features = settled.features
    path = job.folder / "journal.sqlite"
    meter = Meter()
    model, judge = (
        Tallied(Cached(Metered(_Understudy(name), meter, price=price), ReplyStore(None)))
        for name, price in ((e.name_in(settled.dtype), e.price) for e in (settled.endpoint, settled.judge))
    )
    local = replace(local, causes=_no_causes)
    with Journal(path if path.exists() else ":memory:") as journal, Rehearsal(journal) as rehearsal:
        work = engine_of(_Rehearsed(settled, store, local, model, judge, rehearsal), rehearsal, meter)
        left = work.remaining(features)
        sample = left[:: max(1, -(-len(left) // REHEARSED))]
        if sample:
            await work.run(sample, records_of(settled, store, local, steps))
    used = meter.usage
    scale = len(left) / len(sample) if sample else 0.0
    requests, prompt_tokens, completion_tokens = (
        round(x * scale) for x in (used.requests, used.prompt_tokens, used.completion_tokens)
    )
    cost = None if used.cost_usd is None else used.cost_usd * scale
    return DryRun(
        len(features), len(features) - len(left), len(left), requests, prompt_tokens, completion_tokens, cost
    )


class _Rehearsed(Wired):
    """A job's parts with stand-ins for the subject model and for simulators that cost no requests but time;
    of the same settings, so that what is known already is found."""

    @cached_property
    def simulator(self) -> Simulator:
        """The job's own where it asks the language model, or costs nothing."""
        made, name = super().simulator, self.job.simulator.name
        free = name in SIMULATORS.own and not SIMULATORS.has(name, "local")
        return made if free or SIMULATORS.has(name, "asks") else _NoSimulator(made)

    @cached_property
    def activator(self) -> Activator:
        """The feature fires on none of the texts, so that every explanation is revised."""
        return _NoActivator(super().activator)

    @cached_property
    def steerer(self) -> Steerer:
        """Every text is another one, about as long as asked for."""
        return _NoSteerer(super().steerer)


def _no_causes(job: ResolvedJob, store: CodesStore) -> Records:
    """Stands for holistic activations, of prompts that are about as long: every token causes its own
    activation.
    """

    def add(records: Iterator[FeatureRecord]) -> Iterator[FeatureRecord]:
        for record in records:
            train = {
                s: tuple(replace(w, holistic=w.activations) for w in windows)
                for s, windows in record.splits.get("train", {}).items()
            }
            yield replace(record, splits={**record.splits, "train": train}, holistic=job.holistic)

    return add


class _NoSteerer:
    def __init__(self, real: Steerer) -> None:
        self.settings = settings_of(real)

    async def write(
        self,
        feature: int,
        amount: float,
        openings: Sequence[str],
        *,
        random: int | None = None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        return [f" text {feature} {amount} {random} {i}" + " word" * max_tokens for i in range(len(openings))]


class _NoActivator:
    """Reads nothing; has the settings of the real one, so that what is known already is found."""

    def __init__(self, real: Activator) -> None:
        self.settings = settings_of(real)

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        return [
            Window(
                i, i, np.zeros(n := len(text.split()), np.int32), tuple(text.split()), np.zeros(n, np.float32)
            )
            for i, text in enumerate(texts)
        ]


class _NoSimulator:
    """Stands for a simulator that costs no requests, of the same settings."""

    def __init__(self, simulator: Simulator) -> None:
        self.settings = settings_of(simulator)

    async def simulate(self, explanation: object, windows: Sequence[Window]) -> list[Simulation]:
        return [Simulation(np.zeros(len(w.pieces))) for w in windows]


class _Understudy:
    """Answers every request at once with the shortest usual reply, and with its likely number of tokens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._n = 0

    async def complete(self, request: Request) -> Reply:
        self._n += 1
        text = json.dumps(self._instance(dict(request.schema))) if request.schema is not None else "Yes"
        prompt = sum(len(m.content.encode()) // 4 + 4 for m in request.messages) + len(request.prompt)
        if request.prompt:
            return Reply(
                ("",),
                (False,),
                Usage(1, len(request.prompt), 1, 0.0, None),
                ({},),
                ({"0": -0.1},) * len(request.read_at),
            )
        first = {"Yes": -0.1, "No": -2.4, "2": -0.1} if request.top_logprobs else {}
        return Reply((text,), (False,), Usage(1, prompt, max(1, len(text) // 4), 0.0, None), (first,))

    def _instance(self, schema: dict[str, Any]) -> Any:
        match schema.get("type"):
            case "object":
                return {name: self._instance(inner) for name, inner in schema.get("properties", {}).items()}
            case "array":
                items = schema.get("prefixItems") or [schema["items"]] * max(1, schema.get("minItems", 1))
                return [self._instance(item) for item in items]
            case "string":
                return f"a phrase that is about as long as an explanation usually is {self._n}"
            case _:
                return 1
