"""featureinterp steer"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from featureinterp.domain.intervention import Intervention


def steer(
    folder: Path = typer.Argument(
        ..., metavar="RUN", help="The folder of a job that explained features, or the run folder above it."
    ),
    doses: str = typer.Option(
        None,
        help="How much is added, in units of the feature's largest activation; the job's own (0,0.5,1,2) "
        "when not given.",
    ),
    openings: list[str] = typer.Option(
        None, "--opening", help="What a text begins with; give several. The job's own when not given."
    ),
    random_directions: int = typer.Option(
        None, help="Random directions of the same length, as a control; the job's own (2) when not given."
    ),
    max_tokens: int = typer.Option(None, help="Tokens per text; the job's own (32) when not given."),
    temperature: float = typer.Option(
        None, help="Of the subject while it writes; the job's own (0.7) when not given."
    ),
    model: str = typer.Option(
        None, help="Where the subject model is now; by the name that the run recorded when not given."
    ),
    sae: str = typer.Option(
        None, help="Where the SAE is now; by the name that the run recorded when not given."
    ),
    llm: str = typer.Option(None, help="The endpoint that judges, by name; that of the job when not given."),
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
    """Have the subject model write while each explained feature is pushed, beside random directions, and
    judge whether the texts fit the explanation.

    Example: featureinterp steer RUN --doses 0,1,2,4
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
    steering = given(
        doses=None if doses is None else doses_of(doses),
        n_random=random_directions,
        max_tokens=max_tokens,
        temperature=temperature,
        openings=tuple(openings) if openings else None,
    )
    fields = given(
        model=model, sae=sae, device=device, subject_device=subject_device, simulator_device=simulator_device
    )
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.steer(
            folder,
            steering=steering,
            budget=budget_of(budget_usd, max_minutes),
            plan=given(features_at_once=features_at_once),
            llm=endpoint,
            retry_failed=retry_failed,
            on_event=screen.event,
            steps=screen.step,
            **fields,
        )
    finish(screen, results)


def doses_of(text: str) -> tuple[float, ...]:
    """Doses from numbers with commas. Raises ``InputError``."""
    from featureinterp.errors import InputError

    try:
        return tuple(float(d) for d in text.split(","))
    except ValueError as error:
        raise InputError(f"{text!r} are no doses: write numbers with commas, such as 0,0.5,1,2") from error


def finish(screen: Screen, results: Any) -> None:
    """Prints the match at every dose, and sets the exit code: 1 when something failed."""
    if screen.as_json:
        screen.result(results.to_json())
    else:
        known = [r for r in results if r.intervention is not None]
        doses = known[0].intervention.doses if known else ()
        rows = []
        for r in known:
            said = one_line(r.explanation.text, 44) if r.explanation else "none"
            rows.append((str(r.feature), said, *(_match(r.intervention, dose) for dose in doses)))
        screen.table(rows, ("feature", "explanation", *(f"dose {d:g}" for d in doses)))
        put("match with the explanation: the feature's direction / random directions")
        put(f"Report: {(results.folder / 'report.html').resolve()}")
    end(screen, results)


def _match(found: Intervention, dose: float) -> str:
    """The match at a dose: with the feature's direction and with random ones."""
    own = plain(found.match(dose, "feature"))
    return f"{own}/{plain(found.match(dose, 'random'))}" if dose else own
