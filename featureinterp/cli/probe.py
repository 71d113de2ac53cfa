"""featureinterp probe"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from featureinterp.cli.options import (
    AsJson,
    Corpus,
    DocumentSeparator,
    Labels,
    Model,
    Out,
    Reading,
    Run,
    Seed,
    TextField,
)
from featureinterp.cli.screen import Screen, plain, put
from featureinterp.cli.verb import Else

if TYPE_CHECKING:
    from featureinterp.api import Probe


def probe(
    run: Run,
    reading: Reading,
    labels: Labels = "ready",
    dense: Annotated[
        bool,
        typer.Option(
            "--dense/--no-dense",
            help="Also decode the activations that the SAE read; the model runs over the windows once.",
        ),
    ] = True,
    decoders: Annotated[
        bool, typer.Option("--decoders/--no-decoders", help="Fit linear decoders of all features.")
    ] = True,
    test_fraction: Annotated[
        float, typer.Option(help="Share of the tokens that are held out, in documents of their own.")
    ] = 0.4,
    min_auroc: Annotated[
        float, typer.Option(help="Least held-out AUROC of an annotation; --min-f1 is enough, too.")
    ] = 0.85,
    min_f1: Annotated[
        float,
        typer.Option(help="Least held-out F1 of an annotation (precision by token, recall by instance)."),
    ] = 0.5,
    alpha: Annotated[
        float, typer.Option(help="Chance that features of pure noise get a given label at all.")
    ] = 0.05,
    shifts: Annotated[int, typer.Option(help="Shifts of the labels that --alpha is judged by.")] = 200,
    corpus: Annotated[Corpus, Else("the run's own")] = None,
    text_field: Annotated[TextField, Else("the run's own")] = None,
    document_separator: Annotated[DocumentSeparator, Else("the run's own")] = None,
    model: Annotated[Model, Else("the run's own")] = None,
    seed: Seed = 0,
    out: Annotated[Out, Else("RUN/probe")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask labelled concepts about every feature at once: best features, decoders, annotations, each with its
    null.

    Example: featureinterp probe RUN --labels months,money,quotations
    """
    from featureinterp import api
    from featureinterp.probing.study import StudySettings

    settings = StudySettings(
        test_fraction,
        min_auroc=min_auroc,
        min_f1=min_f1,
        alpha=alpha,
        n_shifts=shifts,
        decoders=decoders,
        seed=seed,
    )
    screen = Screen(as_json=as_json)
    with screen.live():
        found = api.probe(
            run,
            labels,
            out=out,
            settings=settings,
            dense=dense and decoders,
            corpus=corpus,
            text_field=text_field,
            document_separator=document_separator,
            model=model,
            device=reading.subject,
            steps=screen.step,
        )
    if as_json:
        screen.result({"folder": str(found.folder), **found.study.to_json()})
    else:
        show(screen, found)


def show(screen: Screen, found: Probe) -> None:
    """One line per concept."""
    rows = []
    for c in found.study.concepts:
        if not c.by_auroc or c.by_f1 is None:
            rows.append((c.name, f"{c.n_tokens:,}", "", c.undefined or "", *[""] * 5))
            continue
        first, interval = c.by_auroc[0], c.auroc_interval
        area = plain(first.auroc) + (f" ({interval.low:.2f}–{interval.high:.2f})" if interval else "")
        annotated = len({a.feature_id for a in found.study.annotations if a.label == c.name})
        values = (area, plain(c.auroc_null), plain(c.by_f1.f1), plain(c.codes_auroc), plain(c.dense_auroc))
        rows.append((c.name, f"{c.n_tokens:,}", str(first.feature), *values, str(annotated)))
    screen.table(rows, ("concept", "tokens", "feature", "AUROC, 95 %", "null", "F1", "all", "dense", "named"))
    put(
        "AUROC: of the best feature, on held-out documents; null: what it reaches at most in 95 % of "
        "shifts of the labels; F1: of the best feature"
    )
    put(
        "by F1; all, dense: AUROC of decoders of all features, and of the activations that the SAE read; "
        "named: features with this concept."
    )
    if found.study.n_repeated:
        put(
            f"{found.study.n_repeated:,} tokens of held-out documents are left out: their windows have the "
            "text of training windows."
        )
    if found.n_outside:
        put(f"{found.n_outside:,} of {found.n_spans:,} spans lie outside the run's windows.")
    put(f"Page: {found.page.resolve()}")
