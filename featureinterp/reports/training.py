"""A training run as files: plots and a page with the curves, the verdict and its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from featureinterp.errors import InputError
from featureinterp.files import write_atomic
from featureinterp.reports.figures import figure
from featureinterp.reports.render import environment

Line = Mapping[str, Any]
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 46, 26
MOST_POINTS = 400


@dataclass(frozen=True)
class Chart:
    """A line chart in SVG units: ``lines`` are point lists; ``ticks`` are (place, label)."""

    title: str
    lines: tuple[str, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def write_training(
    folder: Path, about: Line, recipe: Mapping[str, Any], log: Sequence[Line], metrics: Line | None
) -> Path:
    """Writes ``training.html``, and plots where matplotlib is there. ``about``, ``log``, ``metrics``: what
    ``run.json``, ``log.jsonl`` and ``metrics.json`` hold; ``recipe``: the settings by table. Returns the
    page."""
    charts = [
        chart(log, "fvu", "Fraction of variance unexplained, by training tokens", logarithmic=True),
        chart(log, "dead", "Share of dead features"),
        chart(log, "l0", "Codes per token"),
    ]
    page = environment().get_template("training.html")
    content = page.render(
        about={
            "title": f"{recipe['sae']['architecture']} on {recipe['subject']['hook']}",
            "subtitle": f"{about['d_sae']:,} features of {recipe['subject']['model']}",
            "facts": facts(about, recipe),
        },
        d_sae=about["d_sae"],
        charts=[c for c in charts if c is not None],
        metrics=metrics,
        density=density(metrics) if metrics else [],
        tenths=tenths(metrics) if metrics else [],
        compact=compact,
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": BOTTOM},
    )
    write_atomic(folder / "training.html", content)
    with suppress(InputError):  # without matplotlib there is a page, and no plots
        plot_run(folder / "figures", log, metrics)
    return folder / "training.html"


def facts(about: Line, recipe: Mapping[str, Any]) -> dict[str, str]:
    """What the run was made of, for a reader."""
    t, c = recipe["training"], recipe["corpus"]
    rows = about["n_rows"]
    normal = {
        "none": "none",
        "global": f"one factor, {about['normalize']['scale']:.4g}",
        "token": "each token by its own mean and deviation",
    }
    return {
        "Corpus": f"{c['name']}, windows of {c['window']} tokens"
        + (f", {rows:,} training activations" if rows else ""),
        "Held out": f"{c['held_out']:.0%} of the tokens, in documents of their own",
        "Steps": f"{about['steps']:,} of {t['batch']:,} tokens",
        "Learning rate": f"{t['lr']:g} after {t['warmup']} steps of warm-up, then {t['decay']} decay to "
        f"{t['lr_end']:g} at the last step",
        "Normalisation": normal[about["normalize"]["kind"]],
        "Auxiliary loss": f"{about['aux_k']} dead features, weight {recipe['sae']['aux_coefficient']:g}; "
        f"dead after {recipe['sae']['dead_after']:,} tokens",
        "Precision": t["precision"],
        "Processes": str(about["processes"]),
        "Seed": str(t["seed"]),
    }


def chart(log: Sequence[Line], name: str, title: str, *, logarithmic: bool = False) -> Chart | None:
    """A figure of the log over the tokens seen; None when it is never there."""
    points = [
        (line["samples"], line[name])
        for line in log
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]
    if len({y for _, y in points}) < 2:  # nothing to see
        return None
    points = points[:: max(1, len(points) // MOST_POINTS)] + (
        [points[-1]] if len(points) > MOST_POINTS else []
    )
    logarithmic = logarithmic and min(y for _, y in points) > 0
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    ys = (
        logarithmic_ticks(min(y for _, y in points), max(y for _, y in points))
        if logarithmic
        else nice_ticks(max(y for _, y in points))
    )
    low, high, right = scale(ys[0]), scale(ys[-1]), points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 8) * x / right, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * (
            scale(y) - low
        ) / (high - low)

    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in points))
    xs = [x for x in nice_ticks(right) if x <= right]
    return Chart(
        title,
        (line,),
        tuple((place(x, ys[0])[0], compact(x)) for x in xs),
        tuple((place(0, y)[1], f"{y:.3g}") for y in ys),
    )


def nice_ticks(most: float, n: int = 4) -> list[float]:
    """Round numbers from 0 to at least ``most``, about ``n`` steps of 1, 2 or 5 times a power of ten."""
    rough = most / n
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(most / step * 0.999) + 1)]


def logarithmic_ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose two positive numbers."""
    every = [
        s * 10.0**e
        for e in range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 2)
        for s in (1, 2, 5)
    ]
    first = max(i for i, y in enumerate(every) if y <= least)
    last = min(i for i, y in enumerate(every) if y >= most)
    return every[first : max(last, first + 1) + 1]


def compact(number: float) -> str:
    """1,500,000 as 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def density(metrics: Line) -> list[tuple[float, float]]:
    """(lower edge, height in percent of the largest) of the histogram of how often features fire, from its
    first bin with any.
    """
    counts, edges = metrics["frequency"], metrics["frequency_edges"]
    first = next((i for i, c in enumerate(counts) if c), 0)
    first -= (first - edges.index(math.floor(edges[first]))) if math.floor(edges[first]) in edges else 0
    most = max(counts, default=0) or 1
    return [(edge, round(100 * c / most, 2)) for edge, c in zip(edges[first:-1], counts[first:], strict=True)]


def tenths(metrics: Line) -> list[dict[str, Any]]:
    """Variance explained by tenth of the norm, of the SAE and its baselines."""
    rows = []
    for i, value in enumerate(metrics["sae"]["by_norm"]):
        others = {name: metrics[name]["by_norm"][i] if metrics[name] else None for name in ("pca", "zero")}
        rows.append({"low": metrics["norms"][i], "high": metrics["norms"][i + 1], "sae": value, **others})
    return rows


def plot_run(folder: Path, log: Sequence[Line], metrics: Line | None) -> list[Path]:
    """``curves``: loss and FVU, dead share, L0 and learning rate over the tokens; ``result``: how often
    features fire, and variance explained by norm; each as .png and .svg. Raises ``InputError`` without
    matplotlib."""
    samples = [line["samples"] / 1e6 for line in log]
    with figure(folder / "curves", width=10, height=2.8, panels=4) as (_, axes):
        for axis, names, title in zip(
            axes,
            (("loss", "fvu"), ("dead",), ("l0",), ("lr",)),
            ("loss", "dead share", "codes per token", "learning rate"),
            strict=True,
        ):
            for name in names:
                axis.plot(
                    samples, [line[name] for line in log], label=name.upper() if name == "fvu" else name
                )
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("million tokens")
            if len(names) > 1:
                axis.set_yscale("log")
                axis.legend(frameon=False, fontsize=8)
            else:
                axis.set_ylim(bottom=0)
    drawn = ["curves"]
    if metrics:
        with figure(folder / "result", width=8, height=3, panels=2) as (_, axes):
            edges = metrics["frequency_edges"]
            axes[0].bar(
                edges[:-1], metrics["frequency"], width=[b - a for a, b in pairwise(edges)], align="edge"
            )
            axes[0].set_xlabel("log10 of the share of tokens on which a feature fires")
            axes[0].set_ylabel("features")
            for name, label in (("sae", "SAE"), ("pca", f"PCA-{metrics['pca_k']}"), ("zero", "zero codes")):
                if metrics[name]:
                    axes[1].plot(range(1, 11), metrics[name]["by_norm"], "o-", markersize=3, label=label)
            axes[1].set_xlabel("tenth of the tokens by norm")
            axes[1].set_ylabel("variance explained")
            axes[1].set_ylim(top=1)
            axes[1].legend(frameon=False, fontsize=8, loc="center right")
        drawn.append("result")
    return [folder / f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
