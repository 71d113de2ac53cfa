"""featureinterp layers"""

from __future__ import annotations

from typing import Annotated

import typer

from featureinterp.cli.options import (
    AsJson,
    Corpus,
    DocumentSeparator,
    Labels,
    MaxTokens,
    Model,
    ModelDtype,
    Out,
    Reading,
    Replace,
    Seed,
    TextField,
    Window,
    given,
)
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else


def layers(
    reading: Reading,
    model: Model = "smollm2-135m-instruct",
    corpus: Corpus = "sotu",
    text_field: TextField = "text",
    document_separator: Annotated[DocumentSeparator, Else("recognised")] = None,
    max_tokens: MaxTokens = 50_000,
    window: Window = 64,
    blocks: Annotated[str, typer.Option(help="Blocks to compare: all, 0,7,14 or 0:30:2.")] = "all",
    labels: Labels = "ready",
    seed: Seed = 0,
    dtype: ModelDtype = None,
    out: Annotated[Out, Else("nowhere")] = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Compare layers by linear probes and spectra, and recommend one to train on.

    --out is a folder for the table and the plot.

    Example: featureinterp layers --model smollm2-135m-instruct --corpus sotu --blocks 0:30:3 --out LAYERS
    """
    from featureinterp.api import training
    from featureinterp.training.layers import parse_blocks

    screen = Screen(as_json=as_json)
    screen.machine(dtype, reading.subject)
    with screen.live():
        found = training.layers(
            **given(model=model, corpus=corpus, text_field=text_field, max_tokens=max_tokens, window=window),
            document_separator=document_separator,
            labels=labels,
            blocks=parse_blocks(blocks),
            out=out,
            device=reading.subject,
            dtype=dtype,
            seed=seed,
            replace=replace,
            steps=screen.step,
        )
    if as_json:
        screen.result(found.to_json())
        return
    rows = []
    for layer in found.layers:
        whole, _, trimmed = layer.spectra
        interval = f"{layer.interval.low:.3f}–{layer.interval.high:.3f}" if layer.interval else ""
        ratios = [f"{s.participation_ratio:.1f}" for s in layer.spectra]
        first = f"{whole.channel} ({whole.channel_share:.0%})"
        rows.append(
            (
                f"{layer.block}{' *' if layer.block == found.best else ''}",
                f"{layer.auroc:.3f}",
                interval,
                *ratios,
                str(trimmed.k90),
                first,
                f"{whole.token_share:.0%}",
            )
        )
    screen.table(
        rows, ("block", "AUROC", "95 %", "PR", "−1 %", "−5 %", "k90", "first channel", "first token")
    )
    put(
        f"AUROC: mean of linear probes of {len(found.concepts)} concepts on held-out documents. PR: "
        "participation ratio of the covariance, with all tokens and"
    )
    put(
        "without the 1 % and 5 % that reach farthest along the first direction; k90: directions for 90 % "
        "of the variance without 5 %. First channel: the"
    )
    put(
        "largest in the first direction, and its squared weight; first token: the largest share of the "
        "variance along it that one token has."
    )
    put("Recommended:")
    for reason in found.reasons:
        put(f"  {reason}.")
