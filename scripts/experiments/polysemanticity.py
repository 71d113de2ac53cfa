"""How many rules does a feature need?

    python scripts/experiments/polysemanticity.py --small
    python scripts/experiments/polysemanticity.py --run RUN [--features random:200] [--llm ENDPOINT]

Explains every feature in rules with a cap of 1 to 5. A feature of several meanings scores higher the more
rules it may have; the complexity of the rules says whether one broad rule stands for several plain ones.
"""

from __future__ import annotations

from common import Experiment


def main() -> None:
    experiment = Experiment(__file__, __doc__ or "")
    run = experiment.run()
    arms = (
        (cap, experiment.arm(f"cap {cap}", run, style="rules", rule_cap=cap))
        for cap in experiment.own["caps"]
    )
    columns = {
        "correlation": "correlation",
        "complexity": "complexity of the rules, 0–5",
        "rules": "rules used",
    }
    experiment.compare_rules("rule cap", arms, columns, "rules allowed", paired=True)


if __name__ == "__main__":
    main()
