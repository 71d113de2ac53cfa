"""How many rules does a feature need?

    python scripts/experiments/polysemanticity.py --small
    python scripts/experiments/polysemanticity.py --run RUN [--features random:200] [--llm ENDPOINT]

Explains every feature in rules with a cap of 1 to 5. A feature of several meanings scores higher the more rules it may have; the complexity of
the rules says whether one broad rule stands for several plain ones.
"""

from __future__ import annotations

from typing import Any

from common import Experiment, Row, bars, means, summarised, value


def main() -> None:
    experiment = Experiment(__file__, __doc__ or "")
    run = experiment.run()
    rows: list[Row] = []
    for cap in experiment.own["caps"]:
        for result in experiment.arm(f"cap {cap}", run, style="rules", rule_cap=cap):
            rows.append(
                {
                    "feature": result.feature,
                    "rule cap": cap,
                    "correlation": value(result, "correlation"),
                    "complexity": value(result, "complexity"),
                    "rules": float(len(result.explanation.rules)) if result.explanation else None,
                    "explanation": result.explanation.text if result.explanation else None,
                }
            )
    columns = ("correlation", "complexity", "rules")
    groups = {name: means(rows, "rule cap", name) for name in columns}
    summary = []
    for cap in groups["correlation"]:
        others = {name: summarised(name, groups[name][cap])[name] for name in columns[1:]}
        summary.append({"rule cap": cap, **summarised("correlation", groups["correlation"][cap]), **others})
    experiment.write(rows, summary)

    def draw(axes: Any) -> None:
        for panel, name, label in zip(axes, columns, ("correlation", "complexity of the rules, 0–5", "rules used"), strict=True):
            bars(panel, [str(cap) for cap in groups[name]], list(groups[name].values()), colours=["#0072b2"])
            panel.set_ylabel(label)
            panel.set_xlabel("rules allowed")

    experiment.figure(draw, panels=3, width=10)


if __name__ == "__main__":
    main()
