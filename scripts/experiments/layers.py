"""How do score, number of rules and complexity change with depth?

    python scripts/experiments/layers.py --small
    python scripts/experiments/layers.py --config LAYERS.toml [--llm ENDPOINT]

Explains features of SAEs at several layers of one model. A configuration names the model, the corpus and one
SAE per layer; the codes are collected first. ``--small`` trains a small SAE per layer on the embedded model
and corpus, all in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common import Experiment, Row, log, say

import featureinterp as fi
from featureinterp.domain.result import FeatureResult


def main() -> None:
    experiment = Experiment(__file__, __doc__ or "")
    own = experiment.own
    if not own["layers"]:
        sys.exit(
            "layers: name the SAEs to compare in a configuration, and give it with --config: layers = [{ "
            'layer = 4, sae = "FOLDER" }, …]'
        )
    columns = {
        "correlation": "correlation",
        "rules": "rules used",
        "complexity": "complexity of the rules, 0–5",
    }
    experiment.compare_rules(
        "layer",
        ((entry["layer"], explained(experiment, entry)) for entry in own["layers"]),
        columns,
        "layer",
        paired=False,
    )


def explained(experiment: Experiment, entry: Row) -> Sequence[FeatureResult]:
    """The results at one layer, whose codes are collected first."""
    own, layer, out = experiment.own, entry["layer"], experiment.args.out
    sae = entry.get("sae") or str(trained(out / f"sae-layer-{layer}", layer, own))
    run = out / f"run-layer-{layer}"
    fi.collect(
        out=run, model=own["model"], sae=sae, corpus=own["corpus"], max_tokens=own["max_tokens"], steps=log
    )
    return experiment.arm(f"layer {layer}", run, style="rules")


def trained(folder: Path, layer: int, own: Row) -> Path:
    """A small SAE at a layer of the embedded model, trained when it is not there yet."""
    say(f"== training an SAE at layer {layer}")
    fi.train(
        folder,
        "demo",
        changes={"subject.hook": f"blocks.{layer}.hook_resid_post", **own["training"]},
        steps=log,
    )
    return folder / "sae"


if __name__ == "__main__":
    main()
