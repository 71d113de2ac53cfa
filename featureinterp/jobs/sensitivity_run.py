"""Sensitivity from names: model, SAEs and corpus in; for each SAE its features with texts and activations."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureinterp.claims import CODES, SENSITIVITY, check_free, claim, owned, reading
from featureinterp.codes.store import CodesStore
from featureinterp.domain.choices import ExampleSource
from featureinterp.errors import FeatureRangeError, InputError, JobStoppedError
from featureinterp.falsification.saebench import examples_in
from featureinterp.falsification.sensitivity import Example, FeatureSensitivity, base_rate, examples_of
from featureinterp.falsification.writing import TextWriter
from featureinterp.jobs.budget import Budget, Guard, check_endpoint
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.records import parse_features, random_features
from featureinterp.jobs.sensitivity import ExamplesOf, OnFeature, SensitivityJob, SensitivityPlan
from featureinterp.jobs.wiring import in_this_process
from featureinterp.llm.cached import ReplyStore
from featureinterp.llm.config import LOCAL, Endpoint, load_config
from featureinterp.llm.metered import Meter
from featureinterp.llm.stack import open_stack
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.policy import RecordPolicy

if TYPE_CHECKING:
    from featureinterp.sae.load import LoadedSae
    from featureinterp.subject.load import Subject

Steps = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SensitivityJobSpec:
    """What is measured. ``saes``: names, all of ``model``. ``features``: how many alive ones at random, or
    which (``3,17``, ``0:50``). ``dataset``, ``total_tokens``, ``context_size``: the corpus, about how much of
    it, and tokens per window. ``examples``: from the corpus, or from the results that SAEBench published.
    ``text_field``, ``document_separator``: how the corpus is read."""

    model: str
    saes: tuple[str, ...]
    out: Path
    dataset: str = "sotu"
    total_tokens: int = 2_000_000
    context_size: int = 128
    features: int | str = 50
    examples: ExampleSource = "corpus"
    llm: Endpoint | str | None = None
    plan: SensitivityPlan = field(default_factory=SensitivityPlan)
    budget: Budget = field(default_factory=Budget)
    device: str | None = None
    dtype: str | None = None
    text_field: str = "text"
    document_separator: str | None = None
    value_dtype: str = "float16"
    max_failure_rate: float = 0.5
    retry_failed: bool = False
    replace: bool = False

    def __post_init__(self) -> None:
        if not self.saes:
            raise InputError("there is no SAE to measure: name at least one")
        folders = [folder_name(name) for name in self.saes]
        for name, folder in zip(self.saes, folders, strict=True):
            if folders.count(folder) > 1:
                raise InputError(
                    f"the SAE {name!r} is named twice, or has the same folder as another one: name each once"
                )

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that writes texts."""
        return load_config().endpoint(self.llm) if isinstance(self.llm, str) else self.llm or Endpoint()

    @property
    def effective_plan(self) -> SensitivityPlan:
        """The plan, with one feature at a time on a model of this machine."""
        return (
            replace(self.plan, features_at_once=1) if self.endpoint.base_url in (None, LOCAL) else self.plan
        )


@dataclass(frozen=True)
class Measured:
    """One SAE, as far as it got. ``about``: what is known of it. ``features``: each read when it is asked
    for. ``stopped``: why the job ended early."""

    folder: Path
    about: dict[str, Any]
    features: Sequence[FeatureSensitivity]
    stopped: JobStoppedError | None


def folder_name(sae: str) -> str:
    """A folder for an SAE's files, by its name."""
    return re.sub(r"[^0-9A-Za-z._@-]+", "_", sae).strip("._") or "sae"


async def run_sensitivity(
    spec: SensitivityJobSpec, *, on_feature: OnFeature = lambda *_: None, steps: Steps = lambda *_: None
) -> AsyncIterator[Measured]:
    """Measures one SAE after the other. Model and SAEs are checked against each other before anything is
    computed or paid for; activations of the corpus are computed once for all SAEs at one hook. Raises
    ``InputError`` for what cannot work, and a ``LanguageModelError`` when the endpoint cannot be used."""
    from featureinterp.codes.collect import collect_shared
    from featureinterp.codes.fit import check_fit
    from featureinterp.corpus.text import load_corpus
    from featureinterp.corpus.windows import WindowPolicy
    from featureinterp.live.activator import TextActivator
    from featureinterp.machine import pick_device, this_machine
    from featureinterp.sae.load import load_sae
    from featureinterp.subject.load import load_causal_lm, load_subject, load_tokenizer

    endpoint, config = spec.endpoint, load_config()
    price = config.price(endpoint)
    check_free(spec.out)
    published = [_published(spec, name) for name in spec.saes]
    corpus = None
    if spec.examples == "corpus":
        corpus = load_corpus(
            spec.dataset, text_field=spec.text_field, document_separator=spec.document_separator
        )
    policy = WindowPolicy(spec.context_size, min(8, spec.context_size), spec.total_tokens)
    saes = [load_sae(name, device=pick_device(spec.device), steps=steps) for name in spec.saes]
    subject = load_subject(spec.model, device=spec.device, dtype=spec.dtype)
    for sae in saes:
        check_fit(subject, sae)
    folders = [spec.out / folder_name(name) for name in spec.saes]
    meter = Meter()
    guard = Guard(spec.budget, lambda: meter.usage, max_failure_rate=spec.max_failure_rate)
    parts: dict[str, Any] = {
        "in_process": in_this_process(
            partial(load_causal_lm, device=spec.device), lambda: this_machine().dtype(None, spec.device)
        ),
        "tokenizer": load_tokenizer,
    }
    async with open_stack(endpoint, meter, price=price, **parts) as stack, AsyncExitStack() as held:
        if not (spec.out / "journal.sqlite").exists():
            await check_endpoint(
                stack.check, endpoint.model, budget=spec.budget, price=price, path=config.path
            )
        held.enter_context(owned(spec.out, "sensitivity"))
        claim(spec.out, SENSITIVITY, {}, earlier=dict)
        if corpus is not None:
            progress = lambda done, total: steps("tokens", done, total)  # noqa: E731 (one line)
            targets = list(zip(saes, folders, strict=True))
            stores: list[CodesStore | None] = list(
                collect_shared(
                    subject,
                    targets,
                    corpus,
                    policy,
                    value_dtype=spec.value_dtype,
                    progress=progress,
                    replace=spec.replace,
                )
            )
            for folder in folders:
                held.enter_context(reading(folder, CODES, "sensitivity"))
        else:
            stores = [None] * len(saes)
        with (
            Journal(spec.out / "journal.sqlite") as journal,
            closing(ReplyStore(spec.out / "replies.sqlite")) as replies,
        ):
            journal.check()
            replies.check()
            plan = spec.effective_plan
            writer = TextWriter(
                stack.model(replies, retry_failed=spec.retry_failed),
                per_call=plan.texts_per_call,
                temperature=plan.temperature,
                seed=plan.seed,
            )
            wanted = [
                _from_corpus(spec, store) if store is not None else _chosen(spec, examples or {})
                for store, examples in zip(stores, published, strict=True)
            ]
            for sae, folder, store, chosen in zip(saes, folders, stores, wanted, strict=True):
                job = SensitivityJob(
                    journal,
                    writer,
                    TextActivator(subject, sae),
                    plan,
                    sae=sae.name,
                    source=[subject.fingerprint, sae.fingerprint],
                    base_rate=_base_rate(store, plan.seed),
                    meter=meter,
                    guard=guard,
                    on_feature=on_feature,
                )
                features = await job.run(*chosen)
                yield Measured(folder, _about(spec, subject, sae, store, writer), features, job.stopped)
                if job.stopped is not None:
                    return


def _about(
    spec: SensitivityJobSpec, subject: Subject, sae: LoadedSae, store: CodesStore | None, writer: TextWriter
) -> dict[str, Any]:
    """What is known of an SAE and of how it was measured. ``l0``: codes per token of the corpus."""
    settings = writer.settings
    return {
        "sae_name": sae.name,
        "model": subject.name,
        "hook": sae.hook,
        "d_sae": sae.n_features,
        "architecture": sae.sae.architecture,
        "l0": None if store is None else len(store.positions) / max(1, store.n_scored),
        "examples": spec.examples,
        "dataset": None if store is None else spec.dataset,
        "n_tokens": None if store is None else store.windows.n_tokens,
        "llm_model": spec.endpoint.model,
        "prompt": settings["prompt"],
        "prompt_hash": settings["prompt_hash"],
    }


def _base_rate(store: CodesStore | None, seed: int) -> Callable[[int, Sequence[int]], float | None]:
    if store is None:
        return lambda *_: None
    windows = store.windows
    return lambda feature, sizes: base_rate(
        store.feature(feature).positions, windows.lengths, windows.length, sizes, seed=seed
    )


def _from_corpus(spec: SensitivityJobSpec, store: CodesStore) -> tuple[Sequence[int], ExamplesOf]:
    """The chosen features, and what draws their examples from the corpus."""
    plan = spec.plan
    chosen = (
        random_features(store, spec.features, seed=plan.seed)
        if isinstance(spec.features, int)
        else parse_features(spec.features, store)
    )
    policy = RecordPolicy(
        {"top": (plan.n_top, 0, plan.n_held_out), "weighted": (plan.n_weighted, 0, plan.n_held_out)},
        half_width=plan.half_width,
        seed=plan.seed,
    )
    builder = RecordBuilder(store, policy)

    def examples(features: Sequence[int]) -> Iterator[FeatureSensitivity]:
        for r in builder.build(features):
            shown = examples_of(r, plan.n_top, plan.n_weighted, plan.half_width)
            yield FeatureSensitivity(r.feature.index, r.scale, shown)

    return chosen, examples


def _published(spec: SensitivityJobSpec, name: str) -> dict[int, tuple[Example, ...]] | None:
    """The published examples of an SAE, when they are asked for."""
    if spec.examples != "saebench":
        return None
    from featureinterp.sae.hub import fetch_results

    return examples_in(fetch_results(name))


def _chosen(
    spec: SensitivityJobSpec, examples: dict[int, tuple[Example, ...]]
) -> tuple[Sequence[int], ExamplesOf]:
    """Features with published examples: the first ones, or those that are named."""
    n = spec.plan.n_top + spec.plan.n_weighted
    wanted = list(examples)[: spec.features] if isinstance(spec.features, int) else _named(spec.features)
    for index in wanted:
        if index not in examples:
            raise FeatureRangeError(
                f"feature {index} has no published examples: some that have are "
                f"{', '.join(map(str, list(examples)[:8]))}"
            )
    return wanted, lambda features: (
        FeatureSensitivity(i, max(e.activation for e in examples[i]), examples[i][:n]) for i in features
    )


def _named(features: str) -> list[int]:
    """Numbers of features, each once."""
    try:
        return list(dict.fromkeys(int(part) for part in features.split(",")))
    except ValueError as error:
        raise InputError(
            f"{features!r} names no features: with published examples write their numbers, such as 3,17"
        ) from error
