"""featureinterp falsify"""

from __future__ import annotations

from typing import Annotated, Any

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
    NTexts,
    RetryFailed,
    Sae,
    given,
)
from featureinterp.cli.screen import Screen, end, one_line, plain, put
from featureinterp.cli.verb import Else, Former


def falsify(
    folder: JobFolder,
    asked: LlmOptions,
    limits: Limits,
    devices: Devices,
    n_texts: Annotated[NTexts, Former("--texts"), Else("the job's own, 8")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Explanations that are tried at most: the first, and revisions of it."),
        Else("the job's own, 2"),
    ] = None,
    fires_above: Annotated[
        float | None,
        typer.Option(help="Share of the feature's largest activation above which a text counts as firing."),
        Else("the job's own, 0.1"),
    ] = None,
    model: Annotated[Model, Else("the run's own")] = None,
    sae: Annotated[Sae, Else("the run's own")] = None,
    features_at_once: FeaturesAtOnce = None,
    dtype: ModelDtype = None,
    retry_failed: RetryFailed = False,
    as_json: AsJson = False,
) -> None:
    """Have a language model write texts that test each explanation, let the subject model decide, and revise
    what was contradicted.

    Goes on from a job, and adds to its folder. What is not given here is as the job has it.

    Example: featureinterp falsify RUN --n-texts 12
    """
    from featureinterp import api

    job = api.job_in(folder)
    endpoint = asked.endpoint(job.llm)
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.falsify(
            folder,
            trial=given(n_texts=n_texts, rounds=rounds, fires_above=fires_above),
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
