"""How do score, number of rules and complexity change with depth?

    python scripts/experiments/layers.py --small
    python scripts/experiments/layers.py --config LAYERS.toml [--llm ENDPOINT]

Explains features of SAEs at several layers of one model. A configuration names the model, the corpus and one SAE per layer; the codes are
collected first. ``--small`` trains a small SAE per layer on the embedded model and corpus (``scripts/train_demo_sae.py``), all in the same way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import Experiment, Row, bars, log, means, say, summarised, value

import featureinterp as fi

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    experiment = Experiment(__file__, __doc__ or "")
    own = experiment.own
    if not own["layers"]:
        sys.exit('layers: name the SAEs to compare in a configuration, and give it with --config: layers = [{ layer = 4, sae = "FOLDER" }, …]')
    rows: list[Row] = []
    for entry in own["layers"]:
        layer = entry["layer"]
        sae = entry.get("sae") or str(trained(experiment.args.out / f"sae-layer-{layer}", layer, own))
        run = experiment.args.out / f"run-layer-{layer}"
        fi.collect(out=run, model=own["model"], sae=sae, corpus=own["corpus"], max_tokens=own["max_tokens"], steps=log)
        for result in experiment.arm(f"layer {layer}", run, style="rules"):
            rows.append(
                {
                    "feature": result.feature,
                    "layer": layer,
                    "correlation": value(result, "correlation"),
                    "complexity": value(result, "complexity"),
                    "rules": float(len(result.explanation.rules)) if result.explanation else None,
                    "explanation": result.explanation.text if result.explanation else None,
                }
            )
    columns = ("correlation", "rules", "complexity")
    groups = {name: means(rows, "layer", name) for name in columns}
    summary = []
    for layer in groups["correlation"]:
        others = {name: summarised(name, groups[name][layer])[name] for name in columns[1:]}
        summary.append({"layer": layer, **summarised("correlation", groups["correlation"][layer]), **others})
    experiment.write(rows, summary)

    def draw(axes: Any) -> None:
        for panel, name, label in zip(axes, columns, ("correlation", "rules used", "complexity of the rules, 0–5"), strict=True):
            bars(panel, [str(layer) for layer in groups[name]], list(groups[name].values()), colours=["#0072b2"])
            panel.set_ylabel(label)
            panel.set_xlabel("layer")

    experiment.figure(draw, panels=3, width=10)


def trained(folder: Path, layer: int, own: Row) -> Path:
    """A small SAE at a layer of the embedded model, trained when it is not there yet."""
    from train_demo_sae import Settings, train

    if not (folder / "config.json").exists():
        say(f"== training an SAE at layer {layer}")
        train(Settings(hook=f"blocks.{layer}.hook_resid_post", **own["training"]), folder)
    return folder


if __name__ == "__main__":
    main()
