"""featureinterp probe"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from featureinterp.cli.screen import Screen, plain, put

if TYPE_CHECKING:
    from featureinterp.api import Probe


def probe(
    run: Path = typer.Argument(..., help="Folder that 'collect' wrote."),
    labels: str = typer.Option(
        "ready",
        help="A .jsonl file of spans, a .toml file of regular expressions, names of ready concepts, or "
        "ready (all of them).",
    ),
    out: Path = typer.Option(None, help="Folder for tables, plots and the page; RUN/probe when not given."),
    dense: bool = typer.Option(
        True,
        "--dense/--no-dense",
        help="Also decode the activations that the SAE read; the model runs over the windows once.",
    ),
    decoders: bool = typer.Option(
        True, "--decoders/--no-decoders", help="Fit linear decoders of all features."
    ),
    test_fraction: float = typer.Option(
        0.4, help="Share of the tokens that are held out, in documents of their own."
    ),
    min_auroc: float = typer.Option(0.85, help="An annotation needs this held-out AUROC,"),
    min_f1: float = typer.Option(0.5, help="or this held-out F1 (precision by token, recall by instance)."),
    alpha: float = typer.Option(0.05, help="The chance that features of noise get a given label at all."),
    shifts: int = typer.Option(200, help="Shifts of the labels that this is judged by."),
    corpus: str = typer.Option(
        None, help="Where the run's corpus is now; by the name that the run recorded when not given."
    ),
    text_field: str = typer.Option(
        None, help="Field or column that holds the text; that of the run when not given."
    ),
    document_separator: str = typer.Option(
        None, help="What is between the documents of a text file; as the run has it when not given."
    ),
    model: str = typer.Option(
        None, help="Where the subject model is now; by the name that the run recorded when not given."
    ),
    device: str = typer.Option(
        None, help="Device of the subject model: auto (the GPU when there is one), cpu, cuda or mps."
    ),
    seed: int = typer.Option(0, help="Seed of the split and of the shifts."),
    as_json: bool = typer.Option(False, "--json", help="Print the concepts and annotations as JSON."),
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
            device=device,
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
