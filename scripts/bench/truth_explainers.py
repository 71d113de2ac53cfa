"""The truth benchmark's second part: how often each explainer finds the truth about a planted feature.

An explanation names what a planted description names when that is the one of all planted descriptions that is
nearest to it (sentence embeddings, cosine); no simulator has a say in that. Beside it stands the correlation
of its predictions on test windows, with that of the true explanation, which is the most that the simulator
lets any explanation have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from planted import FEATURES, Planted
from truth_scores import HARD, Row, print_rows, simulated

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord
from featureinterp.errors import FeatureInterpError
from featureinterp.explainers.baselines import TopTokens
from featureinterp.explainers.one_shot import OneShot
from featureinterp.explainers.styles import RulesStyle, SentenceStyle, style
from featureinterp.explainers.tree import Tree, TreeSettings
from featureinterp.interfaces import Explainer, LanguageModel
from featureinterp.intervals import bootstrap
from featureinterp.scorers.correlation import agreement

TREE = TreeSettings(negatives=("similar_negative",))
SMALL_TREE = TreeSettings(
    roots=2, depth=1, width=1, branching=2, feedback=2, negatives=("similar_negative",), n_windows=3
)


def explainers(model: LanguageModel, simulator: Any, *, small: bool) -> dict[str, Explainer]:
    """Every explainer that a planted feature can be given to, by name (holistic activations need a real
    one).
    """
    tree = SMALL_TREE if small else TREE
    found: dict[str, Explainer] = {"top tokens": TopTokens()}
    found["one-shot, sentence v1"] = OneShot(model, SentenceStyle("v1"))
    found["one-shot, rules v1"] = OneShot(model, RulesStyle("v1"))
    for form in ("sentence", "rules"):
        found[f"one-shot, {form}"] = OneShot(model, style(form))
        found[f"tree, {form}"] = Tree(model, style(form), simulator, agreement, tree=tree)
    return found


class Descriptions:
    """The planted descriptions, and which of them a text is nearest to."""

    def __init__(self, embedder: Any) -> None:
        self.embedder = embedder
        self.texts = list(dict.fromkeys(part.text for feature in FEATURES for part in feature.parts))
        self.vectors = embedder.embed(self.texts)

    def nearest(self, texts: Sequence[str]) -> list[str]:
        """The planted description with the largest cosine, for each text."""
        return [self.texts[i] for i in (self.embedder.embed(texts) @ self.vectors.T).argmax(1)]


async def explained(
    explainer: Explainer,
    name: str,
    simulator: Any,
    descriptions: Descriptions,
    feature: Planted,
    record: FeatureRecord,
) -> Row:
    """What an explainer made of a feature; a failure is a row with its cause, and counts as not found."""
    row: Row = {
        "feature": feature.name,
        "family": feature.family,
        "explainer": name,
        "explanation": None,
        "failure": None,
    }
    try:
        explanation = await explainer.explain(record)
    except FeatureInterpError as error:
        return row | {"named": 0.0, "right": None, "correlation": None, "failure": str(error)}
    named = descriptions.nearest([rule.activates_on for rule in explanation.rules])
    parts = {part.text for part in feature.parts}
    return row | {
        "explanation": explanation.text,
        "named": len(parts & set(named)) / len(parts),
        "right": sum(text in parts for text in named) / len(named),
        "correlation": await hard_correlation(simulator, feature, name, explanation, record),
    }


async def hard_correlation(
    simulator: Any, feature: Planted, kind: str, explanation: Explanation, record: FeatureRecord
) -> float | None:
    """The correlation beside similar, silent windows."""
    rows = await simulated(simulator, feature, kind, explanation, record)
    return next(r["value"] for r in rows if r["score"] == "correlation" and r["beside"] == HARD)  # type: ignore[no-any-return]


def print_explainers(rows: Sequence[Row], truth: Mapping[str, float | None]) -> None:
    """A row per explainer: shares over features with 95 % bootstrap intervals. ``truth``: the true
    explanation's correlation, by feature.
    """
    table = []
    for name in dict.fromkeys(r["explainer"] for r in rows):
        of = [r for r in rows if r["explainer"] == name]
        scored = [(r["correlation"], truth[r["feature"]]) for r in of]
        both = [(a, b) for a, b in scored if a is not None and b is not None]
        table.append(
            {
                "explainer": name,
                "features": len(of),
                "failed": sum(r["failure"] is not None for r in of),
                "meanings named": share([r["named"] for r in of]),
                "rules that name one": share([r["right"] for r in of if r["right"] is not None]),
                "mean correlation": float(np.mean([a for a, _ in both])) if both else None,
                "of the truth": float(np.mean([b for _, b in both])) if both else None,
                "at least the truth's": share([float(a >= b) for a, b in both]),
            }
        )
    print_rows(table)


def share(values: Sequence[float]) -> str:
    """A mean with its interval."""
    if not values:
        return "–"
    held = np.array(values, float)
    interval = bootstrap(lambda counts: counts @ held / len(held), len(held), np.random.default_rng(0))
    return f"{held.mean():.2f}" + (f" ({interval.low:.2f}–{interval.high:.2f})" if interval else "")
