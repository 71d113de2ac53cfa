"""The truth benchmark's first part: every score, beside every kind of window, judged by whether it puts the
true explanation above wrong ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from planted import FEATURES, WRONG, Planted

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord, Source, Window
from featureinterp.domain.score import Interval, Simulation
from featureinterp.interfaces import LanguageModel
from featureinterp.intervals import bootstrap
from featureinterp.scorers.correlation import (
    Pairs,
    correlation,
    deviation_explained,
    explained_variance,
    false_positives,
)
from featureinterp.scorers.detection import Detection
from featureinterp.scorers.fuzzing import Fuzzing
from featureinterp.scorers.verdicts import judge

BESIDE: tuple[Source, ...] = ("random", "random_negative", "similar_negative", "projected_similar_negative")
EASY, HARD = BESIDE[0], BESIDE[2]
Row = dict[str, Any]


def explanations(feature: Planted) -> dict[str, Explanation]:
    """The true explanation and the wrong ones, by kind; "another concept" comes from further on in the
    list.
    """
    place = FEATURES.index(feature)
    others = [FEATURES[(place + 17 + i) % len(FEATURES)] for i in range(len(FEATURES))]
    kinds: dict[str, Explanation] = {"true": feature.truth}
    kinds.update((str(kind), wrong) for kind, wrong in feature.wrong(others).items())
    return kinds


async def simulated(
    simulator: Any, feature: Planted, kind: str, explanation: Explanation, record: FeatureRecord
) -> list[Row]:
    """The scores that come from simulations, beside every kind of window."""
    parts: dict[tuple[str, Source], tuple[Window, ...]] = {
        ("valid", "top"): record.get("valid", "top"),
        ("valid", "random"): record.get("valid", "random"),
    }
    parts |= {("test", source): record.get("test", source) for source in ("top", *BESIDE)}
    windows = [w for part in parts.values() for w in part]
    found = iter(await simulator.simulate(explanation, windows))
    by_part: dict[tuple[str, Source], list[Simulation]] = {
        part: [next(found) for _ in ws] for part, ws in parts.items()
    }

    def pairs(split: str, source: Source) -> Pairs:
        return Pairs.of(parts[split, source], by_part[split, source])

    rows = []
    valid = pairs("valid", "top") + pairs("valid", "random")
    for source in BESIDE:
        test = pairs("test", "top") + pairs("test", source)
        scores = {
            "correlation": correlation(test),
            "explained variance": explained_variance(valid, test),
            "deviation explained": deviation_explained(valid, test),
        }
        if source.endswith("negative"):
            scores["false positives (fewer is better)"] = false_positives(
                pairs("valid", "top"), pairs("test", source)
            )
        for name, score in scores.items():
            rows.append(row_of(feature, kind, name, source, score.value))
    return rows


async def asked(
    model: LanguageModel, feature: Planted, kind: str, explanation: Explanation, record: FeatureRecord
) -> list[Row]:
    """Detection beside every kind of silent window, and fuzzing."""
    rows = []
    top = record.get("test", "top")
    for source in BESIDE[1:]:
        _, verdicts, _ = await Detection(model).run(explanation, [*top, *record.get("test", source)])
        rows += [
            row_of(feature, kind, s.name.replace("_", " "), source, s.value)
            for s in judge("detection", verdicts)
        ]
    _, verdicts, _ = await Fuzzing(model).run(explanation, top)
    return rows + [
        row_of(feature, kind, s.name.replace("_", " "), "top", s.value) for s in judge("fuzzing", verdicts)
    ]


def row_of(feature: Planted, kind: str, score: str, source: str, value: float | None) -> Row:
    return {
        "feature": feature.name,
        "family": feature.family,
        "explanation": kind,
        "score": score,
        "beside": source,
        "value": value,
    }


def ranked(rows: Sequence[Row]) -> list[Row]:
    """For every score, kind of window and kind of wrong explanation: the share of features whose true
    explanation scores above the wrong one. An undefined score of a wrong explanation counts as below, of a
    true one as below any that is defined."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        sign = -1.0 if "fewer" in row["score"] else 1.0
        value = -np.inf if row["value"] is None else sign * row["value"]
        values.setdefault((row["score"], row["beside"], row["explanation"]), {})[row["feature"]] = value
    table = []
    for (score, beside, kind), wrong in values.items():
        if kind == "true":
            continue
        true = values[score, beside, "true"]
        wins = np.array([paired(true[name], value) for name, value in wrong.items()])
        interval = bootstrap(
            lambda counts, wins=wins: counts @ wins / len(wins), len(wins), np.random.default_rng(0)
        )  # type: ignore[misc]
        table.append(
            {
                "score": score,
                "beside": beside,
                "wrong": kind,
                "auroc": float(wins.mean()),
                "interval": interval,
                "n": len(wins),
            }
        )
    return table


def paired(true: float, wrong: float) -> float:
    """1 when the true explanation scores above the wrong one, ½ when equal, else 0."""
    return 1.0 if true > wrong else 0.5 if true == wrong else 0.0


def missed(rows: Sequence[Row], score: str = "correlation") -> list[Row]:
    """For every kind of wrong explanation: how many a score does not put below the true one beside random
    windows, and how many of those it does beside similar, silent ones, which random windows alone would have
    missed; and the reverse."""
    values = {
        (r["beside"], r["explanation"], r["feature"]): -np.inf if r["value"] is None else r["value"]
        for r in rows
        if r["score"] == score
    }
    table = []
    for kind in WRONG:
        names = sorted({feature for _, explanation, feature in values if explanation == kind})

        def fooled(source: str, name: str, kind: str = kind) -> bool:
            return values[source, "true", name] <= values[source, kind, name]

        easy, hard = ({name for name in names if fooled(source, name)} for source in (EASY, HARD))
        table.append(
            {
                "wrong": kind,
                "n": len(names),
                "fooled beside random": len(easy),
                "of them caught beside similar, silent": len(easy - hard),
            }
        )
        table[-1]["fooled beside similar, silent alone"] = len(hard - easy)
    return table


def print_scores(rows: Sequence[Row]) -> None:
    """Both tables, in Markdown."""
    table = ranked(rows)
    print("| score | beside | " + " | ".join(WRONG) + " |")
    print("| --- | --- |" + " --- |" * len(WRONG))
    for score, beside in dict.fromkeys((t["score"], t["beside"]) for t in table):
        cells = [
            cell(
                next(
                    (t for t in table if (t["score"], t["beside"], t["wrong"]) == (score, beside, kind)), None
                )
            )
            for kind in WRONG
        ]
        print(f"| {score} | {beside.replace('_', ' ')} | " + " | ".join(cells) + " |")
    print("\nWrong explanations whose correlation is not below that of the truth:\n")
    print_rows(missed(rows))


def print_rows(rows: Sequence[Row]) -> None:
    """Rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join(
                "–" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()
            )
            + " |"
        )


def cell(entry: Row | None) -> str:
    """An AUROC with its interval."""
    if entry is None:
        return "–"
    interval: Interval | None = entry["interval"]
    return f"{entry['auroc']:.2f}" + (f" ({interval.low:.2f}–{interval.high:.2f})" if interval else "")
