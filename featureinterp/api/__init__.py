"""The verbs as Python functions: what the command line calls, and a notebook can."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from featureinterp.api.local import EXPLAINER, holistic_of, live_dtype, local_parts, near_directions
from featureinterp.domain.result import FeatureResult
from featureinterp.errors import InputError, JobStoppedError
from featureinterp.jobs.plan import Event, Outcome, Plan
from featureinterp.jobs.spec import Job, load_job, make_job

if TYPE_CHECKING:
    from featureinterp.api.planning import DemoPlan
    from featureinterp.codes.store import CodesStore
    from featureinterp.domain.record import FeatureRecord
    from featureinterp.falsify.sensitivity import FeatureSensitivity
    from featureinterp.jobs.run import DryRun, Ran
    from featureinterp.jobs.status import JobStatus
    from featureinterp.probing.agreement import Agreement
    from featureinterp.probing.study import Study, StudySettings
    from featureinterp.records.policy import RecordPolicy
    from featureinterp.sae.load import LoadedSae
    from featureinterp.subject.load import Subject

SUBJECT, SAE, CORPUS = "smollm2-135m-instruct", "demo", "sotu"
T = TypeVar("T")
Steps = Callable[[str, int, int], None]
"""Called with (what is going on, done, in all)."""


def _silent(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Results(Sequence[FeatureResult]):
    """The results of a job and where they lie; read from its journal when they are asked for. Draws itself as
    a table in a notebook.
    """

    features: Sequence[FeatureResult]
    folder: Path
    about: dict[str, Any]
    outcome: Outcome | None = None

    @property
    def stopped(self) -> JobStoppedError | None:
        """Why the job ended before it was through; None when it is through."""
        return self.outcome.stopped if self.outcome else None

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

    @property
    def n_features(self) -> int:
        """Features of the job, those included that it did not get to."""
        return len(self) + len(self.outcome.left if self.outcome else ())

    @property
    def n_failed(self) -> int:
        """Features with a stage that failed."""
        return sum(s == "failed" for s in self._status)

    @property
    def n_partial(self) -> int:
        """Features with gaps: some of their requests failed, and the rest is there."""
        return sum(s == "partial" for s in self._status)

    @property
    def _status(self) -> Sequence[str]:
        return tuple(self.outcome.status.values()) if self.outcome else ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One entry per feature for programs, without windows."""
        for r in self.features:
            row = r.to_json()
            row.pop("windows")
            yield row

    def summary(self) -> dict[str, Any]:
        """All of :meth:`to_json` but the features."""
        counts = {"n_failures": self.n_failures, "n_failed": self.n_failed, "n_partial": self.n_partial}
        return {"folder": str(self.folder), **counts}

    def to_json(self) -> dict[str, Any]:
        """A summary for programs: one entry per feature, without windows."""
        return {**self.summary(), "features": list(self.rows())}

    def _repr_html_(self) -> str:
        from featureinterp.report.table import results_table

        return results_table(self.features)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The sensitivity of one SAE's features. ``summary``: what ``summary.json`` in ``folder`` holds.
    ``stopped``: why the job ended early. ``n_partial``: features with fewer texts than were asked for."""

    sae: str
    folder: Path
    summary: dict[str, Any]
    features: tuple[FeatureSensitivity, ...]
    stopped: JobStoppedError | None = None
    n_partial: int = 0


@dataclass(frozen=True, eq=False)
class Probe:
    """What labels say about a run's features. ``folder`` holds tables, plots and the ``page``. ``labels``:
    how many spans there were, and how many met no token of the run. Draws itself as a table in a notebook."""

    study: Study
    folder: Path
    page: Path
    n_spans: int
    n_outside: int

    def _repr_html_(self) -> str:
        from featureinterp.report.probing import study_table

        return study_table(self.study)


def collect(
    *,
    out: str | Path,
    model: str = SUBJECT,
    sae: str = SAE,
    corpus: str = CORPUS,
    max_tokens: int | None = None,
    window: int = 32,
    text_field: str = "text",
    document_separator: str | None = None,
    max_per_document: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    value_dtype: str = "float16",
    batch_tokens: int | None = None,
    replace: bool = False,
    steps: Steps = _silent,
) -> CodesStore:
    """Runs a subject model and an SAE over a corpus and stores every positive code under ``out``.

    Reuses what is complete there and goes on with what is not. What another request left there is refused
    with ``IncompatibleError``, or with ``replace`` deleted. Raises an ``InputError`` before anything is
    written when the parts do not exist or do not fit together, and ``FolderInUseError`` when another process
    works in ``out``.
    """
    from featureinterp.claims import check_free
    from featureinterp.codes.collect import collect as run_collect
    from featureinterp.codes.fit import check_fit
    from featureinterp.corpus.text import load_corpus
    from featureinterp.corpus.windows import WindowPolicy
    from featureinterp.machine import pick_device
    from featureinterp.sae.load import load_sae
    from featureinterp.subject.load import load_subject
    from featureinterp.subject.reading import BATCH_TOKENS

    policy = WindowPolicy(window, min(8, window), max_tokens, max_per_document)
    check_free(Path(out))
    loaded_sae = load_sae(sae, device=pick_device(device), steps=steps)
    texts = load_corpus(corpus, text_field=text_field, document_separator=document_separator)
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
        replace=replace,
    )


def saes() -> list[dict[str, Any]]:
    """Every SAE that can be named without asking a hub, each as :func:`sae_info` says it."""
    from featureinterp.sae.info import sae_info
    from featureinterp.sae.names import all_names

    return [sae_info(name) for name in (SAE, *all_names())]


def sae_info(name: str) -> dict[str, Any]:
    """What an SAE's name stands for: repository, file, revision, model, layer, hook, width, architecture,
    codes per token where known, and whether it is in the cache. Asks no network. Raises ``UnknownNameError``
    for a name that stands for nothing."""
    from featureinterp.sae.info import sae_info

    return sae_info(name)


def fetch_sae(name: str, *, steps: Steps = _silent) -> LoadedSae:
    """Fetches an SAE into the model hub's cache, and loads it, which checks that it is what its name says."""
    from featureinterp.sae.load import load_sae

    return load_sae(name, steps=steps)


def open_run(run: str | Path) -> CodesStore:
    """Opens the codes that ``collect`` stored. Raises ``InputError`` or ``IncompleteStoreError`` when there
    are none.
    """
    from featureinterp.codes.store import CodesStore

    if not Path(run).is_dir():
        raise InputError(
            f"there is no run folder {run}: give the folder that 'featureinterp collect' wrote with --out"
        )
    return CodesStore.open(Path(run))


def records(
    run: str | Path,
    features: str | Sequence[int] = "0:100",
    *,
    policy: RecordPolicy | None = None,
    embedder: str | None = None,
    holistic: Literal["exact", "gradient"] | None = None,
    model: str | None = None,
    sae: str | None = None,
    device: str | None = None,
    steps: Steps = _silent,
) -> Iterator[FeatureRecord]:
    """Records of features of a run: indices, or text such as ``0:100``, ``3,17``, ``random:20``, ``alive``.

    ``holistic``: adds holistic activations to the training windows that fire. ``model``, ``sae``: where the
    run's own are found now, when not by the names that it recorded; they are needed for holistic activations
    and co-active windows.
    """
    from featureinterp.jobs.records import build_records, parse_features
    from featureinterp.records.policy import RecordPolicy
    from featureinterp.records.similar import SentenceEmbedder

    store = open_run(run)
    chosen = parse_features(features, store) if isinstance(features, str) else list(features)
    policy = policy or RecordPolicy()
    built = build_records(
        Path(run),
        store,
        chosen,
        policy,
        embedder=SentenceEmbedder(embedder) if embedder else None,
        neighbours=near_directions(store, sae, policy.n_neighbours, device)
        if policy.wants("coactive_negative")
        else None,
        progress=lambda done, total: steps("windows embedded", done, total),
    )
    return built if holistic is None else holistic_of(store, model, sae, holistic, device).add(built)


def run(
    job: Job | str | Path,
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
) -> Results:
    """Runs a job, or a TOML file that holds one, as far as it gets; see :func:`run_async`. For callers
    without an event loop; inside one (a notebook), it works in a thread of its own."""
    return _outside(
        lambda: run_async(job, retry_failed=retry_failed, replace=replace, on_event=on_event, steps=steps)
    )


async def run_async(
    job: Job | str | Path,
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
) -> Results:
    """Runs a job: explains features, scores the explanations, and writes results, journal and report into the
    job's folder.

    Everything that was paid for is kept: a second run of the same job makes no request but for what got no
    answer, and with ``retry_failed`` also for what got one that could not be used. ``replace``: a job on
    other codes in the folder is deleted, but for its replies; else it is refused. A job that stopped early
    (budget, too many failures) has ``results.stopped``; the same call goes on from there. Raises
    ``InputError`` for what cannot work and a ``LanguageModelError`` when the endpoint cannot be used at all,
    both before anything is written, and ``FolderInUseError`` when another process works in the folder.
    """
    from featureinterp.jobs.run import run_job
    from featureinterp.report.render import write_report, write_results

    job = job if isinstance(job, Job) else load_job(Path(job))
    options = {"retry_failed": retry_failed, "replace": replace}

    def write(ran: Ran) -> None:
        if ran.results:
            write_results(job.folder, ran.results, ran.about)
            write_report(job.folder / "report.html", ran.results, ran.about, _labels(job.run, ran.results))

    store = open_run(job.run)
    ran = await run_job(job, store, local_parts(), write=write, on_event=on_event, steps=steps, **options)
    return Results(ran.results, job.folder, ran.about, ran.outcome)


def dry_run(job: Job | str | Path) -> DryRun:
    """What a job would do: features, requests, tokens and USD. Asks no model and writes nothing."""
    from featureinterp.jobs.run import dry_run

    job = job if isinstance(job, Job) else load_job(Path(job))
    return _outside(lambda: dry_run(job, open_run(job.run), local_parts()))


def _outside(work: Callable[[], Awaitable[T]]) -> T:
    """Runs coroutines for a caller that has no event loop, or has one of its own."""
    import anyio
    import anyio.from_thread
    import sniffio

    try:
        sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        return anyio.run(work)
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(work)


def explain(
    run: str | Path,
    features: str | Sequence[int],
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
    **fields: Any,
) -> Results:
    """Explains and scores features of a run; ``fields`` are those of :class:`Job`. The same as
    ``run(Job(run=…, features=…, …))``.
    """
    options: dict[str, Any] = {
        "retry_failed": retry_failed,
        "replace": replace,
        "on_event": on_event,
        "steps": steps,
    }
    return _outside(lambda: explain_async(run, features, **options, **fields))


def steer(
    folder: str | Path,
    *,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
    **fields: Any,
) -> Results:
    """Has the subject write while each explained feature is pushed, and judges whether the texts fit the
    explanation: the job in ``folder`` (or in the run folder above it) with the stage ``steer``. What it has
    is kept and not paid for again. ``fields`` change the job's own, such as ``steering``
    (``SteeringSettings``, or a mapping of those that change)."""
    return _with_stage(folder, "steer", retry_failed, on_event, steps, fields)


def falsify(
    folder: str | Path,
    *,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
    **fields: Any,
) -> Results:
    """Puts the explanations of a finished job on trial and revises those that texts contradict: the job in
    ``folder`` (or in the run folder above it) with the stage ``falsify``. What it has is kept and not paid
    for again. ``fields`` change the job's own, such as ``trial`` (``TrialSettings``, or a mapping of those
    that change), ``budget`` and ``llm``."""
    return _with_stage(folder, "falsify", retry_failed, on_event, steps, fields)


def job_in(folder: str | Path) -> Job:
    """The job in a folder, or in the run folder above it. Raises ``InputError`` when there is none."""
    from featureinterp.jobs.spec import job_of
    from featureinterp.jobs.status import job_folder

    place = job_folder(Path(folder))
    return job_of(place)


def _with_stage(
    folder: str | Path,
    stage: str,
    retry_failed: bool,
    on_event: Callable[[Event], None],
    steps: Steps,
    fields: dict[str, Any],
) -> Results:
    from featureinterp.jobs.spec import changed

    job = job_in(folder)
    stages = tuple(dict.fromkeys((*job.stages, stage)))
    return run(
        changed(job, **{"stages": stages, **fields}),
        retry_failed=retry_failed,
        on_event=on_event,
        steps=steps,
    )


async def explain_async(
    run: str | Path,
    features: str | Sequence[int],
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
    **fields: Any,
) -> Results:
    """The same, to be awaited."""
    chosen = features if isinstance(features, str) else tuple(features)
    job = make_job(run=Path(run), features=chosen, **fields)
    return await run_async(job, retry_failed=retry_failed, replace=replace, on_event=on_event, steps=steps)


def sensitivity(
    *,
    out: str | Path,
    model: str = SUBJECT,
    saes: Sequence[str] = (SAE,),
    on_feature: Callable[[FeatureSensitivity, int, int], None] = _silent,
    on_sae: Callable[[Sensitivity], None] = _silent,
    steps: Steps = _silent,
    **fields: Any,
) -> list[Sensitivity]:
    """How often features fire on new texts that a language model writes like their examples; see
    ``docs/falsification.md``. ``fields``: ``features``, ``dataset``, ``total_tokens``, ``context_size``,
    ``examples`` (``corpus`` or ``saebench``), ``llm``, ``plan`` (``SensitivityPlan``), ``budget``,
    ``device``, ``dtype``. Writes six tables and a summary per SAE under ``out``, and plots over them. What
    was paid for is kept: the same call goes on where it stopped and pays nothing twice."""
    from featureinterp.jobs.sensitivity_run import SensitivityJobSpec, run_sensitivity
    from featureinterp.report.sensitivity import plot_sensitivity, write_sensitivity

    try:
        spec = SensitivityJobSpec(model=model, saes=tuple(saes), out=Path(out), **fields)
    except TypeError as error:
        raise InputError(f"the measurement has a mistake: {error}") from error

    async def measure() -> list[Sensitivity]:
        found = []
        async for measured in run_sensitivity(spec, on_feature=on_feature, steps=steps):
            summary = write_sensitivity(
                measured.folder, measured.features, measured.about, per_call=spec.plan.per_call
            )
            gaps = sum(f.failure is None and len(f.texts) < spec.plan.samples for f in measured.features)
            found.append(
                Sensitivity(
                    measured.about["sae_name"],
                    measured.folder,
                    summary,
                    measured.features,
                    measured.stopped,
                    gaps,
                )
            )
            on_sae(found[-1])
        return found

    results = _outside(measure)
    if results and len(results) == len(spec.saes):
        from contextlib import suppress

        with suppress(InputError):  # without matplotlib there are tables and no plots
            plot_sensitivity(Path(out), [r.summary for r in results])
    return results


def probe(
    run: str | Path,
    labels: str | Path | Mapping[str, str] | Callable[[str], Any] | None = None,
    *,
    out: str | Path | None = None,
    settings: StudySettings | None = None,
    dense: bool = True,
    corpus: str | None = None,
    text_field: str | None = None,
    document_separator: str | None = None,
    model: str | None = None,
    device: str | None = None,
    steps: Steps = _silent,
) -> Probe:
    """What labelled concepts say about every feature of a run at once; see ``docs/probing.md``.

    ``labels``: a ``.jsonl`` file of spans, a ``.toml`` file or a mapping of regular expressions, a function
    of a document's text that gives (start, end, label), names of ready concepts, or None for all of those.
    ``dense``: also decodes the activations that the SAE read, for which the model (``model``: where it is
    now, when not by the name that the run recorded) runs over the windows once. ``corpus``, ``text_field``,
    ``document_separator``: where the documents' text is now, when not as the run recorded; labels from a file
    of spans do not need it. Writes tables, plots and a page to ``out`` (the run's folder ``probe`` when not
    given), from which reports on the run's explanations take the annotations.
    """
    from featureinterp.claims import owned
    from featureinterp.codes.dense import dense_twin
    from featureinterp.corpus.text import load_corpus
    from featureinterp.probing.buffer import ActivationBuffer
    from featureinterp.probing.labels import load_labels
    from featureinterp.probing.study import study
    from featureinterp.probing.tokens import RunTokens
    from featureinterp.report.probing import about_study, write_study
    from featureinterp.subject.load import load_subject

    store = open_run(run)
    wanted = load_labels(labels)
    reading = dict(store.windows.meta.get("reading", {}))
    reading |= {
        name: value
        for name, value in (("text_field", text_field), ("document_separator", document_separator))
        if value is not None
    }
    texts = (
        None if wanted.listed is not None else load_corpus(corpus or store.meta["corpus"]["name"], **reading)
    )
    tokens = RunTokens(store)
    found = tokens.labelled(wanted, texts)

    def subject() -> Subject:
        name = model or store.meta["model"]["name"]
        return load_subject(name, device=device, dtype=live_dtype(store, device))

    folder = Path(out) if out else Path(run) / "probe"
    with owned(folder, "probe"):
        twin = None
        if dense:
            with owned(Path(run) / "dense", "probe", waiting=_silent):
                twin = dense_twin(
                    store,
                    Path(run),
                    subject,
                    progress=lambda done, total: steps("tokens read again", done, total),
                )
        buffer = ActivationBuffer(
            tokens.codes, found.labels, found.names, twin, found.instances, tokens.documents, tokens.texts
        )
        judged = study(buffer, settings, steps=steps)
        positions = {name: tokens.positions[found.labels[:, i]] for i, name in enumerate(found.names)}
        page = write_study(
            folder,
            judged,
            positions,
            about_study(store.meta, wanted.source, judged, found.n_spans, found.n_outside)
            | {"codes": store.fingerprint},
        )
        return Probe(judged, folder, page, found.n_spans, found.n_outside)


def _labels(run: Path, results: Sequence[FeatureResult]) -> dict[int, list[Agreement]]:
    """The concepts that a run's explained features were annotated with, where it was probed."""
    from featureinterp.probing.agreement import agreements
    from featureinterp.report.probing import read_annotations

    if not (run / "probe").is_dir():
        return {}
    store = open_run(run)
    annotations, positions = read_annotations(run / "probe", store.fingerprint)
    return agreements(results, annotations, positions, store.windows.length)


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draws the report again from the results that an explain job left in ``folder``, with the concepts of
    ``probe`` where the run has them; returns the file."""
    from featureinterp.claims import owned
    from featureinterp.jobs.spec import job_of
    from featureinterp.report.render import read_results, write_report

    results, about = read_results(Path(folder))
    run = job_of(Path(folder)).run if (Path(folder) / "job.json").exists() else None
    labels = _labels(run, results) if run and (run / "codes").is_dir() else {}
    page = Path(out) if out else Path(folder) / "report.html"
    with nullcontext() if out else owned(Path(folder), "report"):
        return write_report(page, results, about, labels)


def status(folder: str | Path) -> JobStatus:
    """How far the job in a folder is, from its journal, also while it runs."""
    from featureinterp.jobs.status import job_status

    return job_status(Path(folder))


def export(folder: str | Path, *, to: str = "parquet", out: str | Path | None = None) -> tuple[Path, int]:
    """Writes the results of a job as a table, one row per feature; returns the file and how many rows it has.

    ``to``: ``parquet``, ``csv`` or ``jsonl``. Raises ``InputError`` for another format and when there is no
    job.
    """
    from featureinterp.claims import owned
    from featureinterp.jobs.status import job_folder
    from featureinterp.report.export import export_results

    place = job_folder(Path(folder))
    with nullcontext() if out else owned(place, "export"):
        return export_results(place, to, Path(out) if out else None)


DEMO_MIN_WINDOWS = 15


def demo(
    *,
    out: str | Path = "featureinterp-demo",
    features: int = 5,
    seed: int = 0,
    max_tokens: int | None = None,
    n_test: int | None = None,
    simulator: str = "token-wise",
    on_plan: Callable[[DemoPlan], None] = _silent,
    on_chosen: Callable[[list[str]], object] = _silent,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = _silent,
    steps: Steps = _silent,
) -> Results:
    """The whole path on the embedded parts: collects, makes records, explains and scores random features, and
    writes the report.

    Features are drawn at random among those that fire in at least 15 windows. ``max_tokens`` of the corpus
    and ``n_test`` windows of each kind: what this machine does in about ten minutes for five features, when
    not given. What is already in ``out`` is reused. ``on_plan`` gets the plan, ``on_chosen`` a line on each
    feature before any is explained.
    """
    from featureinterp.api.planning import first_figures, planned
    from featureinterp.assets import fetch
    from featureinterp.assets.gguf import hugging_face_folder
    from featureinterp.jobs.records import random_features

    work = planned(Path(out), features, seed, max_tokens, n_test)
    on_plan(work)
    for name in (SUBJECT, EXPLAINER, "all-minilm-l6-v2", CORPUS):
        fetch(name, lambda file, done, total: steps(f"download {file}", done, total))
    for name in (SUBJECT, EXPLAINER):
        steps(f"unpack {name}", 0, 1)
        hugging_face_folder(name)
        steps(f"unpack {name}", 1, 1)
    store = collect(out=out, max_tokens=work.max_tokens, replace=replace, steps=steps)
    chosen = random_features(store, features, seed=seed, min_windows=DEMO_MIN_WINDOWS)
    on_chosen(first_figures(store, chosen))
    plan = Plan(
        n_test=work.n_test,
        n_valid=(work.n_test + 1) // 2,
        negatives=("random", "similar_negative"),
        seed=seed,
    )
    options: dict[str, Any] = {
        "retry_failed": retry_failed,
        "replace": replace,
        "on_event": on_event,
        "steps": steps,
    }
    return explain(out, chosen, plan=plan, simulator=simulator, **options)
