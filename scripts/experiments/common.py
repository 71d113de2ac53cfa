"""Shared by the experiments: a configuration file with a full and a small size, jobs of the library, tables
and figures.

Each experiment is a list of arms; an arm is a job. All arms of an experiment have one journal, so that an
experiment that was interrupted goes on where it was, and what two arms ask alike is paid for once.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featureinterp as fi
from featureinterp.domain.result import FeatureResult
from featureinterp.intervals import bootstrap
from featureinterp.jobs.plan import Event
from featureinterp.jobs.spec import make_job
from featureinterp.reports.figures import figure

Row = dict[str, Any]
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Told apart by colour-blind readers, too (Okabe & Ito 2008)."""


class Experiment:
    """An experiment's configuration and folder. ``settings``: fields of a job, and under ``experiment`` what
    is the experiment's own.
    """

    def __init__(self, file: str, description: str) -> None:
        name = Path(file).stem
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--small",
            action="store_true",
            help="a few features of the embedded model, explained and simulated by the embedded model",
        )
        parser.add_argument(
            "--config",
            type=Path,
            default=Path(file).with_suffix(".toml"),
            help="another configuration, with the tables [full] and [small]",
        )
        parser.add_argument(
            "--run",
            type=Path,
            help="the run folder that 'featureinterp collect' wrote (with --small it is made)",
        )
        parser.add_argument(
            "--features", help="which features, in place of the configuration's: 0:40, 3,17, random:20, alive"
        )
        parser.add_argument(
            "--llm",
            help="the endpoint of the configuration file that explains, in place of the embedded model",
        )
        parser.add_argument(
            "--out", type=Path, default=Path("experiments"), help="folder for runs, jobs, tables and figures"
        )
        self.args = parser.parse_args()
        tables = tomllib.loads(self.args.config.read_text(encoding="utf-8"))
        self.settings: Row = dict(tables["small" if self.args.small else "full"])
        self.own: Row = self.settings.pop("experiment", {})
        self.settings |= {k: v for k in ("features", "llm") if (v := getattr(self.args, k)) is not None}
        self.name, self.out = name, self.args.out / (name + ("-small" if self.args.small else ""))

    def run(self) -> Path:
        """The run folder: the one that was given, or with ``--small`` one of the embedded parts, which all
        experiments share.
        """
        if self.args.run is not None:
            return Path(self.args.run)
        if not self.args.small:
            sys.exit(
                f"{self.name}: give the run folder that 'featureinterp collect' wrote with --run, or "
                "--small for the embedded model"
            )
        run = Path(self.args.out / "run")
        fi.collect(out=run, max_tokens=50_000, steps=log)
        return run

    def arm(self, name: str, run: Path, **changes: Any) -> Sequence[FeatureResult]:
        """The results of one arm: the configuration's job with ``changes``. The arms of one run share a
        folder, and so what they have paid for.
        """
        say(f"== {name}")
        fields = {**self.settings, **changes, "run": run, "out": self.out / "jobs" / run.name}
        if isinstance(fields.get("features"), list):
            fields["features"] = tuple(fields["features"])
        results = fi.run(make_job(**fields), on_event=show, steps=log)
        if results.stopped:
            sys.exit(f"{self.name}: {name}: {results.stopped}; the same command goes on")
        fi.report(results.folder, self.out / f"report-{name.replace(',', '').replace(' ', '-')}.html")
        return results

    def write(self, rows: Sequence[Row], summary: Sequence[Row]) -> None:
        """``NAME.csv`` (one row per feature and arm), ``NAME-summary.csv``, and the summary on the screen as
        a Markdown table.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for suffix, table in (("", rows), ("-summary", summary)):
            with (self.out / f"{self.name}{suffix}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)))
                writer.writeheader()
                writer.writerows(table)
        names = list(summary[0])
        print("| " + " | ".join(names) + " |")
        print("| " + " | ".join("---" for _ in names) + " |")
        for row in summary:
            print(
                "| "
                + " | ".join(
                    "–" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()
                )
                + " |"
            )

    def figure(
        self, draw: Callable[[Any], None], *, width: float = 7.0, height: float = 3.6, panels: int = 1
    ) -> None:
        """``NAME.png`` and ``NAME.svg`` of what ``draw`` puts on the axes (a list of them when there are
        several panels).
        """
        with figure(self.out / self.name, width=width, height=height, panels=panels) as (_, axes):
            draw(axes)
        say(f"tables and figures are in {self.out}")

    def compare_rules(
        self,
        by: str,
        arms: Iterable[tuple[Any, Sequence[FeatureResult]]],
        columns: Mapping[str, str],
        axis: str,
        *,
        paired: bool,
    ) -> None:
        """Tables and a figure of explanations in rules along one setting, ``by``; ``columns``: what is drawn,
        with its label; ``paired``: as for :func:`means`, where the arms are about the same features."""
        rows: list[Row] = []
        for place, results in arms:
            for result in results:
                given = result.explanation
                figures = {
                    "correlation": value(result, "correlation"),
                    "complexity": value(result, "complexity"),
                    "rules": float(len(given.rules)) if given else None,
                }
                rows.append(
                    {
                        "feature": result.feature,
                        by: place,
                        **figures,
                        "explanation": given.text if given else None,
                    }
                )
        groups = {name: means(rows, by, name, paired=paired) for name in columns}
        summary = []
        for place in groups["correlation"]:
            others = {
                name: summarised(name, groups[name][place])[name] for name in columns if name != "correlation"
            }
            summary.append({by: place, **summarised("correlation", groups["correlation"][place]), **others})
        self.write(rows, summary)

        def draw(axes: Any) -> None:
            for panel, (name, label) in zip(axes, columns.items(), strict=True):
                bars(
                    panel,
                    [str(place) for place in groups[name]],
                    list(groups[name].values()),
                    colours=COLOURS[:1],
                )
                panel.set_ylabel(label)
                panel.set_xlabel(axis)

        self.figure(draw, panels=len(columns), width=10)


def value(result: FeatureResult, score: str) -> float | None:
    """A score's value; None when it is missing or undefined."""
    found = result.score(score)
    return None if found is None else found.value


def summarised(name: str, values: Sequence[float | None]) -> Row:
    """Mean over features with a 95 % bootstrap interval, and how many features it rests on."""
    defined = np.array([v for v in values if v is not None], float)
    if not len(defined):
        return {name: None, f"{name}, 95 %": None, "features": 0}
    interval = bootstrap(
        lambda counts: counts @ defined / len(defined), len(defined), np.random.default_rng(0)
    )
    shown = f"{interval.low:.2f} to {interval.high:.2f}" if interval else None
    return {name: float(defined.mean()), f"{name}, 95 %": shown, "features": len(defined)}


def bars(
    axes: Any,
    labels: Sequence[str],
    groups: Sequence[Sequence[float | None]],
    *,
    colours: Sequence[str] = COLOURS,
) -> None:
    """A dot per feature, and the mean of each group with its interval over features."""
    for place, values in enumerate(groups):
        defined = np.array([v for v in values if v is not None], float)
        if not len(defined):
            continue
        colour = colours[place % len(colours)]
        spread = np.linspace(-0.12, 0.12, len(defined)) if len(defined) > 1 else np.zeros(1)
        axes.plot(place + spread, defined, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        interval = bootstrap(
            lambda counts, v=defined: counts @ v / len(v), len(defined), np.random.default_rng(0)
        )  # type: ignore[misc]
        if interval:
            axes.plot([place, place], [interval.low, interval.high], color=colour, linewidth=2)
        axes.plot(place, defined.mean(), "D", color=colour, markersize=7, markeredgecolor="white")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)


def show(event: Event) -> None:
    """One line per feature that is through a stage."""
    if not event.reused:
        say(f"   {event.stage} {event.done} of {event.total}: feature {event.result.feature}")


def log(what: str, done: int, total: int) -> None:
    """Progress of what comes before."""
    if done == total and total:
        say(f"   {what}: {total:,}")


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


def means(
    rows: Sequence[Row], by: str, name: str, *, paired: bool = False
) -> Mapping[Any, list[float | None]]:
    """The values of a column, grouped by another in the order in which they come. ``paired``: only features
    that have a value in every group count (a group without any value aside): otherwise a feature whose
    explanation failed in one arm would pass for a difference between the arms."""
    groups: dict[Any, dict[int, float | None]] = {}
    for row in rows:
        groups.setdefault(row[by], {})[row["feature"]] = row[name]
    if not paired:
        return {group: list(values.values()) for group, values in groups.items()}
    known = [{f for f, v in values.items() if v is not None} for values in groups.values()]
    shared = set.intersection(*filter(None, known)) if any(known) else set()
    return {group: [v for f, v in values.items() if f in shared] for group, values in groups.items()}
