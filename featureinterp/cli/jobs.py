"""featureinterp run | status | export"""

from __future__ import annotations

from pathlib import Path

import typer

from featureinterp.cli.demo import finish
from featureinterp.cli.options import REPLACE_JOB, RETRY_FAILED
from featureinterp.cli.screen import Screen, one_line, put

_JSON = typer.Option(False, "--json", help="Print as JSON.")


def run(
    job: Path = typer.Argument(..., help="A TOML file; docs/jobs.md says what can be in it."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Only say what would be done and what it would cost."
    ),
    budget_usd: float = typer.Option(None, help="Stop when this much is spent, over the job's own budget."),
    max_minutes: float = typer.Option(None, help="Stop after this time, over the job's own budget."),
    retry_failed: bool = RETRY_FAILED,
    replace: bool = REPLACE_JOB,
    as_json: bool = _JSON,
) -> None:
    """Run a job from a file. Running it again goes on where it stopped; what was paid for is never paid
    twice.

    Example: featureinterp run JOB.toml --dry-run
    """
    from dataclasses import replace as replaced

    from featureinterp import api
    from featureinterp.domain.usage import cost_in_words
    from featureinterp.jobs.spec import load_job

    screen = Screen(as_json=as_json)
    wanted = load_job(job)
    budget = wanted.budget
    if budget_usd is not None:
        budget = replaced(budget, usd=budget_usd)
    if max_minutes is not None:
        budget = replaced(budget, minutes=max_minutes)
    wanted = wanted.model_copy(update={"budget": budget})
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
    folder: Path = typer.Argument(..., metavar="RUN", help="A job's folder, or the run folder above it."),
    as_json: bool = _JSON,
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
    folder: Path = typer.Argument(..., metavar="RUN", help="A job's folder, or the run folder above it."),
    to: str = typer.Option(
        "parquet", help="parquet, csv, jsonl, or another of 'featureinterp list formats'."
    ),
    out: Path = typer.Option(
        None, help="The file to write; features.FORMAT in the job's folder when not given."
    ),
    as_json: bool = _JSON,
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
