"""Jobs: features explained, the explanations scored and put on trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from featureinterp.api.common import Steps, outside, silent
from featureinterp.api.local import local_parts
from featureinterp.api.pages import labels_of
from featureinterp.api.results import Results
from featureinterp.api.runs import open_run
from featureinterp.jobs.plan import Event
from featureinterp.jobs.spec import Job, load_job, make_job

if TYPE_CHECKING:
    from featureinterp.jobs.fields import ChangedFields, JobFields
    from featureinterp.jobs.rehearsal import DryRun
    from featureinterp.jobs.run import Ran


def run(
    job: Job | str | Path,
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
) -> Results:
    """Runs a job, or a TOML file that holds one, as far as it gets; see :func:`run_async`. For callers
    without an event loop; inside one (a notebook), it works in a thread of its own."""
    return outside(
        lambda: run_async(job, retry_failed=retry_failed, replace=replace, on_event=on_event, steps=steps)
    )


async def run_async(
    job: Job | str | Path,
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
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
    from featureinterp.claims import CODES, reading
    from featureinterp.jobs.run import run_job
    from featureinterp.reports.render import write_report, write_results

    job = job if isinstance(job, Job) else load_job(Path(job))
    options = {"retry_failed": retry_failed, "replace": replace}

    def write(ran: Ran) -> None:
        if ran.results:
            write_results(job.folder, ran.results, ran.about)
            write_report(job.folder / "report.html", ran.results, ran.about, labels_of(job.run, ran.results))

    with reading(job.run, CODES, "explain"):
        store = open_run(job.run)
        ran = await run_job(job, store, local_parts(), write=write, on_event=on_event, steps=steps, **options)
    return Results(ran.results, job.folder, ran.about, ran.outcome)


def dry_run(job: Job | str | Path) -> DryRun:
    """What a job would do: features, requests, tokens and USD. Asks no model and writes nothing."""
    from featureinterp.jobs.rehearsal import dry_run

    job = job if isinstance(job, Job) else load_job(Path(job))
    return outside(lambda: dry_run(job, open_run(job.run), local_parts()))


def explain(
    run: str | Path,
    features: str | Sequence[int],
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
    **fields: Unpack[JobFields],
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
    return outside(lambda: explain_async(run, features, **options, **fields))


async def explain_async(
    run: str | Path,
    features: str | Sequence[int],
    *,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
    **fields: Unpack[JobFields],
) -> Results:
    """The same, to be awaited."""
    chosen = features if isinstance(features, str) else tuple(features)
    job = make_job(run=Path(run), features=chosen, **fields)
    return await run_async(job, retry_failed=retry_failed, replace=replace, on_event=on_event, steps=steps)


def steer(
    folder: str | Path,
    *,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
    **fields: Unpack[ChangedFields],
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
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
    **fields: Unpack[ChangedFields],
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
    fields: ChangedFields,
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
