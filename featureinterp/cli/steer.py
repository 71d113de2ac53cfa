"""featureinterp steer"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from featureinterp.cli.endpoint import LlmOptions
from featureinterp.cli.options import (
    AsJson,
    Devices,
    FeaturesAtOnce,
    JobFolder,
    Limits,
    Model,
    ModelDtype,
    RetryFailed,
    Sae,
    given,
)
from featureinterp.cli.screen import Screen, end, one_line, plain, put
from featureinterp.cli.verb import Else, Former

if TYPE_CHECKING:
    from featureinterp.domain.intervention import Intervention


def steer(
    folder: JobFolder,
    asked: LlmOptions,
    limits: Limits,
    devices: Devices,
    doses: Annotated[
        str | None,
        typer.Option(help="How much is added, in units of the feature's largest activation: 0,0.5,1,2."),
        Else("the job's own, 0,0.5,1,2"),
    ] = None,
    openings: Annotated[
        list[str] | None,
        typer.Option("--opening", help="What a text begins with; give several."),
        Else("the job's own"),
    ] = None,
    random_directions: Annotated[
        int | None,
        typer.Option(help="Random directions of the same length, as a control."),
        Else("the job's own, 2"),
    ] = None,
    tokens_per_text: Annotated[
        int | None,
        typer.Option(help="Tokens that the subject writes per text."),
        Former("--max-tokens"),
        Else("the job's own, 32"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of the subject while it writes."),
        Else("the job's own, 0.7"),
    ] = None,
    model: Annotated[Model, Else("the run's own")] = None,
    sae: Annotated[Sae, Else("the run's own")] = None,
    features_at_once: FeaturesAtOnce = None,
    dtype: ModelDtype = None,
    retry_failed: RetryFailed = False,
    as_json: AsJson = False,
) -> None:
    """Have the subject model write while each explained feature is pushed, beside random directions, and
    judge whether the texts fit the explanation.

    Goes on from a job, and adds to its folder. What is not given here is as the job has it.

    Example: featureinterp steer RUN --doses 0,1,2,4
    """
    from featureinterp import api

    job = api.job_in(folder)
    endpoint = asked.endpoint(job.llm)
    steering = given(
        doses=None if doses is None else doses_of(doses),
        n_random=random_directions,
        tokens_per_text=tokens_per_text,
        temperature=temperature,
        openings=tuple(openings) if openings else None,
    )
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.steer(
            folder,
            steering=steering,
            budget=limits.fields(),
            plan=given(features_at_once=features_at_once),
            llm=endpoint,
            retry_failed=retry_failed,
            on_event=screen.event,
            steps=screen.step,
            **given(model=model, sae=sae, simulator_dtype=dtype),
            **devices.fields(),
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
