"""featureinterp falsify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from featureinterp.cli.endpoint import (
    EFFORT,
    EXTRA_BODY,
    EXTRA_HEADER,
    MAX_ATTEMPTS,
    REPLY_TOKENS,
    RPM,
    THINKING_TOKENS,
    TIMEOUT_S,
    TPM,
    endpoint_of,
)
from featureinterp.cli.options import (
    CONCURRENCY,
    DEVICE,
    FEATURES_AT_ONCE,
    RETRY_FAILED,
    SIMULATOR_DEVICE,
    SUBJECT_DEVICE,
    budget_of,
    given,
)
from featureinterp.cli.screen import Screen, end, one_line, plain, put


def falsify(
    folder: Path = typer.Argument(
        ..., metavar="RUN", help="The folder of a job that explained features, or the run folder above it."
    ),
    texts: int = typer.Option(
        None,
        help="Texts that should fire, and as many near misses, per explanation; the job's own (8) when not "
        "given.",
    ),
    rounds: int = typer.Option(
        None,
        help="Explanations that are tried at most: the first, and revisions of it; the job's own (2) when "
        "not given.",
    ),
    fires_above: float = typer.Option(
        None,
        help="Share of the feature's largest activation above which a text counts as firing; the job's own "
        "(0.1) when not given.",
    ),
    llm: str = typer.Option(
        None, help="An endpoint of the configuration file; that of the job when not given."
    ),
    base_url: str = typer.Option(None, help="OpenAI-compatible endpoint; that of the job when not given."),
    llm_model: str = typer.Option(None, help="The endpoint's model."),
    api_key_env: str = typer.Option(None, help="Name of the variable that holds the endpoint's key."),
    concurrency: int = CONCURRENCY,
    rpm: int = RPM,
    tpm: int = TPM,
    timeout_s: float = TIMEOUT_S,
    max_attempts: int = MAX_ATTEMPTS,
    reply_tokens: int = REPLY_TOKENS,
    thinking_tokens: int = THINKING_TOKENS,
    effort: str = EFFORT,
    extra_body: str = EXTRA_BODY,
    extra_header: list[str] = EXTRA_HEADER,
    features_at_once: int = FEATURES_AT_ONCE,
    device: str = DEVICE,
    subject_device: str = SUBJECT_DEVICE,
    simulator_device: str = SIMULATOR_DEVICE,
    budget_usd: float = typer.Option(
        None, help="Stop when this much is spent; the job's own limit when not given."
    ),
    max_minutes: float = typer.Option(None, help="Stop after this time; the job's own limit when not given."),
    retry_failed: bool = RETRY_FAILED,
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Have a language model write texts that test each explanation, let the subject model decide, and revise
    what was contradicted.

    Example: featureinterp falsify RUN --texts 12
    """
    from featureinterp import api

    job = api.job_in(folder)
    endpoint = endpoint_of(
        llm,
        base_url,
        job=job.llm,
        model=llm_model,
        api_key_env=api_key_env,
        concurrency=concurrency,
        rpm=rpm,
        tpm=tpm,
        timeout_s=timeout_s,
        max_attempts=max_attempts,
        reply_tokens=reply_tokens,
        thinking_tokens=thinking_tokens,
        effort=effort,
        extra_body=extra_body,
        extra_header=extra_header,
    )
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.falsify(
            folder,
            trial=given(n_texts=texts, rounds=rounds, fires_above=fires_above),
            budget=budget_of(budget_usd, max_minutes),
            plan=given(features_at_once=features_at_once),
            llm=endpoint,
            retry_failed=retry_failed,
            on_event=screen.event,
            steps=screen.step,
            **given(device=device, subject_device=subject_device, simulator_device=simulator_device),
        )
    finish(screen, results)


def finish(screen: Screen, results: Any) -> None:
    """Prints how the explanations held, and sets the exit code: 1 when something failed."""
    if screen.as_json:
        screen.result(results.to_json())
    else:
        rows = []
        for r in results:
            first = r.trials[0] if r.trials else None
            broken = "" if first is None else f"{len(first.contradictions)} of {len(first.texts)}"
            figures = (plain(first.precision.value), plain(first.recall.value)) if first else ("–", "–")
            said = one_line(r.explanation.text, 60) if r.explanation else "none"
            rows.append(
                (str(r.feature), said, *figures, broken, one_line(r.revised.text, 40) if r.revised else "")
            )
        screen.table(rows, ("feature", "explanation", "precision", "recall", "broken by", "revised"))
        put(f"Report: {(results.folder / 'report.html').resolve()}")
    end(screen, results)
