"""Scores of simulations, and scores beside their nulls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.score import Score, Simulation
from featureinterp.jobs.plan import Part, Plan
from featureinterp.scorers.correlation import (
    Pairs,
    agreement,
    correlation,
    deviation_explained,
    explained_variance,
    false_positives,
)


def with_nulls(scores: Sequence[Score], nulls: Sequence[Score]) -> list[Score]:
    """The scores with the nulls' values and intervals, by name."""
    known = {null.name: null for null in nulls}
    found = [(s, known.get(s.name)) for s in scores]
    return [
        s if n is None else replace(s, null=n.value, null_interval=n.interval, null_failed=n.n_failed)
        for s, n in found
    ]


def simulated_scores(
    record: FeatureRecord, plan: Plan, simulated: Mapping[Part, Sequence[Simulation]]
) -> list[Score]:
    """What the simulations of a plan's windows are worth."""

    def pairs(part: Part) -> Pairs:
        simulations = simulated.get(part, [])
        return Pairs.of(record.get(*part)[: len(simulations)], simulations)

    main = plan.negatives[0]
    top, valid = pairs(("test", "top")), pairs(("valid", "top"))
    scores = [
        correlation(
            top + pairs(("test", s)), "correlation" if s == main else f"correlation_{s}", seed=plan.seed
        )
        for s in plan.negatives
    ]
    fit, test = valid + pairs(("valid", main)), top + pairs(("test", main))
    scores += [explained_variance(fit, test, seed=plan.seed), deviation_explained(fit, test, seed=plan.seed)]
    silent = [s for s in plan.negatives if s.endswith("negative")]
    return scores + [
        false_positives(valid, pairs(("test", s)), f"false_positives_{s}", seed=plan.seed) for s in silent
    ]


def main_correlation(
    record: FeatureRecord, plan: Plan, simulated: Mapping[Part, Sequence[Simulation]]
) -> float | None:
    """The correlation over the main test windows; None where it is undefined."""
    pairs = [
        (w, s)
        for part, _ in plan.main_parts()
        for w, s in zip(record.get(*part), simulated.get(part, ()), strict=False)
    ]
    return agreement([w for w, _ in pairs], [s for _, s in pairs]).value
