"""Sensitivity as files: tables with the columns of the published pipeline, a summary, and plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.domain.rate import Rate
from featureinterp.domain.record import Window
from featureinterp.falsification.sensitivity import MARK_ABOVE, RELIABLE, FeatureSensitivity
from featureinterp.falsification.writing import without_marks
from featureinterp.files import replaced_atomically
from featureinterp.prompts import marked
from featureinterp.reports.export import cell
from featureinterp.reports.figures import figure
from featureinterp.stored.sums import Sums, write_marker

EVAL_NAME = "sensitivity"
SUMMARY = "summary.json"
_ACTIVATIONS = ("text_annotated", "text_clean", "tokenized_text", "max_activation", "all_activations")
Row = dict[str, Any]
RowsOf = Callable[[FeatureSensitivity], Iterator[Row]]


@dataclass(frozen=True, slots=True)
class _Figures:
    """What the summary needs of one feature."""

    failed: bool
    generated: float | None
    original: float | None
    held_out: float | None
    control: float | None
    base_rate: float | None
    drift: float | None
    by_threshold: Mapping[str, float | None]

    @classmethod
    def of(cls, feature: FeatureSensitivity) -> _Figures:
        return cls(
            feature.failure is not None,
            feature.generated_sensitivity().value,
            feature.original_sensitivity().value,
            feature.original_sensitivity(held_out=True).value,
            feature.control_rate().value,
            feature.base_rate,
            feature.drift,
            {name: feature.generated_sensitivity(t).value for name, t in feature.thresholds().items()},
        )


def write_sensitivity(
    folder: Path, features: Iterable[FeatureSensitivity], about: Mapping[str, Any], *, per_call: int
) -> Row:
    """Writes the six tables and ``summary.json`` of one SAE into ``folder``, one feature at a time, and
    returns the summary. ``about``: what is known of the SAE; ``sae_name`` is needed."""
    tables = _tables(str(about["sae_name"]))
    figures: list[_Figures] = []
    with ExitStack() as open_tables:
        writers = [
            (open_tables.enter_context(_table(folder / f"{name}.csv", columns)), rows_of)
            for name, (columns, rows_of) in tables.items()
        ]
        for feature in features:
            for writer, rows_of in writers:
                writer.writerows(map(_cells, rows_of(feature)))
            figures.append(_Figures.of(feature))
    found = {**about, "num_per_call": per_call, **_summary(figures)}
    names = [f"{name}.csv" for name in tables]
    write_marker(folder / SUMMARY, found, {name: Sums.of(folder / name) for name in names})
    return found


def _cells(row: Row) -> Row:
    return {name: cell(value) for name, value in row.items()}


@contextmanager
def _table(path: Path, columns: Sequence[str]) -> Iterator[csv.DictWriter[str]]:
    """A table that is there when the block ends well."""
    with replaced_atomically(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        yield writer
        text.flush()
        text.detach()


def _tables(sae: str) -> dict[str, tuple[Sequence[str], RowsOf]]:
    """Name → its columns, and the rows of a feature."""
    nothing = FeatureSensitivity(0, 1.0, ())
    return {
        "feature_examples": (("feature_index", "Top_act", "Sequence"), _examples),
        "generation_queries_with_responses": (
            (
                "sae_name",
                "eval_name",
                "feature_index",
                "system_prompt",
                "user_prompt",
                "separator",
                "num_per_call",
                "llm_response",
                "status",
            ),
            partial(_queries, sae),
        ),
        "generated_samples": (("feature_index", "sample_index", "text"), _samples),
        "generated_samples_with_activations": (
            ("feature_index", "sample_index", "text", *_ACTIVATIONS),
            _samples_read,
        ),
        "original_examples_with_activations": (
            (
                "feature_index",
                "sample_index",
                "text",
                *_ACTIVATIONS,
                "corpus_activation",
                "held_out",
                "same_tokens",
            ),
            _originals_read,
        ),
        "feature_stats": (list(stats(nothing)), lambda feature: iter([stats(feature)])),
    }


def stats(feature: FeatureSensitivity) -> Row:
    """A feature's row in ``feature_stats.csv``: the published columns, then intervals, thresholds, control,
    base rate and drift. Undefined is empty.
    """
    generated, original = feature.generated_sensitivity(), feature.original_sensitivity()
    row: Row = {
        "feature_index": feature.feature,
        "generated_sensitivity": generated.value,
        "original_sensitivity": original.value,
    }
    row |= _interval("generated", generated)
    for name, threshold in list(feature.thresholds().items())[1:]:
        row[f"generated_sensitivity_{name}_of_scale"] = feature.generated_sensitivity(threshold).value
    row["original_sensitivity_held_out"] = feature.original_sensitivity(held_out=True).value
    row |= {
        "control_sensitivity": feature.control_rate().value,
        "control_of": feature.control_of,
        "base_rate": feature.base_rate,
    }
    row |= {
        "retokenisation_drift": feature.drift,
        "scale": feature.scale,
        "failure": feature.failure.message if feature.failure else None,
    }
    return row


def _interval(name: str, rate: Rate) -> Row:
    interval = rate.interval
    return {
        f"n_{name}": rate.n,
        f"{name}_low": interval.low if interval else None,
        f"{name}_high": interval.high if interval else None,
    }


def _examples(feature: FeatureSensitivity) -> Iterator[Row]:
    return (
        {"feature_index": feature.feature, "Top_act": e.activation, "Sequence": e.shown}
        for e in feature.examples
        if not e.held_out
    )


def _queries(sae: str, feature: FeatureSensitivity) -> Iterator[Row]:
    return (
        {
            "sae_name": sae,
            "eval_name": EVAL_NAME,
            "feature_index": feature.feature,
            "system_prompt": c.system,
            "user_prompt": c.user,
            "separator": "",  # replies are JSON
            "num_per_call": c.asked,
            "llm_response": c.reply,
            "status": c.status,
        }
        for c in feature.calls
    )


def _samples(feature: FeatureSensitivity) -> Iterator[Row]:
    return (
        {"feature_index": feature.feature, "sample_index": i, "text": text}
        for i, text in enumerate(feature.texts)
    )


def _samples_read(feature: FeatureSensitivity) -> Iterator[Row]:
    return (
        {
            "feature_index": feature.feature,
            "sample_index": i,
            "text": text,
            **_read(window, without_marks(text), feature.scale),
        }
        for i, (text, window) in enumerate(zip(feature.texts, feature.samples, strict=False))
    )


def _originals_read(feature: FeatureSensitivity) -> Iterator[Row]:
    return (
        {
            "feature_index": feature.feature,
            "sample_index": i,
            "text": e.text,
            **_read(window, e.text, feature.scale),
            "corpus_activation": e.activation,
            "held_out": e.held_out,
            "same_tokens": e.tokens == window.pieces if e.tokens else None,
        }
        for i, (e, window) in enumerate(zip(feature.examples, feature.originals, strict=False))
    )


def _read(window: Window, text: str, scale: float) -> Row:
    """What running a text gave. ``text_annotated``: the tokens that fire between ``<<`` and ``>>``;
    ``text_clean``: what was run.
    """
    return {
        "text_annotated": marked(window.pieces, (window.activations > MARK_ABOVE * scale).tolist()),
        "text_clean": text,
        "tokenized_text": json.dumps(list(window.pieces), ensure_ascii=False),
        "max_activation": window.max_activation,
        "all_activations": json.dumps([round(float(a), 6) for a in window.activations]),
    }


def _summary(figures: Sequence[_Figures]) -> Row:
    """Means over features with 95 % bootstrap intervals: over those whose own examples fire again at least
    nine times in ten, as published, and over all.
    """
    reliable = [f for f in figures if (f.original or 0) >= RELIABLE]
    names = list(figures[0].by_threshold) if figures else []
    return {
        "n_features": len(figures),
        "n_failed": sum(f.failed for f in figures),
        "n_reliable": len(reliable),
        "mean_sensitivity": mean_with_interval([f.generated for f in reliable]),
        "mean_sensitivity_unfiltered": mean_with_interval([f.generated for f in figures]),
        "mean_original_sensitivity": mean_with_interval([f.original for f in figures]),
        "mean_original_sensitivity_held_out": mean_with_interval([f.held_out for f in figures]),
        "mean_control": mean_with_interval([f.control for f in figures]),
        "mean_base_rate": mean_with_interval([f.base_rate for f in figures]),
        "mean_retokenisation_drift": mean_with_interval([f.drift for f in figures]),
        "sensitivity_by_threshold": {
            name: mean_with_interval([f.by_threshold[name] for f in figures]) for name in names
        },
    }


def mean_with_interval(values: Sequence[float | None], *, seed: int = 0, n_resamples: int = 2000) -> Row:
    """``mean``, ``low``, ``high`` and ``n`` of those that are defined."""
    known = np.array([v for v in values if v is not None], float)
    if not len(known):
        return {"mean": None, "low": None, "high": None, "n": 0}
    low = high = None
    if len(known) > 1:
        means = np.random.default_rng(seed).choice(known, (n_resamples, len(known))).mean(1)
        low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
    return {"mean": float(known.mean()), "low": low, "high": high, "n": len(known)}


def plot_sensitivity(folder: Path, summaries: Sequence[Row]) -> list[Path]:
    """``sensitivity.png`` and ``.svg``: mean sensitivity of each SAE against its width and its L0, with
    intervals. Needs matplotlib (the extra ``figures``); raises ``InputError`` without it."""
    architectures = list(dict.fromkeys(str(s.get("architecture")) for s in summaries))
    with figure(folder / "sensitivity", width=9, height=3.6, panels=2, share_y=True) as (_, axes):
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        for axis, key, label in zip(
            axes, ("d_sae", "l0"), ("features in the dictionary", "codes per token (L0)"), strict=True
        ):
            for number, architecture in enumerate(architectures):
                aside = (
                    1 + 0.06 * (number - (len(architectures) - 1) / 2) if key == "d_sae" else 1.0
                )  # widths are equal: one beside the other
                _points(
                    axis,
                    [s for s in summaries if str(s.get("architecture")) == architecture],
                    key,
                    f"C{number}",
                    architecture,
                    aside,
                )
            axis.set_xlabel(label)
            axis.set_xscale("log")
            axis.set_ylim(-0.02, 1.02)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        widths = sorted({s["d_sae"] for s in summaries if s.get("d_sae")})
        if len(widths) <= 6:
            axes[0].set_xticks(widths, [f"{w:,}" for w in widths])
        axes[0].set_ylabel("mean sensitivity")
        axes[0].plot([], [], "o", color="#888888", fillstyle="none", label="unfiltered")
        axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return [folder / f"sensitivity.{kind}" for kind in ("png", "svg")]


def _points(axis: Any, summaries: Sequence[Row], key: str, colour: str, label: str, aside: float) -> None:
    """Filled: features whose examples fire again; hollow: all. ``aside``: factor of the place."""
    shown: Callable[[Row], bool] = lambda s: s.get(key) is not None  # noqa: E731 (one line)
    for which, full in (("mean_sensitivity", True), ("mean_sensitivity_unfiltered", False)):
        for s in filter(shown, summaries):
            value = s[which]
            if value["mean"] is None:
                continue
            if value["low"] is not None and full:
                axis.plot([s[key] * aside] * 2, [value["low"], value["high"]], color=colour, linewidth=1.5)
            axis.plot(
                s[key] * aside,
                value["mean"],
                "o",
                markersize=5,
                color=colour,
                fillstyle="full" if full else "none",
                label=label if full else None,
            )
            label = "" if full else label
