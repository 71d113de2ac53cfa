"""The verbs as Python functions: what the command line calls, and a notebook can."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from featureinterp.domain.result import FeatureResult
from featureinterp.errors import InputError
from featureinterp.files import explained_storage
from featureinterp.jobs.explain import Event, ExplainJob, Plan

if TYPE_CHECKING:
    from featureinterp.codes.store import CodesStore
    from featureinterp.domain.record import FeatureRecord
    from featureinterp.interfaces import Explainer, LanguageModel, Simulator
    from featureinterp.records.build import RecordPolicy

SUBJECT, SAE, CORPUS, EXPLAINER = "smollm2-135m-instruct", "demo", "sotu", "qwen2.5-coder-1.5b-instruct"
Steps = Callable[[str, int, int], None]
"""Called with (what is going on, done, in all)."""


def _silent(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. ``base_url`` None stands for the embedded model ``model``."""

    base_url: str | None = None
    model: str = EXPLAINER
    api_key_env: str | None = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout_s: float = 120.0
    max_attempts: int = 6


@dataclass(frozen=True)
class Results(Sequence[FeatureResult]):
    """The results of a job and where they lie. Draws itself as a table in a notebook."""

    features: tuple[FeatureResult, ...]
    folder: Path
    about: dict[str, Any]

    @overload
    def __getitem__(self, index: int) -> FeatureResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FeatureResult]: ...
    def __getitem__(self, index: int | slice) -> FeatureResult | Sequence[FeatureResult]:
        return self.features[index]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def n_failures(self) -> int:
        """Stages that failed, over all features."""
        return sum(len(r.failures) for r in self.features)

    def to_json(self) -> dict[str, Any]:
        """A summary for programs: one entry per feature, without windows."""
        rows = []
        for r in self.features:
            row = r.to_json()
            row.pop("windows")
            rows.append(row)
        return {"folder": str(self.folder), "n_failures": self.n_failures, "features": rows}

    def _repr_html_(self) -> str:
        from featureinterp.report.table import results_table

        return results_table(self.features)


def collect(
    *,
    out: str | Path,
    model: str = SUBJECT,
    sae: str = SAE,
    corpus: str = CORPUS,
    max_tokens: int | None = None,
    window: int = 32,
    text_field: str = "text",
    max_per_document: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    value_dtype: str = "float16",
    batch_tokens: int | None = None,
    steps: Steps = _silent,
) -> CodesStore:
    """Runs a subject model and an SAE over a corpus and stores every positive code under ``out``.

    Reuses what is complete there and goes on with what is not. Raises an ``InputError`` before anything is written when the parts do
    not exist or do not fit together.
    """
    from featureinterp.codes.collect import BATCH_TOKENS, check_fit
    from featureinterp.codes.collect import collect as run_collect
    from featureinterp.corpus.text import load_corpus
    from featureinterp.corpus.windows import WindowPolicy
    from featureinterp.sae.load import load_sae
    from featureinterp.subject.load import load_subject, pick_device

    policy = WindowPolicy(window, min(8, window), max_tokens, max_per_document)
    loaded_sae = load_sae(sae, device=pick_device(device))
    texts = load_corpus(corpus, text_field=text_field)
    subject = load_subject(model, device=device, dtype=dtype)
    check_fit(subject, loaded_sae)
    return run_collect(
        subject,
        loaded_sae,
        texts,
        Path(out),
        policy,
        value_dtype=value_dtype,
        batch_tokens=batch_tokens or BATCH_TOKENS,
        progress=lambda done, total: steps("tokens", done, total),
    )


def open_run(run: str | Path) -> CodesStore:
    """Opens the codes that ``collect`` stored. Raises ``InputError`` or ``IncompleteStoreError`` when there are none."""
    from featureinterp.codes.store import CodesStore

    if not Path(run).is_dir():
        raise InputError(f"there is no run folder {run}: give the folder that 'featureinterp collect' wrote with --out")
    return CodesStore.open(Path(run))


def records(
    run: str | Path, features: str | Sequence[int] = "0:100", *, policy: RecordPolicy | None = None, embedder: str | None = None, steps: Steps = _silent
) -> Iterator[FeatureRecord]:
    """Records of features of a run: indices, or text such as ``0:100``, ``3,17``, ``random:20``, ``alive``."""
    from featureinterp.jobs.records import build_records, parse_features
    from featureinterp.records.build import RecordPolicy
    from featureinterp.records.similar import SentenceEmbedder

    store = open_run(run)
    chosen = parse_features(features, store) if isinstance(features, str) else list(features)
    return build_records(
        Path(run),
        store,
        chosen,
        policy or RecordPolicy(),
        embedder=SentenceEmbedder(embedder) if embedder else None,
        progress=lambda done, total: steps("windows embedded", done, total),
    )


def explain(run: str | Path, features: str | Sequence[int], **options: Any) -> Results:
    """Explains and scores features of a run; see :func:`explain_async`, whose arguments it takes. For callers without an event loop;
    inside one (a notebook), it works in a thread of its own."""
    import anyio
    import anyio.from_thread
    import sniffio

    try:
        sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        return anyio.run(lambda: explain_async(run, features, **options))
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(lambda: explain_async(run, features, **options))


async def explain_async(
    run: str | Path,
    features: str | Sequence[int],
    *,
    out: str | Path | None = None,
    explainer: Literal["one-shot", "top-tokens"] = "one-shot",
    style: Literal["sentence", "rules"] = "sentence",
    rule_cap: int = 5,
    simulator: Literal["all-at-once", "rated", "lexical"] = "all-at-once",
    simulator_model: str = EXPLAINER,
    simulator_device: str | None = None,
    simulator_dtype: str | None = None,
    endpoint: Endpoint | None = None,
    plan: Plan | None = None,
    policy: RecordPolicy | None = None,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
) -> Results:
    """Explains features of a run and scores the explanations; results, journal and report go to ``out`` (default ``RUN/explain``).

    Everything that was paid for is kept: a second run with the same settings makes no request. Raises ``InputError`` for wrong
    arguments and a ``LanguageModelError`` when the endpoint cannot be used at all; both before anything is written.
    """
    endpoint = endpoint or Endpoint()
    run, out = Path(run), Path(out) if out else Path(run) / "explain"
    store = open_run(run)
    from featureinterp.jobs.journal import Journal

    chosen = list(records(run, features, policy=policy, steps=steps))
    plan = plan or Plan()
    if endpoint.base_url is None:
        plan = replace(plan, concurrency=1)
    async with _language_model(endpoint, needed=explainer == "one-shot" or simulator == "rated") as (model, probe):
        asks = plan.detection or plan.fuzzing or plan.complexity
        parts = _parts(explainer, style, rule_cap, simulator, simulator_model, simulator_device, simulator_dtype, model)
        await probe()
        names = store.windows.document_ids()
        with explained_storage(out), Journal(out / "journal.sqlite") as journal:
            job = ExplainJob(
                journal,
                parts[0],
                parts[1],
                judge=model if asks else None,
                plan=plan,
                document_name=names.__getitem__,
                on_event=on_event,
            )
            results = await job.run(chosen)
    about = _about(store, parts, endpoint, job, explainer, len(results))
    from featureinterp.report.render import write_report, write_results

    write_results(out, results, about)
    write_report(out / "report.html", results, about)
    return Results(tuple(results), out, about)


def _parts(
    explainer: str, style: str, rule_cap: int, simulator: str, simulator_model: str, device: str | None, dtype: str | None, model: LanguageModel
) -> tuple[Explainer, Simulator]:
    from featureinterp.explain.baselines import TopTokens
    from featureinterp.explain.one_shot import OneShot
    from featureinterp.explain.one_shot import style as style_of
    from featureinterp.simulate.lexical import Lexical
    from featureinterp.simulate.rated import Rated

    explainers: dict[str, Callable[[], Explainer]] = {
        "one-shot": lambda: OneShot(model, style_of(style, rule_cap=rule_cap)),
        "top-tokens": TopTokens,
    }
    simulators: dict[str, Callable[[], Simulator]] = {
        "all-at-once": lambda: local_simulator(simulator_model, device=device, dtype=dtype),
        "rated": lambda: Rated(model),
        "lexical": Lexical,
    }
    for what, name, known in (("explainer", explainer, explainers), ("simulator", simulator, simulators)):
        if name not in known:
            raise InputError(f"there is no {what} {name!r}: choose from {', '.join(known)}")
    return explainers[explainer](), simulators[simulator]()


def local_simulator(name: str = EXPLAINER, *, device: str | None = None, dtype: str | None = None) -> Any:
    """The all-at-once simulator on a local transformers model, which is loaded when it is first used."""
    from featureinterp.simulate.all_at_once import AllAtOnce
    from featureinterp.subject.load import load_causal_lm

    return AllAtOnce(lambda: load_causal_lm(name, device=device, dtype=dtype), name=name, dtype=dtype or "bfloat16")


@asynccontextmanager
async def _language_model(endpoint: Endpoint, *, needed: bool) -> AsyncIterator[tuple[Any, Callable[[], Any]]]:
    """The model behind an endpoint with its wrappers, and a check that it answers, which the embedded one does not need."""
    from featureinterp.llm.limited import Limited
    from featureinterp.llm.metered import Metered
    from featureinterp.llm.retrying import Retrying

    async def nothing() -> None:
        pass

    if endpoint.base_url is None:
        from featureinterp.llm.embedded import EmbeddedModel

        async with EmbeddedModel(endpoint.model) as embedded:
            yield Metered(embedded), nothing
        return
    from featureinterp.llm.openai import OpenAIModel
    from featureinterp.llm.types import Message, Request

    if endpoint.concurrency < 1 or endpoint.max_attempts < 1:
        raise InputError("concurrency and attempts must be at least 1")
    bare = OpenAIModel(endpoint.base_url, endpoint.model, api_key_env=endpoint.api_key_env, timeout_s=endpoint.timeout_s)

    async def probe() -> None:
        if needed:
            await bare.complete(Request((Message("user", "Say yes."),), max_tokens=4))

    try:
        yield Metered(Retrying(Limited(bare, endpoint.concurrency), attempts=endpoint.max_attempts)), probe
    finally:
        await bare.aclose()


def _about(store: CodesStore, parts: tuple[Any, Any], endpoint: Endpoint, job: ExplainJob, explainer: str, n_results: int) -> dict[str, Any]:
    from featureinterp import __version__

    meta, settings = store.meta, getattr(parts[1], "settings", {})
    facts = {
        "Subject": f"{meta['model']['name']} ({meta['model']['dtype']})",
        "SAE": f"{meta['sae']['name']}, {meta['sae']['architecture']}, {store.n_features:,} features at {meta['sae']['hook']}",
        "Corpus": f"{meta['corpus']['name']}: {store.windows.n_tokens:,} tokens in {len(store.windows):,} windows of {store.windows.length}",
        "Explainer": f"{explainer}, {endpoint.model}" if explainer == "one-shot" else explainer,
        "Simulator": f"{settings.get('simulator', type(parts[1]).__name__.lower())} {settings.get('model', '')}".strip(),
        "Prompts": ", ".join(f"{s['prompt']} {s['prompt_hash'][:8]}" for s in (getattr(p, "settings", {}) for p in parts) if s.get("prompt")) or "none",
        "Windows judged": f"{job.plan.n_test} of each kind, from documents that the explainer did not see",
        "Fingerprints": f"model {meta['model']['fingerprint'][:12]}, SAE {meta['sae']['fingerprint'][:12]}, windows {meta['corpus']['windows'][:12]}",
        "Made with": f"featureinterp {__version__}",
    }
    title = f"{n_results} feature{'' if n_results == 1 else 's'} of {meta['model']['name']}"
    return {"title": title, "subtitle": f"SAE {meta['sae']['name']} at {meta['sae']['hook']}, explained and tested", "facts": facts}


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draws the report again from the results that an explain job left in ``folder``; returns the file."""
    from featureinterp.report.render import read_results, write_report

    results, about = read_results(Path(folder))
    return write_report(Path(out) if out else Path(folder) / "report.html", results, about)


DEMO_TOKENS = 50_000
DEMO_MIN_WINDOWS = 15
DEMO_TEST_WINDOWS = 8


def demo(
    *,
    out: str | Path = "featureinterp-demo",
    features: int = 5,
    seed: int = 0,
    max_tokens: int = DEMO_TOKENS,
    n_test: int = DEMO_TEST_WINDOWS,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
) -> Results:
    """The whole path on the embedded parts: collects, makes records, explains and scores random features, and writes the report.

    Features are drawn at random among those that fire in at least 15 windows. What is already in ``out`` is reused.
    """
    from featureinterp.assets import fetch
    from featureinterp.assets.gguf import hugging_face_folder
    from featureinterp.jobs.records import random_features

    for name in (SUBJECT, EXPLAINER, "all-minilm-l6-v2", CORPUS):
        fetch(name, lambda file, done, total: steps(f"download {file}", done, total))
    for name in (SUBJECT, EXPLAINER):
        steps(f"unpack {name}", 0, 1)
        hugging_face_folder(name)
        steps(f"unpack {name}", 1, 1)
    store = collect(out=out, max_tokens=max_tokens, steps=steps)
    chosen = random_features(store, features, seed=seed, min_windows=DEMO_MIN_WINDOWS)
    plan = Plan(n_test=n_test, n_valid=(n_test + 1) // 2, negatives=("random", "similar_negative"), seed=seed)
    return explain(out, chosen, plan=plan, on_event=on_event, steps=steps)


def default_threads() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
