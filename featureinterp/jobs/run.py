"""From a job to its outcome: settled, its parts put together, and run against its journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from featureinterp.claims import JOB, check_free, claim, owned
from featureinterp.codes.store import CodesStore
from featureinterp.domain.result import FeatureResult
from featureinterp.files import explained_storage, parse_json
from featureinterp.jobs.about import about
from featureinterp.jobs.budget import check_endpoint
from featureinterp.jobs.engine import Engine
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Event, Outcome
from featureinterp.jobs.resolved import ResolvedJob, resolve
from featureinterp.jobs.results import KeptResults
from featureinterp.jobs.spec import Job
from featureinterp.jobs.wiring import Local, Steps, Wired, in_this_process, records_of
from featureinterp.llm.cached import ReplyStore
from featureinterp.llm.config import config_path
from featureinterp.llm.metered import Meter
from featureinterp.llm.stack import Stack, open_stack
from featureinterp.stored.sums import write_marker


@dataclass(frozen=True)
class Ran:
    """A run of a job: its outcome, what is known of the features in the order that was asked for, and what a
    report says above them.
    """

    outcome: Outcome
    results: Sequence[FeatureResult]
    about: dict[str, Any]


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
    settled = resolve(job, store)
    check_free(job.folder)
    meter, path = Meter(), job.folder / "journal.sqlite"
    async with AsyncExitStack() as opened:
        stacks = await _stacks(opened, settled, local, meter)
        if settled.asks and not path.exists():
            await _check(settled, stacks[0])
        opened.enter_context(owned(job.folder, "explain"))
        claim_job(job, store, replace=replace)
        with (
            explained_storage(job.folder),
            Journal(path) as journal,
            closing(ReplyStore(job.folder / "replies.sqlite")) as replies,
        ):
            journal.check()
            replies.check()
            models = [stack.model(replies, retry_failed=retry_failed) for stack in stacks]
            parts = Wired(settled, store, local, models[0], models[-1], journal)
            work = engine_of(parts, journal, meter, on_event)
            features = list(settled.features)
            written = {"key": work.key, "job": job.model_dump(mode="json"), "features": features}
            write_marker(job.folder / "job.json", written)
            settled.save()
            if left := len(work.remaining(features)):
                steps("explained", 0, left)
            outcome = await work.run(features, records_of(settled, store, local, steps))
        ran = Ran(outcome, KeptResults(path, work.key, features), about(store, parts, outcome))
        write(ran)
    return ran


def engine_of(
    parts: Wired, journal: Journal, meter: Meter, on_event: Callable[[Event], None] = lambda _: None
) -> Engine:
    """A job's stages, ready to run."""
    job = parts.job
    return Engine(
        journal,
        parts.stages(),
        plan=job.plan,
        source=job.source,
        meter=meter,
        budget=job.budget,
        max_failure_rate=job.max_failure_rate,
        document_name=parts.store.windows.document_ids().__getitem__,
        on_event=on_event,
    )


async def _stacks(opened: AsyncExitStack, job: ResolvedJob, local: Local, meter: Meter) -> list[Stack]:
    """The job's endpoint and its judge, open; once where they are the same, as each has limits of its own."""
    parts: dict[str, Any] = {
        "in_process": in_this_process(
            partial(local.load, device=job.device, dtype=job.dtype), lambda: job.dtype
        ),
        "tokenizer": local.tokenizer,
    }
    endpoints = [job.endpoint] if job.judge == job.endpoint else [job.endpoint, job.judge]
    found = []
    for endpoint in endpoints:
        stack = open_stack(endpoint, meter, price=endpoint.price, **parts)
        found.append(await opened.enter_async_context(stack))
    return found


async def _check(job: ResolvedJob, stack: Stack) -> None:
    """Asks a first small request."""
    endpoint = job.endpoint
    await check_endpoint(
        stack.check, endpoint.model, budget=job.budget, price=endpoint.price, path=config_path()
    )


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

    about, anew = {"run": str(job.run)}, "start anew with 'featureinterp explain --replace' (or run)"
    claim(job.folder, JOB, asked, about=about, replace=replace, earlier=earlier, anew=anew)
