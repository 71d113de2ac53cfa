"""Which explainer explains best: one-shot or tree search, a sentence or rules, with holistic activations or
without?

    python scripts/experiments/explainers.py --small
    python scripts/experiments/explainers.py --run RUN [--features random:200] [--llm ENDPOINT]

Every feature is explained in each of the eight ways and by the top-token list, and judged on the same test
windows.
"""

from __future__ import annotations

from typing import Any

from common import COLOURS, Experiment, Row, bars, means, summarised, value


def main() -> None:
    experiment = Experiment(__file__, __doc__ or "")
    run = experiment.run()
    main_kind, close = experiment.settings["plan"]["negatives"][:2]
    rows: list[Row] = []
    for name, changes in arms(experiment.own.get("holistic", "exact")).items():
        for result in experiment.arm(name, run, **changes):
            cost = result.explanation.provenance.usage if result.explanation else None
            rows.append(
                {
                    "feature": result.feature,
                    "explainer": name,
                    "correlation": value(result, "correlation"),
                    f"correlation_{close}": value(result, f"correlation_{close}"),
                    "rules": len(result.explanation.rules) if result.explanation else None,
                    "requests": cost.requests if cost else None,
                    "explanation": result.explanation.text if result.explanation else None,
                }
            )
    r, hard = means(rows, "explainer", "correlation"), means(rows, "explainer", f"correlation_{close}")
    summary = [
        {
            "explainer": name,
            **summarised("correlation", r[name]),
            f"beside {close.replace('_', ' ')}": summarised("r", hard[name])["r"],
        }
        for name in r
    ]
    experiment.write(rows, summary)

    def draw(axes: Any) -> None:
        colours = [COLOURS[5] if name == "top tokens" else COLOURS["tree" in name] for name in r]
        for panel, groups, kind in zip(axes, (r, hard), (main_kind, close), strict=True):
            bars(
                panel,
                [name.replace(", ", "\n").replace(" ", "\n") for name in r],
                list(groups.values()),
                colours=colours,
            )
            panel.set_ylabel(f"correlation beside {kind.replace('_', ' ')} windows")
            panel.tick_params(axis="x", labelsize=7)

    experiment.figure(draw, panels=2, width=13)


def arms(holistic: str) -> dict[str, Row]:
    """The eight explainers and the baseline, by name."""
    found: dict[str, Row] = {}
    for explainer in ("one-shot", "tree"):
        for style in ("sentence", "rules"):
            for causes in (None, holistic):
                found[f"{explainer}, {style}" + (", holistic" if causes else "")] = {
                    "explainer": explainer,
                    "style": style,
                    "holistic": causes,
                }
    found["top tokens"] = {"explainer": "top-tokens"}
    return found


if __name__ == "__main__":
    main()
