"""featureinterp records"""

from __future__ import annotations

from pathlib import Path

import typer

from featureinterp.cli.screen import Screen


def records(
    run: Path = typer.Argument(..., help="Folder that 'collect' wrote."),
    features: str = typer.Option("0:100", help="0:100, 3,17,256, random:20 or alive."),
    out: Path = typer.Option(None, help="JSONL file; RUN/records.jsonl when not given."),
    embedder: str = typer.Option(None, help="A sentence-transformers model; the embedded one when not given."),
    seed: int = typer.Option(0, help="Seed of what is drawn at random."),
    as_json: bool = typer.Option(False, "--json", help="Print a summary as JSON."),
) -> None:
    """Build the records of features: top, weighted, quantile, random, similar windows and silent ones, in disjoint splits.

    Example: featureinterp records RUN --features 0:100
    """
    from featureinterp import api
    from featureinterp.records.files import write_records
    from featureinterp.records.policy import RecordPolicy

    screen = Screen(as_json=as_json)
    target = out or run / "records.jsonl"
    short = 0
    with screen.live():
        built = []
        for number, record in enumerate(api.records(run, features, policy=RecordPolicy(seed=seed), embedder=embedder, steps=screen.step), 1):
            built.append(record)
            short += bool(record.shortfalls)
            if number % 100 == 0:
                screen.say(f"{number} records")
    n = write_records(target, built)
    if as_json:
        screen.result({"records": str(target), "n": n, "n_with_shortfalls": short})
    else:
        print(f"{n} records, {short} of them with fewer windows of some kind than asked for")
        print(f"Records: {target}")
