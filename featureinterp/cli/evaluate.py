"""featureinterp evaluate"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from featureinterp.cli.options import Activations, AsJson, Model, Out, Reading, Seed
from featureinterp.cli.screen import Screen, plain, put
from featureinterp.cli.verb import Else


def evaluate(
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="A run folder of 'train', or an SAE by name or folder.")
    ],
    reading: Reading,
    activations: Annotated[Activations, Else("the run's own")] = None,
    model: Annotated[Model, Else("the activations' own")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Held-out activations at most."), Else("all")] = None,
    pca: Annotated[int, typer.Option(help="Components of the PCA beside the SAE.")] = 32,
    ce_windows: Annotated[
        int, typer.Option(help="Windows on which the model reads the reconstruction; 0: none.")
    ] = 256,
    seed: Seed = 0,
    out: Annotated[Out, Else("nowhere")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge an SAE on activations of held-out documents, beside its baselines. The last line is for programs.

    --out is a folder for metrics.json.

    Example: featureinterp evaluate demo --activations ACTS
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    with screen.live():
        found = training.evaluate(
            sae,
            activations,
            out=out,
            model=model,
            max_rows=max_rows,
            pca=pca,
            ce_windows=ce_windows,
            seed=seed,
            device=reading.subject,
            steps=screen.step,
        )
    if as_json:
        screen.result(found.to_json())
    else:
        show(screen, found.to_json())


def show(screen: Screen, metrics: dict[str, Any]) -> None:
    """The verdict as a table, and as one line for programs."""
    import json

    rows = [("this SAE", _digits(metrics["sae"]["raw"]), _digits(metrics["sae"]["normalised"]))]
    if metrics["pca"]:
        rows.append(
            (f"PCA-{metrics['pca_k']}", _digits(metrics["pca"]["raw"]), _digits(metrics["pca"]["normalised"]))
        )
    rows.append(("zero codes", _digits(metrics["zero"]["raw"]), _digits(metrics["zero"]["normalised"])))
    screen.table(rows, ("reconstruction", "variance explained", "normalised per token"))
    parts = [f"L0 {metrics['l0']:.1f}", f"dead {metrics['dead']:.1%}"]
    loss = metrics["loss"]
    if loss:
        known = loss["recovered"] is not None
        share = (
            f"{plain(loss['recovered'])} recovered"
            if known
            else f"what is recovered is undefined, {loss['undefined']}"
        )
        said = f"{loss['clean']:.3f}, {loss['sae']:.3f} with the SAE, {loss['zero']:.3f} with zeros"
        parts.append(f"cross-entropy {said}: {share}")
    put(
        f"{'; '.join(parts)}; on {metrics['n_rows']:,} activations of {metrics['n_documents']} held-out "
        "documents"
    )
    short = {
        "explained_variance": metrics["sae"]["raw"],
        "zero": metrics["zero"]["raw"],
        "pca": metrics["pca"] and metrics["pca"]["raw"],
    }
    short |= {"l0": metrics["l0"], "dead": metrics["dead"], "loss_recovered": loss and loss["recovered"]}
    put(f"metrics {json.dumps(short)}")


def _digits(value: float) -> str:
    return f"{value:.3f}"
