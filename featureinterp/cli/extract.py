"""featureinterp extract"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featureinterp.cli.options import AsJson, Corpus, Hook, MaxTokens, Model, OutFolder, Replace, Window
from featureinterp.cli.recipe import RecipeOptions, tell
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else


def extract(
    out: OutFolder,
    recipe: RecipeOptions,
    model: Annotated[Model, Else("the recipe's own")] = None,
    hook: Annotated[Hook, Else("the recipe's own")] = None,
    corpus: Annotated[Corpus, Else("the recipe's own")] = None,
    max_tokens: Annotated[MaxTokens, Else("the recipe's own, all")] = None,
    window: Annotated[Window, Else("the recipe's own, 64")] = None,
    part: Annotated[int, typer.Option(help="Number of this worker, counted from 0.")] = 0,
    parts: Annotated[
        int, typer.Option(help="How many workers there are; --merge puts their folders together.")
    ] = 1,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a worker, to be merged into --out; give all. Nothing is extracted."),
    ] = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Write a model's activations at a hook into stores, one for training and one of held-out documents.

    The same command goes on with an unfinished extraction in --out.

    Example: featureinterp extract --model smollm2-135m-instruct --hook blocks.14.hook_resid_post
    --corpus sotu --max-tokens 200000 --out ACTS
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    changes = recipe.changes(
        subject__model=model,
        subject__hook=hook,
        corpus__name=corpus,
        corpus__max_tokens=max_tokens,
        corpus__window=window,
    )
    if not merge:
        screen.machine(training.recipe_of(recipe.config, changes).subject.dtype, recipe.subject)
    with screen.live():
        if merge:
            found = training.merge(merge, out, replace=replace)
        else:
            found = training.extract(
                out,
                recipe.config,
                changes=changes,
                part=part,
                parts=parts,
                device=recipe.subject,
                replace=replace,
                steps=screen.step,
            )
    stores = {
        name: store for name, store in (("train", found.train), ("test", found.test)) if store is not None
    }
    if as_json:
        screen.result({name: {"folder": str(store.folder), **store.meta} for name, store in stores.items()})
        return
    for name, store in stores.items():
        counts = store.meta["counts"]
        left_out = counts["n_first"] + counts["n_sinks"]
        put(
            f"{name}: {len(store):,} activations of width {store.d_model} in {len(store.shards)} shards; "
            f"{left_out:,} tokens left out as attention sinks"
        )
    tell(found.notes)
    put(f"Activations: {out}")
