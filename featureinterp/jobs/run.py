"""From a job to its outcome: the parts it names, put together, and run against its journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.claims import check_free, claim, owned
from featureinterp.codes.store import CodesStore
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.result import FeatureResult
from featureinterp.domain.score import Simulation
from featureinterp.domain.usage import Usage
from featureinterp.errors import InputError
from featureinterp.explain.baselines import TopTokens
from featureinterp.explain.one_shot import OneShot
from featureinterp.explain.tree import Tree
from featureinterp.falsify.counterexamples import Falsifier
from featureinterp.falsify.intervention import Interventions
from featureinterp.files import explained_storage, parse_json
from featureinterp.interfaces import Activator, Explainer, LanguageModel, Simulator, Steerer
from featureinterp.jobs.budget import check_endpoint
from featureinterp.jobs.explain import ExplainJob, settings_of
from featureinterp.jobs.journal import Journal, Rehearsal
from featureinterp.jobs.kept import KeptSimulator
from featureinterp.jobs.plan import Event, Outcome
from featureinterp.jobs.records import build_records, parse_features
from featureinterp.jobs.results import KeptResults
from featureinterp.jobs.spec import Job
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.config import LOCAL, Endpoint, load_config
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.stack import open_stack
from featureinterp.llm.tally import Tallied
from featureinterp.llm.types import Reply, Request
from featureinterp.records.build import Neighbours
from featureinterp.score.correlation import agreement
from featureinterp.score.detection import FitJudge
from featureinterp.simulate.lexical import Lexical
from featureinterp.simulate.prompt_logprobs import PromptLogprobs
from featureinterp.simulate.rated import Rated
from featureinterp.stored.sums import write_marker

HOLISTIC = {
    "exact": "exact, every token left out in turn",
    "gradient": "approximate, gradient times embedding",
}
REHEARSED = 24
"""How many of a job's features a dry run goes through; the rest are taken to be like them."""

JOB_PARTS = (
    "job.json",
    "journal.sqlite",
    "journal.sqlite-wal",
    "journal.sqlite-shm",
    "results.jsonl",
    "about.json",
    "report.html",
)
"""What a job's folder holds that is of its codes; replies are of their requests."""

Steps = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Local:
    """What needs a model library: the local simulator of a job; model and tokenizer of a name for a job, and
    the dtype that they are loaded in; a tokenizer alone; what adds holistic activations to the records of a
    job; which features have the nearest decoder directions; and a job's model and SAE on new texts and as a
    writer."""

    simulator: Callable[[Job], Simulator]
    load: Callable[[Job, str], tuple[Any, Any]]
    dtype: Callable[[Job], str]
    tokenizer: Callable[[str], Any]
    causes: Callable[[Job, CodesStore], Callable[[Iterator[FeatureRecord]], Iterator[FeatureRecord]]]
    neighbours: Callable[[Job, CodesStore], Neighbours]
    activator: Callable[[Job, CodesStore], Activator]
    steerer: Callable[[Job, CodesStore], Steerer]


@dataclass(frozen=True)
class Ran:
    """A run of a job: its outcome, what is known of the features in the order that was asked for, and what a
    report says above them.
    """

    outcome: Outcome
    results: Sequence[FeatureResult]
    about: dict[str, Any]


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


async def run_job(
    job: Job,
    store: CodesStore,
    local: Local,
    *,
    retry_failed: bool = False,
    replace: bool = False,
    write: Callable[[Ran], None] = lambda _: None,
    on_event: Callable[[Event], None] = lambda _: None,
    steps: Steps = lambda *_: None,
) -> Ran:
    """Runs a job as far as it gets. What is in its journal is not done again; a job that is through asks
    nothing at all. ``retry_failed``: what was answered unusably is asked again. ``replace``: a job on other
    codes in the folder is deleted, but for its replies. ``write``: is given the outcome while the folder is
    held.

    Raises ``InputError`` for what cannot work and a ``LanguageModelError`` when the endpoint cannot be used
    at all, both before anything is written, and ``FolderInUseError`` when another process works in the
    folder.
    """
    endpoint, features = job.endpoint, _features(job, store)
    config = load_config()
    check_free(job.folder)
    meter = Meter()
    path = job.folder / "journal.sqlite"
    async with AsyncExitStack() as opened:
        endpoints = (
            [endpoint] if job.judge_endpoint == endpoint else [endpoint, job.judge_endpoint]
        )  # never twice, as each has limits of its own
        parts: dict[str, Any] = {
            "load": partial(local.load, job),
            "dtype": partial(local.dtype, job),
            "tokenizer": local.tokenizer,
        }
        stack, *own = [
            await opened.enter_async_context(open_stack(e, meter, price=config.price(e), **parts))
            for e in endpoints
        ]
        if _asks(job) and not path.exists():
            price = config.price(endpoint)
            await check_endpoint(
                stack.check, endpoint.model, budget=job.budget, price=price, path=config.path
            )
        opened.enter_context(owned(job.folder, "explain"))
        claim_job(job, store, replace=replace)
        with (
            explained_storage(job.folder),
            Journal(path) as journal,
            closing(ReplyStore(job.folder / "replies.sqlite")) as replies,
        ):
            journal.check()
            replies.check()
            model = stack.model(replies, retry_failed=retry_failed)
            judge = own[0].model(replies, retry_failed=retry_failed) if own else model
            explainer, simulator = _parts(job, model, local, journal)
            tests = _tests(job, store, model, judge, simulator, local, journal)
            work = _explain_job(job, store, journal, explainer, simulator, judge, meter, on_event, tests)
            written = {"key": work.key, "job": job.model_dump(mode="json"), "features": features}
            write_marker(job.folder / "job.json", written)
            if left := len(work.remaining(features)):
                steps("explained", 0, left)
            outcome = await work.run(features, _records(job, store, local, steps))
        about = _about(store, job, endpoint, explainer, simulator, outcome)
        ran = Ran(outcome, KeptResults(path, work.key, features), about)
        write(ran)
    return ran


def claim_job(job: Job, store: CodesStore, *, replace: bool = False) -> None:
    """Claims a job's folder for the codes that it is about. Everything else that a job depends on is part of
    its journal's keys.
    """
    asked = {"codes": store.fingerprint}

    def earlier() -> dict[str, str] | None:
        try:
            run = Path(parse_json((job.folder / "job.json").read_text(encoding="utf-8"))["job"]["run"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return asked if run.resolve() == job.run.resolve() else None

    about, anew = {"run": str(job.run)}, "'featureinterp explain --replace' (or run)"
    claim(
        job.folder, "a job", asked, parts=JOB_PARTS, about=about, replace=replace, earlier=earlier, anew=anew
    )


async def dry_run(job: Job, store: CodesStore, local: Local, *, steps: Steps = lambda *_: None) -> DryRun:
    """What a job would do and cost, without asking any model or writing anything."""
    endpoint, features = job.endpoint, _features(job, store)
    config = load_config()
    path = job.folder / "journal.sqlite"
    meter = Meter()
    asked = [(_name_of(e, job, local), config.price(e)) for e in (endpoint, job.judge_endpoint)]
    model, judge = (
        Tallied(Cached(Metered(_Understudy(name), meter, price=price), ReplyStore(None)))
        for name, price in asked
    )
    real = local.simulator
    local = replace(
        local,
        simulator=lambda job: _NoSimulator(real(job)),
        causes=_no_causes,
        activator=_no_activator(local),
        steerer=_no_steerer(local),
    )
    with Journal(path if path.exists() else ":memory:") as journal, Rehearsal(journal) as rehearsal:
        explainer, simulator = _parts(job, model, local, rehearsal)
        tests = _tests(job, store, model, judge, simulator, local, rehearsal)
        work = _explain_job(job, store, rehearsal, explainer, simulator, judge, meter, lambda _: None, tests)
        left = work.remaining(features)
        sample = left[:: max(1, -(-len(left) // REHEARSED))]
        if sample:
            await work.run(sample, _records(job, store, local, steps))
    used = meter.usage
    scale = len(left) / len(sample) if sample else 0.0
    requests, prompt_tokens, completion_tokens = (
        round(x * scale) for x in (used.requests, used.prompt_tokens, used.completion_tokens)
    )
    cost = None if used.cost_usd is None else used.cost_usd * scale
    return DryRun(
        len(features), len(features) - len(left), len(left), requests, prompt_tokens, completion_tokens, cost
    )


def _name_of(endpoint: Endpoint, job: Job, local: Local) -> str:
    """The name that the model of a job's endpoint has in its keys."""
    return endpoint.name_in(local.dtype(job) if endpoint.base_url == LOCAL else None)


def _asks(job: Job) -> bool:
    """Whether a job needs its language model at all."""
    return (
        job.explainer != "top-tokens"
        or job.simulator in ("rated", "prompt-logprobs")
        or not {"score", "falsify", "steer"}.isdisjoint(job.stages)
    )


def _features(job: Job, store: CodesStore) -> list[int]:
    if isinstance(job.features, str):
        return parse_features(job.features, store)
    for index in job.features:
        store.check_feature(index)
    return list(dict.fromkeys(job.features))


def _parts(job: Job, model: LanguageModel, local: Local, journal: Journal) -> tuple[Explainer, Simulator]:
    simulator = _simulator(job, model, local)
    if job.explainer == "top-tokens":
        return TopTokens(), simulator
    if job.explainer == "tree":
        return Tree(
            model, job.form(), KeptSimulator(simulator, journal), agreement, tree=job.tree, seed=job.plan.seed
        ), simulator
    return OneShot(model, job.form()), simulator


def _tests(
    job: Job,
    store: CodesStore,
    model: LanguageModel,
    judge: LanguageModel,
    simulator: Simulator,
    local: Local,
    journal: Journal,
) -> dict[str, Any]:
    """What puts explanations on trial, what revises those that fail (one level of a tree search), and what
    pushes the subject.
    """
    found: dict[str, Any] = {}
    if "falsify" in job.stages:
        shape = replace(job.tree, roots=1, depth=1, width=1)
        found["falsifier"] = Falsifier(
            model, local.activator(job, store), FitJudge(judge), job.trial, seed=job.plan.seed
        )
        found["reviser"] = Tree(
            model, job.form(), KeptSimulator(simulator, journal), agreement, tree=shape, seed=job.plan.seed
        )
    if "steer" in job.stages:
        found["interventions"] = Interventions(
            local.steerer(job, store),
            local.activator(job, store),
            FitJudge(judge),
            job.steering,
            seed=job.plan.seed,
        )
    return found


def _simulator(job: Job, model: LanguageModel, local: Local) -> Simulator:
    if job.simulator == "rated":
        return Rated(model)
    if job.simulator == "lexical":
        return Lexical()
    if job.simulator == "prompt-logprobs":
        temperature, chat = job.simulator_temperature, job.simulator_chat
        return PromptLogprobs(
            model, lambda: local.tokenizer(_tokenizer_name(job.endpoint)), temperature=temperature, chat=chat
        )
    return local.simulator(job)


def _tokenizer_name(endpoint: Endpoint) -> str:
    if endpoint.base_url is None:
        raise InputError(
            "the embedded model's server does not read prompts: use --simulator token-wise, or give an "
            "endpoint that does"
        )
    return endpoint.tokenizer or endpoint.model


def _explain_job(
    job: Job,
    store: CodesStore,
    journal: Journal,
    explainer: Explainer,
    simulator: Simulator,
    judge: LanguageModel,
    meter: Meter,
    on_event: Callable[[Event], None],
    tests: Mapping[str, Any],
) -> ExplainJob:
    plan = job.effective_plan
    names = store.windows.document_ids()
    return ExplainJob(
        journal,
        explainer,
        simulator,
        judge=judge if plan.detection or plan.fuzzing or plan.complexity else None,
        **tests,
        plan=plan,
        source=[store.fingerprint, *_drawn(job)],
        meter=meter,
        budget=job.budget,
        max_failure_rate=job.max_failure_rate,
        document_name=names.__getitem__,
        on_event=on_event,
    )


def _drawn(job: Job) -> list[Any]:
    """What records depend on beside the store."""
    policy = job.policy
    found: list[Any] = [policy.seed, policy.n_quantiles, policy.half_width, list(policy.counts.items())]
    if policy.wants("projected_similar", "projected_similar_negative"):
        found.append(policy.projection)
    if policy.wants("coactive_negative"):
        found.append(policy.n_neighbours)
    return found if job.holistic is None else [*found, job.holistic]


def _records(
    job: Job, store: CodesStore, local: Local, steps: Steps
) -> Callable[[Sequence[int]], Iterator[FeatureRecord]]:
    def records(features: Sequence[int]) -> Iterator[FeatureRecord]:
        policy = job.policy
        neighbours = local.neighbours(job, store) if policy.wants("coactive_negative") else None
        built = build_records(
            job.run,
            store,
            features,
            policy,
            neighbours=neighbours,
            progress=lambda done, total: steps("windows embedded", done, total),
        )
        return built if job.holistic is None else local.causes(job, store)(built)

    return records


def _no_causes(job: Job, store: CodesStore) -> Callable[[Iterator[FeatureRecord]], Iterator[FeatureRecord]]:
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


def _no_activator(local: Local) -> Callable[[Job, CodesStore], Activator]:
    """Stands for texts through the model: the feature fires on none of them, so that every explanation is
    revised.
    """

    def make(job: Job, store: CodesStore) -> Activator:
        return _NoActivator(local.activator(job, store))

    return make


def _about(
    store: CodesStore,
    job: Job,
    endpoint: Endpoint,
    explainer: Explainer,
    simulator: Simulator,
    outcome: Outcome,
) -> dict[str, Any]:
    from featureinterp import __version__

    meta, n = store.meta, len(outcome.status)
    settings = [getattr(p, "settings", {}) for p in (explainer, simulator)]
    facts = {
        "Subject": f"{meta['model']['name']} ({meta['model']['dtype']})",
        "SAE": f"{meta['sae']['name']}, {meta['sae']['architecture']}, {store.n_features:,} features at "
        f"{meta['sae']['hook']}",
        "Corpus": f"{meta['corpus']['name']}: {store.windows.n_tokens:,} tokens in {len(store.windows):,} "
        f"windows of {store.windows.length}",
        "Explainer": job.explainer if job.explainer == "top-tokens" else f"{job.explainer}, {endpoint.model}",
        **({"Holistic activations": HOLISTIC[job.holistic]} if job.holistic else {}),
        "Simulator": _named(job.simulator, settings[1]) if "simulate" in job.stages else "none",
        "Prompts": ", ".join(f"{s['prompt']} {s['prompt_hash'][:8]}" for s in settings if s.get("prompt"))
        or "none",
        "Windows judged": f"{job.plan.n_test} of each kind, from documents that the explainer did not see",
        "Fingerprints": f"model {meta['model']['fingerprint'][:12]}, SAE "
        f"{meta['sae']['fingerprint'][:12]}, windows {meta['corpus']['windows'][:12]}",
        "Made with": f"featureinterp {__version__}",
    }
    title = f"{n} feature{'' if n == 1 else 's'} of {meta['model']['name']}"
    return {
        "title": title,
        "subtitle": f"SAE {meta['sae']['name']} at {meta['sae']['hook']}, explained and tested",
        "facts": facts,
        "job": outcome.job,
    }


def _named(simulator: str, settings: Mapping[str, Any]) -> str:
    """A simulator with its model and the dtype that it runs in."""
    model, dtype = settings.get("model", ""), settings.get("dtype")
    return f"{simulator} {model}{f' ({dtype})' if dtype else ''}".strip()


def _no_steerer(local: Local) -> Callable[[Job, CodesStore], Steerer]:
    """Stands for a subject that writes: every text is another one, about as long as asked for."""

    def make(job: Job, store: CodesStore) -> Steerer:
        return _NoSteerer(local.steerer(job, store))

    return make


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
