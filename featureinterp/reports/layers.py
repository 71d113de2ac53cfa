"""A comparison of layers as files: a table, a plot, and all figures as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featureinterp.errors import InputError
from featureinterp.reports.export import write_table
from featureinterp.reports.figures import figure
from featureinterp.stored.sums import write_marker


def write_layers(folder: Path, study: Mapping[str, Any]) -> None:
    """Writes ``layers.csv``, ``layers.json`` and, where matplotlib is there, ``layers.png`` and ``.svg``.
    ``study``: what ``LayerStudy.to_json`` gives.
    """
    write_table(folder / "layers.csv", layer_rows(study), "csv")
    with suppress(InputError):
        plot_layers(folder, study)
    write_marker(folder / "layers.json", dict(study))


def layer_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per layer: AUROCs, and the spectrum with all tokens and without shares of them."""
    rows = []
    for layer in study["layers"]:
        row = {name: layer[name] for name in ("block", "hook", "auroc", "median_norm", "sink_share")}
        row |= {
            "auroc_low": layer["interval"] and layer["interval"]["low"],
            "auroc_high": layer["interval"] and layer["interval"]["high"],
        }
        for trim, spectrum in zip(study["trims"], layer["spectra"], strict=True):
            suffix = f"_without_{100 * trim:g}%" if trim else ""
            row |= {f"{name}{suffix}": value for name, value in spectrum.items()}
        rows.append(row | {f"auroc {name}": value for name, value in layer["aurocs"].items()})
    return rows


def plot_layers(folder: Path, study: Mapping[str, Any]) -> list[Path]:
    """AUROC of the probes, and participation ratios with and without the tokens that dominate, over the
    blocks. Raises ``InputError`` without matplotlib.
    """
    layers: Sequence[Mapping[str, Any]] = study["layers"]
    blocks = [layer["block"] for layer in layers]
    with figure(folder / "layers", width=9, height=3.2, panels=2) as (_, (left, right)):
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        known = [layer for layer in layers if layer["interval"]]
        left.vlines(
            [x["block"] for x in known],
            [x["interval"]["low"] for x in known],
            [x["interval"]["high"] for x in known],
            color="C0",
            alpha=0.4,
        )
        left.plot(blocks, [layer["auroc"] for layer in layers], "o-", markersize=3)
        left.set_ylabel("mean held-out AUROC of linear probes")
        for i, trim in enumerate(study["trims"]):
            label = f"without {100 * trim:g} % of the tokens" if trim else "all tokens"
            right.plot(
                blocks,
                [layer["spectra"][i]["participation_ratio"] for layer in layers],
                "o-",
                markersize=3,
                label=label,
            )
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(ScalarFormatter())
        right.yaxis.set_minor_formatter(NullFormatter())
        right.set_ylabel("participation ratio of the covariance")
        right.legend(frameon=False, fontsize=8)
        for axis in (left, right):
            axis.axvline(study["best"], color="#cccccc", linewidth=5, zorder=0)
            axis.set_xlabel("block")
    return [folder / f"layers.{kind}" for kind in ("png", "svg")]
