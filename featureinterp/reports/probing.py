"""A study by labels as files: tables, a plot, a page, and what other reports need of it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.errors import IncompatibleError, InputError
from featureinterp.files import replaced_atomically, write_atomic
from featureinterp.probing.annotate import Annotation
from featureinterp.probing.study import Concept, ConceptFeature, Study
from featureinterp.reports.export import write_table
from featureinterp.reports.figures import figure
from featureinterp.reports.render import environment
from featureinterp.stored.sums import Sums, checked_bytes, read_marker, write_marker

Row = dict[str, Any]
STUDY, LABELS = "study.json", "labels.npz"


def write_study(
    folder: Path, study: Study, labelled: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> Path:
    """Writes ``features``, ``concepts`` and ``concept_features`` as parquet and CSV, ``labels.npz`` (per
    label the positions of its tokens), ``probe.html``, plots where matplotlib is there, and ``study.json``
    last. ``about``: ``title``, ``subtitle``, ``facts``, and ``codes``, the store's fingerprint. Returns the
    page."""
    tables = {
        "features": feature_rows(study),
        "concepts": concept_rows(study),
        "concept_features": ranked_rows(study),
    }
    for name, rows in tables.items():
        for to in ("parquet", "csv"):
            write_table(folder / f"{name}.{to}", rows, to)
    with replaced_atomically(folder / LABELS) as file:
        arrays: dict[str, Any] = {
            f"positions_{i}": positions for i, positions in enumerate(labelled.values())
        }
        np.savez_compressed(file, names=np.array(list(labelled), dtype=np.str_), **arrays)
    page = (
        environment()
        .get_template("probe.html")
        .render(study=study, about=about, by_label=by_label(study), place=_place)
    )
    write_atomic(folder / "probe.html", page)
    with suppress(InputError):  # without matplotlib there are tables and a page, and no plots
        plot_study(folder, study)
    names = [LABELS, *(f"{name}.{to}" for name in tables for to in ("parquet", "csv"))]
    write_marker(
        folder / STUDY, {**about, **study.to_json()}, {name: Sums.of(folder / name) for name in names}
    )
    return folder / "probe.html"


def about_study(codes: Mapping[str, Any], labels: str, study: Study, n_spans: int, n_outside: int) -> Row:
    """Title, subtitle and facts of a page; ``codes``: the store's metadata."""
    s = study.settings
    return {
        "title": f"{codes['sae']['name']} by labels",
        "subtitle": f"What {len(study.concepts)} labelled concepts say about {study.n_features:,} features "
        f"of {codes['model']['name']}",
        "facts": {
            "Labels": f"{labels}; {n_spans:,} spans, {n_outside:,} of them outside the run's windows",
            "Corpus": codes["corpus"]["name"],
            "Hook": codes["sae"]["hook"],
            "Tokens": f"{study.n_tokens:,} scored, in {study.n_documents:,} documents{_left_out(study)}",
            "Annotated": f"AUROC of at least {s.min_auroc:g}, or F1 of at least {s.min_f1:g}, on held-out "
            "documents, and more than any feature that chose the "
            f"label reaches in {100 * (1 - s.alpha):g} % of {s.n_shifts} shifts of the labels",
            "Seed": s.seed,
        },
    }


_TABLE = """<table><thead><tr><th>concept</th><th>best feature</th><th>AUROC</th><th>95 % interval</th>
<th>labels shifted</th><th>all features</th><th>dense</th></tr></thead>
<tbody>{% for c in study.concepts %}{% set f = c.by_auroc[0] if c.by_auroc else none %}
<tr><td style="text-align:left">{{ c.name }}</td>
{% if f is none %}<td colspan="6" style="text-align:left">{{ c.undefined }}</td>{% else %}
<td>{{ f.feature }}</td><td>{{ f.auroc | number }}</td>
<td>{% if c.auroc_interval %}{{ c.auroc_interval.low | number }} to {{ c.auroc_interval.high | number }}
{%- endif %}</td><td>{{ c.auroc_null | number }}</td>
<td>{{ c.codes_auroc | number(3) }}</td><td>{{ c.dense_auroc | number(3) }}</td>
{%- endif %}</tr>{% endfor %}</tbody></table>"""


def _left_out(study: Study) -> str:
    return (
        f"; {study.n_repeated:,} left out of the test, whose text is in training" if study.n_repeated else ""
    )


def study_table(study: Study) -> str:
    """A small table for a notebook."""
    return environment().from_string(_TABLE).render(study=study)


def read_annotations(folder: Path, codes: str) -> tuple[list[Annotation], dict[str, np.ndarray]]:
    """Annotations that :func:`write_study` left in a folder, and the positions of each label's tokens;
    nothing when there are none, or they are of other codes than the fingerprint ``codes`` says."""
    if not (folder / STUDY).exists():
        return [], {}
    remedy = "run the same 'featureinterp probe' again, which writes it anew"
    try:
        marker = read_marker(folder / STUDY, remedy)
        found = marker.value
        if found["codes"] != codes:
            return [], {}
        sums = None if marker.files is None else marker.files.get(LABELS)
        with np.load(io.BytesIO(checked_bytes(folder / LABELS, sums, remedy)), allow_pickle=False) as file:
            positions = {str(name): file[f"positions_{i}"] for i, name in enumerate(file["names"])}
        return [Annotation(**a) for a in found["annotations"]], positions
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{folder} holds no readable study ({error}): run 'featureinterp probe' again"
        ) from error


def check_study(folder: Path, codes: str) -> None:
    """Raises ``IncompatibleError`` when a study is of other codes than the fingerprint ``codes`` says."""
    again = "run 'featureinterp probe' again"
    if (folder / STUDY).exists() and read_marker(folder / STUDY, again).value.get("codes") != codes:
        raise IncompatibleError(f"{folder} is a study of other codes than those beside it: {again}")


def feature_rows(study: Study) -> list[Row]:
    """One row per annotation."""
    return [asdict(a) for a in study.annotations]


def concept_rows(study: Study) -> list[Row]:
    """One row per concept: its size, its best feature by AUROC and by F1, and the decoders."""
    rows = []
    for c in study.concepts:
        row: Row = {
            name: getattr(c, name) for name in ("name", "n_tokens", "n_instances", "n_documents", "n_test")
        }
        row |= _prefixed("auroc", c.by_auroc[0] if c.by_auroc else None) | _interval(
            "auroc", c.auroc_interval
        )
        row |= {"auroc_null": c.auroc_null, "auroc_p": c.auroc_p}
        row |= (
            _prefixed("f1", c.by_f1) | _interval("f1", c.f1_interval) | {"f1_null": c.f1_null, "f1_p": c.f1_p}
        )
        for name in ("codes", "dense"):
            row[f"{name}_decoder_auroc"] = getattr(c, f"{name}_auroc")
            row |= _interval(f"{name}_decoder_auroc", getattr(c, f"{name}_interval")) | {
                f"{name}_decoder_l2": getattr(c, f"{name}_l2")
            }
        rows.append(row | {"undefined": c.undefined})
    return rows


def ranked_rows(study: Study) -> list[Row]:
    """One row per concept and feature, the best in training first."""
    return [
        {"name": c.name, "rank": rank, **asdict(f)}
        for c in study.concepts
        for rank, f in enumerate(c.by_auroc, 1)
    ]


def by_label(study: Study) -> dict[str, list[Annotation]]:
    """A label's annotations, best first, each feature once (by AUROC where it has one)."""
    out: dict[str, dict[int, Annotation]] = {c.name: {} for c in study.concepts}
    for a in study.annotations:
        out[a.label].setdefault(a.feature_id, a)
    return {
        label: sorted(found.values(), key=lambda a: (a.auroc is None, -a.score))
        for label, found in out.items()
    }


def _prefixed(score: str, found: ConceptFeature | None) -> Row:
    """The best feature by a score."""
    values = dict.fromkeys(ConceptFeature.__slots__) if found is None else asdict(found)
    return {f"best_by_{score}_{name}": value for name, value in values.items()}


def _interval(name: str, interval: Any) -> Row:
    return {
        f"{name}_low": interval.low if interval else None,
        f"{name}_high": interval.high if interval else None,
    }


def _place(value: float) -> float:
    """A place on a bar from 0.4 to 1, in percent."""
    return round(100 * min(1.0, max(0.0, (value - 0.4) / 0.6)), 2)


def plot_study(folder: Path, study: Study) -> list[Path]:
    """``concepts.png`` and ``.svg``: per label the held-out AUROC of its best feature with its interval and
    null, and of the decoders. Raises ``InputError`` without matplotlib."""
    shown: Sequence[Concept] = sorted(
        (c for c in study.concepts if c.by_auroc), key=lambda c: c.by_auroc[0].auroc or 0
    )
    with figure(folder / "concepts", width=7, height=1.2 + 0.34 * max(1, len(shown))) as (_, axis):
        for place, c in enumerate(shown):
            axis.plot(
                [c.by_auroc[0].auroc],
                [place],
                "o",
                color="C0",
                label="best feature" if not place else None,
                zorder=3,
            )
            if c.auroc_interval:
                axis.plot(
                    [c.auroc_interval.low, c.auroc_interval.high], [place, place], color="C0", linewidth=1.5
                )
            for value, mark, colour, label in (
                (c.auroc_null, "|", "#888888", "that feature, labels shifted (95 %)"),
                (c.codes_auroc, "D", "C1", "decoder of all features"),
                (c.dense_auroc, "s", "C2", "decoder of the dense activations"),
            ):
                if value is not None:
                    axis.plot(
                        [value],
                        [place],
                        mark,
                        color=colour,
                        markersize=9 if mark == "|" else 5,
                        fillstyle="none",
                        label=label if not place else None,
                    )
        axis.set_yticks(range(len(shown)), [c.name for c in shown])
        axis.set_xlim(0.4, 1.02)
        axis.set_xlabel("held-out AUROC")
        axis.axvline(0.5, color="#cccccc", linewidth=0.8, zorder=0)
        if shown:
            axis.legend(
                frameon=False,
                fontsize=8,
                loc="upper center",
                bbox_to_anchor=(0.45, -0.16 - 0.4 / max(1, len(shown))),
                ncols=2,
            )
    return [folder / f"concepts.{kind}" for kind in ("png", "svg")]
