"""featureinterp run | status | export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featureinterp.cli.demo import finish
from featureinterp.cli.endpoint import LlmOptions
from featureinterp.cli.options import (
    AsJson,
    Devices,
    FeaturesAtOnce,
    JobFolder,
    Limits,
    ModelDtype,
    Out,
    Replace,
    RetryFailed,
    given,
    named,
)
from featureinterp.cli.screen import Screen, one_line, put
from featureinterp.cli.verb import Else
from featureinterp.registry import FORMATS


def run(
    job: Annotated[
        Path, typer.Argument(metavar="JOB", help="A TOML file; docs/jobs.md says what it may say.")
    ],
    asked: LlmOptions,
    limits: Limits,
    devices: Devices,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done and what it would cost.")
    ] = False,
    features_at_once: FeaturesAtOnce = None,
    dtype: ModelDtype = None,
    out: Annotated[Out, Else("the job's own, or RUN/explain")] = None,
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Run a job from a file. The same command goes on where it stopped; nothing is paid for twice.

    What is given here goes before what the file says.

    Example: featureinterp run JOB.toml --dry-run
    """
    from featureinterp import api
    from featureinterp.domain.usage import cost_in_words
    from featureinterp.jobs.spec import changed, load_job

    screen = Screen(as_json=as_json)
    wanted = load_job(job)
    wanted = changed(
        wanted,
        llm=asked.endpoint(wanted.llm),
        budget=limits.fields(),
        plan=given(features_at_once=features_at_once),
        **given(out=out, simulator_dtype=dtype),
        **devices.fields(),
    )
    if dry_run:
        found = api.dry_run(wanted)
        if as_json:
            screen.result(found.to_json())
            return
        put(f"{found.features:,} features: {found.done:,} done, {found.left:,} left")
        put(
            f"about {found.requests:,} requests with {found.prompt_tokens:,} + {found.completion_tokens:,} "
            f"tokens, {cost_in_words(found.cost_usd, 2, about=True)}"
        )
        return
    with screen.live():
        results = api.run(
            wanted, retry_failed=retry_failed, replace=replace, on_event=screen.event, steps=screen.step
        )
    finish(screen, results)


def status(
    folder: JobFolder,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, what it cost, and what failed.

    Example: featureinterp status RUN/explain
    """
    from featureinterp import api

    found = api.status(folder)
    screen = Screen(as_json=as_json)
    if as_json:
        screen.result(found.to_json())
        return
    put(
        f"{found.folder}: {found.done:,} of {found.wanted:,} features done, {found.partial:,} with gaps, "
        f"{found.failed:,} failed, {found.left:,} left"
    )
    if found.last_run:
        put(f"last run: {found.last_run}")
    rows = []
    for s in found.stages:
        cost = "–" if s["cost_usd"] is None else f"{'about ' if s['estimated'] else ''}${s['cost_usd']:.4f}"
        rows.append(
            (
                s["stage"],
                s["status"],
                f"{s['n']:,}",
                f"{s['requests']:,}",
                f"{s['prompt_tokens']:,}",
                f"{s['completion_tokens']:,}",
                cost,
            )
        )
    if rows:
        screen.table(
            rows, ("stage", "status", "features", "requests", "prompt tokens", "reply tokens", "cost")
        )
    for cause in found.causes:
        put(
            f"{cause['n']:,} × {cause['stage']}: {cause['error']}: {one_line(str(cause['message']), 160)} "
            f"(feature {cause['example']})"
        )


def export(
    folder: JobFolder,
    to: Annotated[str, named(FORMATS, "--to", "Form of the table.")] = "parquet",
    out: Annotated[Out, Else("features.FORMAT in the job's folder")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one row per feature: explanation, scores with intervals and nulls, cost, failures.

    Example: featureinterp export RUN/explain --to csv
    """
    from featureinterp import api

    path, n = api.export(folder, to=to, out=out)
    if as_json:
        Screen(as_json=True).result({"file": str(path), "rows": n})
    else:
        put(f"{n:,} features: {path}")
