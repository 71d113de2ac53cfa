"""featureinterp doctor"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featureinterp.cli.options import (
    AsJson,
    Corpus,
    DocumentSeparator,
    Hook,
    Model,
    ModelDtype,
    Reading,
    Seed,
    TextField,
    Window,
)
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else

if TYPE_CHECKING:
    from featureinterp.training.doctor.check import Check


def doctor(
    reading: Reading,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="A run of 'train', or activations of 'extract'."),
    ] = None,
    model: Annotated[Model, Else("the activations' own")] = None,
    hook: Annotated[Hook, Else("the activations' own")] = None,
    corpus: Annotated[Corpus, Else("none")] = None,
    text_field: TextField = "text",
    document_separator: Annotated[DocumentSeparator, Else("recognised")] = None,
    window: Annotated[Window, Else("the activations' own")] = None,
    load_model: Annotated[
        bool,
        typer.Option(
            "--load-model/--no-model",
            help="Run the model of the activations again over some of their windows.",
        ),
    ] = True,
    machine: Annotated[
        bool,
        typer.Option(
            "--machine", help="Say what this machine can do, and what the embedded models cost on it."
        ),
    ] = False,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench",
            help="Also measure tokens per second and peak memory by batch and window length; needs a model.",
        ),
    ] = False,
    seed: Seed = 0,
    dtype: ModelDtype = None,
    as_json: AsJson = False,
) -> None:
    """Look for the known mistakes in a model, a corpus, activations or a run. Exit code 1 when something
    failed.

    Example: featureinterp doctor RUN
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    if machine:
        from featureinterp.api.planning import machine as look
        from featureinterp.api.planning import machine_lines

        seen = look()
        if as_json:
            screen.result(seen)
        else:
            screen.table(machine_lines(seen), ("what", "here"))
        return
    screen.machine(dtype, reading.subject)
    found = []
    with screen.live():
        for check in training.doctor(
            folder,
            model=model,
            hook=hook,
            corpus=corpus,
            window=window,
            device=reading.subject,
            dtype=dtype,
            text_field=text_field or "text",
            document_separator=document_separator,
            load_model=load_model,
            seed=seed,
            steps=screen.step,
        ):
            found.append(check)
            if not as_json:
                for line in finding(check, first=len(found) == 1 or found[-2].subject != check.subject):
                    screen.say(line)
        measured = training.speeds(model, folder, hook, device=reading.subject, dtype=dtype) if bench else []
    counts = {status: sum(c.status == status for c in found) for status in ("pass", "warn", "fail", "skip")}
    if as_json:
        screen.result(
            {
                "counts": counts,
                "checks": [c.to_json() for c in found],
                "speeds": [asdict(s) for s in measured],
            }
        )
    else:
        if measured:
            rows = [
                (
                    f"{s.batch}",
                    f"{s.length}",
                    _whole(s.tokens_per_s),
                    _whole(s.peak_bytes and s.peak_bytes / 2**20),
                )
                for s in measured
            ]
            screen.table(rows, ("batch", "window", "tokens/s", "peak MiB"))
        put(
            f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failed, "
            f"{counts['skip']} skipped"
        )
    if counts["fail"]:
        raise typer.Exit(1)


_MARKS = {"pass": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "skip"}


def finding(check: Check, *, first: bool) -> list[str]:
    """A check for a person: its finding, and under it what to do."""
    lines = [f"\n{check.subject}"] if first else []
    lines.append(f"  {_MARKS[check.status]}  {check.name}" + (f": {check.figure}" if check.figure else ""))
    return [*lines, f"        {check.advice}"] if check.advice else lines


def _whole(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:,.0f}"
