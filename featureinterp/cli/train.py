"""featureinterp train"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from featureinterp.cli.evaluate import show
from featureinterp.cli.options import Activations, AsJson, OutFolder, Replace
from featureinterp.cli.recipe import RecipeOptions, tell
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else
from featureinterp.domain.choices import Architecture


def train(
    out: OutFolder,
    recipe: RecipeOptions,
    activations: Annotated[Activations, Else("OUT/activations")] = None,
    architecture: Annotated[
        Architecture | None, typer.Option(help="Kind of the SAE."), Else("the recipe's own, topk")
    ] = None,
    d_sae: Annotated[
        int | None, typer.Option(help="Number of features."), Else("the recipe's own, 8 times the width")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Codes per token."), Else("the recipe's own, 32")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Tokens to train on in all."), Else("the recipe's own, 3 epochs")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate."), Else("the recipe's own, 0.0003")] = None,
    online: Annotated[
        bool | None, typer.Option("--online", help="Train straight from the model, without a store.")
    ] = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Train an SAE: extract what is missing, train, export, evaluate on held-out documents.

    The same command goes on with an unfinished run in --out. With torchrun, several processes train together.

    Example: featureinterp train --config demo --out RUN
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    changes = recipe.changes(
        sae__architecture=architecture,
        sae__d_sae=d_sae,
        sae__k=k,
        training__samples=samples,
        training__lr=lr,
        store__folder=activations and activations.resolve(),
        training__online=online,
    )
    screen.machine(training.recipe_of(recipe.config, changes).subject.dtype, recipe.subject)
    with screen.live():
        done = training.train(
            out,
            recipe.config,
            changes=changes,
            device=recipe.subject,
            replace=replace,
            steps=screen.step,
            on_line=lambda line: screen.say(log_line(line)),
        )
    if not done.leads:
        return
    if as_json:
        screen.result({"run": str(out), "metrics": done.metrics})
        return
    if done.metrics is None:
        put("not evaluated: no document was held out")
    else:
        show(screen, done.metrics)
    tell(done.about.get("notes", []))
    put(f"SAE: {out / 'sae'} (SAELens: {out / 'saelens'})")
    put(f"Page: {(out / 'training.html').resolve()}")


def log_line(line: dict[str, Any]) -> str:
    """A line of the training log for a person."""
    left = line["left_s"]
    time = f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
    parts = [
        f"step {line['step']:,}/{line['steps']:,}",
        f"loss {line['loss']:.4f}",
        f"FVU {line['fvu']:.4f}",
        f"L0 {line['l0']:.1f}",
        f"dead {line['dead']:.1%}",
    ]
    return "  ".join([*parts, f"{line['samples_per_s']:,.0f} tokens/s", time])
