"""Does the kind of silent window decide what a score says of an explanation?

    python scripts/experiments/sources.py --small
    python scripts/experiments/sources.py --run RUN [--features random:200] [--llm ENDPOINT]

Explains features once and judges every explanation beside each kind of window of ``plan.negatives`` in the
configuration: the correlation on top windows and windows of that kind, and the false positives per window.
What an explanation loses from random to similar windows is what it gets wrong by being too broad.
"""

from __future__ import annotations

from typing import Any

from common import COLOURS, Experiment, Row, bars, means, summarised, value

NAMES = {
    "random": "random",
    "random_negative": "random,\nsilent",
    "similar": "similar",
    "similar_negative": "similar,\nsilent",
    "projected_similar": "projected\nsimilar",
    "projected_similar_negative": "projected\nsimilar, silent",
    "coactive_negative": "co-active,\nsilent",
}


def main() -> None:
    experiment = Experiment(__file__, __doc__ or "")
    results = experiment.arm("job", experiment.run())
    kinds: list[str] = list(experiment.settings["plan"]["negatives"])
    rows: list[Row] = []
    for result in results:
        for kind in kinds:
            name = "correlation" if kind == kinds[0] else f"correlation_{kind}"
            missed = value(result, f"false_positives_{kind}") if kind.endswith("negative") else None
            rows.append(
                {
                    "feature": result.feature,
                    "source": kind,
                    "correlation": value(result, name),
                    "false positives per window": missed,
                }
            )
    r, false = means(rows, "source", "correlation"), means(rows, "source", "false positives per window")
    summary = [
        {
            "source": kind.replace("_", " "),
            **summarised("correlation", r[kind]),
            "false positives per window": _mean(false[kind]),
        }
        for kind in kinds
    ]
    experiment.write(rows, summary)

    def draw(axes: Any) -> None:
        left, right = axes
        bars(left, [NAMES[k] for k in kinds], [r[k] for k in kinds])
        left.set_ylabel("correlation, top windows and these")
        silent = [k for k in kinds if k.endswith("negative")]
        bars(
            right,
            [NAMES[k] for k in silent],
            [false[k] for k in silent],
            colours=[COLOURS[kinds.index(k) % len(COLOURS)] for k in silent],
        )
        right.set_ylabel("false positives per window")

    experiment.figure(draw, panels=2, width=10)


def _mean(values: list[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None


if __name__ == "__main__":
    main()
