"""featureinterp records"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from featureinterp.cli.options import (
    AsJson,
    Features,
    Holistic,
    Model,
    Out,
    ProjectionOf,
    Reading,
    Run,
    Sae,
    Seed,
)
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else

if TYPE_CHECKING:
    from featureinterp.domain.record import FeatureRecord


def records(
    run: Run,
    reading: Reading,
    features: Features = "0:100",
    count: Annotated[
        list[str] | None,
        typer.Option(
            help="Windows of a kind for train, valid and test: top=10,10,10; as often as needed.",
            metavar="KIND=N,N,N",
        ),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="A sentence-transformers model that finds similar windows."),
        Else("the embedded one"),
    ] = None,
    projection: ProjectionOf = "closed-form",
    holistic: Holistic = None,
    model: Annotated[Model, Else("the run's own")] = None,
    sae: Annotated[Sae, Else("the run's own")] = None,
    seed: Seed = 0,
    out: Annotated[Out, Else("RUN/records.jsonl")] = None,
    as_json: AsJson = False,
) -> None:
    """Build the records of features: top, weighted, quantile, random, similar windows and silent ones, in
    disjoint splits.

    Kinds: top, weighted, quantile, random, similar, projected_similar, random_negative, similar_negative,
    projected_similar_negative, coactive_negative.

    Example: featureinterp records RUN --features 0:100 --count coactive_negative=10,10,10
    """
    from featureinterp import api
    from featureinterp.claims import owned
    from featureinterp.sampling.files import write_records
    from featureinterp.sampling.policy import RecordPolicy

    policy = RecordPolicy(
        {**RecordPolicy().counts, **counts_of(count or [])}, seed=seed, projection=projection
    )
    screen = Screen(as_json=as_json)
    target, short = out or run / "records.jsonl", 0

    def told(built: Iterator[FeatureRecord]) -> Iterator[FeatureRecord]:
        nonlocal short
        for number, record in enumerate(built, 1):
            short += bool(record.shortfalls)
            if number % 100 == 0:
                screen.say(f"{number} records")
            yield record

    codes = api.open_run(run).fingerprint
    with screen.live(), nullcontext() if out else owned(run, "records"):
        built = api.records(
            run,
            features,
            policy=policy,
            embedder=embedder,
            holistic=holistic,
            model=model,
            sae=sae,
            device=reading.subject,
            steps=screen.step,
        )
        n = write_records(target, told(built), codes)
    if as_json:
        screen.result({"records": str(target), "n": n, "n_with_shortfalls": short})
    else:
        put(f"{n} records, {short} of them with fewer windows of some kind than asked for")
        put(f"Records: {target}")


def counts_of(texts: list[str]) -> dict[str, tuple[int, int, int]]:
    """Counts by kind from texts such as ``top=10,10,10``. Raises ``InputError`` for another form."""
    from featureinterp.errors import InputError

    found = {}
    for text in texts:
        source, _, numbers = text.partition("=")
        parts = [part.strip() for part in numbers.split(",")]
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise InputError(
                f"{text!r} is no count of windows: write top=10,10,10, for train, valid and test"
            )
        train, valid, test = map(int, parts)
        found[source.strip()] = (train, valid, test)
    return found
