"""Results as a table for other programs: one row per feature."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from featureinterp.domain.result import FeatureResult
from featureinterp.files import replaced_atomically
from featureinterp.interfaces import WriteTable
from featureinterp.registry import FORMATS
from featureinterp.reports.render import read_results

BATCH = 256
"""Rows that are in memory at once."""
_FORMULA = re.compile(r"((?:\A|[;\t])\s{0,16})('*(?=[=+\-@\uff1d\uff0b\uff0d\uff20]))")
_GUARDED = re.compile(r"((?:\A|[;\t])\s{0,16})'('*(?=[=+\-@\uff1d\uff0b\uff0d\uff20]))")


def export_results(folder: Path, to: str, out: Path | None = None) -> tuple[Path, int]:
    """Writes the results in ``folder`` as a table in a format of the registry; returns the file and its
    number of rows.
    """
    write = FORMATS.load(to)
    results, _ = read_results(folder)
    return _written(out or folder / f"features.{to}", _Rows(results), write)


class _Rows:
    """Rows of results, made anew whenever they are gone through."""

    def __init__(self, results: Iterable[FeatureResult]) -> None:
        self._results = results

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(row, self._results)


def write_table(path: Path, rows: Iterable[dict[str, Any]], to: str) -> tuple[Path, int]:
    """Writes rows in a format of the registry; a column is there when any row has it. ``rows`` are gone
    through several times and never held all at once. Returns the file and the number of rows."""
    return _written(path, rows, FORMATS.load(to))


def _written(path: Path, rows: Iterable[dict[str, Any]], write: WriteTable) -> tuple[Path, int]:
    return path, write(path, _Whole(rows))


class _Whole:
    """Rows with all columns, made anew whenever they are gone through."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows
        self._names = list(dict.fromkeys(name for r in rows for name in r))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({name: r.get(name) for name in self._names} for r in self._rows)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Comma-separated text for spreadsheets; the number of rows."""
    n = 0
    with replaced_atomically(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = None
        for r in rows:
            if writer is None:
                writer = csv.DictWriter(text, list(r))
                writer.writerow({name: cell(name) for name in r})
            writer.writerow({k: cell(v) for k, v in r.items()})
            n += 1
        text.detach()
    return n


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """One JSON object per line; the number of rows."""
    n = 0
    with replaced_atomically(path) as file:
        for r in rows:
            file.write(json.dumps(r, ensure_ascii=False).encode() + b"\n")
            n += 1
    return n


def row(result: FeatureResult) -> dict[str, Any]:
    """A feature's row: what it is, its explanation, each score with interval and null, what it cost, and why
    anything is missing.

    Columns of a score: ``NAME``, ``NAME_low``, ``NAME_high`` (95 % interval), ``NAME_null``, ``NAME_n``
    (windows or questions), and ``top_tokens_NAME`` for the baseline. A figure that is undefined is empty.
    """
    explanation = result.explanation
    usage = explanation.provenance.usage if explanation else None
    out: dict[str, Any] = {
        "feature": result.feature,
        "sae": result.sae,
        "scale": result.scale,
        "density": result.density,
        "explanation": explanation.text if explanation else None,
        "rules": json.dumps([[r.activates_on, r.strength] for r in explanation.rules], ensure_ascii=False)
        if explanation
        else None,
        "model": explanation.provenance.model if explanation else None,
        "prompt": explanation.provenance.prompt if explanation else None,
        "explain_cost_usd": usage.cost_usd if usage else None,
        "null_of": result.null_of,
        "failures": "; ".join(f"{f.stage}: {f.error}: {f.message}" for f in result.failures) or None,
    }
    for score in result.scores:
        out[score.name] = score.value
        out[f"{score.name}_low"] = score.interval.low if score.interval else None
        out[f"{score.name}_high"] = score.interval.high if score.interval else None
        out[f"{score.name}_null"] = score.null
        out[f"{score.name}_n"] = score.n_scored
    out |= {f"top_tokens_{s.name}": s.value for s in result.baseline_scores}
    return out


def cell(value: Any) -> Any:
    """A value as a CSV file holds it: a spreadsheet must not take a text, or what follows a semicolon or tab
    in it (which separate cells in many languages' settings), for a formula, so that ``=``, ``+``, ``-`` and
    ``@`` get an apostrophe there. :func:`uncell` gives the text back."""
    return _FORMULA.sub(r"\1'\2", value) if isinstance(value, str) else value


def uncell(text: str) -> str:
    """The text of which :func:`cell` made this."""
    return _GUARDED.sub(r"\1\2", text)


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Apache Parquet, in two passes: for the columns' types and for their content; the number of rows."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([])
    for batch in _batches(iter(rows)):
        both = [schema, pyarrow.Table.from_pylist(batch).schema]
        schema = pyarrow.unify_schemas(both, promote_options="permissive")
    n = 0
    with replaced_atomically(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for batch in _batches(iter(rows)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
            n += len(batch)
    return n


def _batches(rows: Iterator[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    while batch := list(islice(rows, BATCH)):
        yield batch
