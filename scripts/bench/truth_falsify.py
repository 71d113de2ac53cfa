"""The truth benchmark's third part: texts that a language model writes, where what a feature fires on is
known.

Trials: which wrong explanations do texts that are written to test them put below the true one, and which do
scores on corpus windows? Sensitivity: how often does a planted feature fire on texts like its examples, by
its kind?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from planted import FEATURES, Planted, activations
from truth_explainers import hard_correlation, share
from truth_scores import Row, explanations, paired, print_rows

from featureinterp.corpus.cut import piece_ends
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.rate import Rate
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.errors import FeatureInterpError
from featureinterp.falsification.counterexamples import Falsifier
from featureinterp.falsification.sensitivity import examples_of
from featureinterp.falsification.writing import TextWriter, without_marks

KINDS = ("true", "another concept", "too broad", "too narrow")


class PlantedActivator:
    """Decides by the planted detectors; texts are cut into tokens by the subject's tokenizer."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    @property
    def settings(self) -> dict[str, Any]:
        """What the activations depend on, as plain data."""
        return {"activator": "planted detectors", "tokenizer": self.encoder.fingerprint}

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        """One window per text."""
        found = []
        for i, (text, encoding) in enumerate(zip(texts, self.encoder.encode(list(texts)), strict=True)):
            ends = piece_ends(text, encoding.offsets).tolist()
            pieces = tuple(text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
            found.append(
                Window(
                    i,
                    i,
                    np.array(encoding.ids, np.int32),
                    pieces,
                    activations(FEATURES[feature.index], pieces, i),
                )
            )
        return found


async def tried(falsifier: Falsifier, simulator: Any, feature: Planted, record: FeatureRecord) -> list[Row]:
    """A row per explanation: precision, recall and F1 on trial, and the correlation beside similar, silent
    windows.
    """
    rows = []
    for kind, explanation in explanations(feature).items():
        if kind not in KINDS:
            continue
        row: Row = {"feature": feature.name, "family": feature.family, "explanation": kind, "failure": None}
        try:
            trial = await falsifier.run(explanation, record)
            row |= {
                "precision": trial.precision.value,
                "recall": trial.recall.value,
                "f1": trial.f1,
                "n": len(trial.texts),
            }
        except FeatureInterpError as error:
            row |= {"precision": None, "recall": None, "f1": None, "n": 0, "failure": str(error)}
        rows.append(
            row | {"correlation": await hard_correlation(simulator, feature, kind, explanation, record)}
        )
    return rows


def print_trials(rows: Sequence[Row]) -> None:
    """What each kind of wrong explanation gets on trial, and the share of features for which the truth gets
    more: by F1 on trial, and by correlation.
    """
    by = {(r["feature"], r["explanation"]): r for r in rows}
    table = []
    for kind in KINDS:
        of = [r for r in rows if r["explanation"] == kind]
        judged = [
            (by[r["feature"], "true"], r)
            for r in of
            if r["f1"] is not None and by[r["feature"], "true"]["f1"] is not None
        ]
        wins = {
            score: [paired(_known(a[score]), _known(b[score])) for a, b in judged]
            for score in ("f1", "correlation")
        }
        table.append(
            {
                "explanation": kind,
                "features": len(of),
                "precision": _mean([r["precision"] for r in of]),
                "recall": _mean([r["recall"] for r in of]),
                "truth above it on trial": "" if kind == "true" else share(wins["f1"]),
                "by correlation": "" if kind == "true" else share(wins["correlation"]),
            }
        )
    print_rows(table)


async def sensed(
    writer: TextWriter, activator: PlantedActivator, records: Sequence[FeatureRecord], n: int
) -> list[Row]:
    """A row per feature: how often it fires on texts like its examples, and on texts like those of the next
    feature.
    """
    texts: list[list[str]] = []
    for record in records:
        shown = [e.shown for e in examples_of(record, 10, 5, 10) if not e.held_out]
        calls = await writer.write(shown, n)
        texts.append([without_marks(t) for c in calls for t in c.texts])
    rows = []
    for place, record in enumerate(records):
        feature = FEATURES[record.feature.index]
        read = [await activator.run(record.feature, texts[(place + step) % len(records)]) for step in (0, 1)]
        rates = [Rate(sum(w.fires for w in windows), len(windows)) for windows in read]
        rows.append(
            {
                "feature": feature.name,
                "family": feature.family,
                "sensitivity": rates[0].value,
                "control": rates[1].value,
                "texts": rates[0].n,
            }
        )
    return rows


def print_sensitivity(rows: Sequence[Row]) -> None:
    """Means by family."""
    table = []
    for family in dict.fromkeys(r["family"] for r in rows):
        of = [r for r in rows if r["family"] == family]
        table.append(
            {
                "family": family,
                "features": len(of),
                "sensitivity": _mean([r["sensitivity"] for r in of]),
                "control": _mean([r["control"] for r in of]),
            }
        )
    print_rows(table)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _known(value: float | None) -> float:
    return -np.inf if value is None else value
