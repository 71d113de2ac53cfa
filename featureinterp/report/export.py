"""Results as a table for other programs: one row per feature."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from featureinterp.domain.result import FeatureResult
from featureinterp.errors import InputError
from featureinterp.files import explained_storage, write_atomic
from featureinterp.report.render import read_results

FORMATS = ("parquet", "csv", "jsonl")


def export_results(folder: Path, to: str, out: Path | None = None) -> tuple[Path, int]:
    """Writes the results in ``folder`` as a table; returns the file and its number of rows."""
    if to not in FORMATS:
        raise InputError(f"there is no format {to!r}: choose from {', '.join(FORMATS)}")
    results, _ = read_results(folder)
    return write_table(out or folder / f"features.{to}", [row(r) for r in results], to)


def write_table(path: Path, rows: Sequence[dict[str, Any]], to: str) -> tuple[Path, int]:
    """Writes rows in one of ``FORMATS``; a column is there when any row has it. Returns the file and the number of rows."""
    names = list(dict.fromkeys(name for r in rows for name in r))
    rows = [{name: r.get(name) for name in names} for r in rows]
    if to == "jsonl":
        write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    elif to == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows({k: _plain(v) for k, v in r.items()} for r in rows)
        write_atomic(path, text.getvalue())
    else:
        _write_parquet(path, rows)
    return path, len(rows)


def row(result: FeatureResult) -> dict[str, Any]:
    """A feature's row: what it is, its explanation, each score with interval and null, what it cost, and why anything is missing.

    Columns of a score: ``NAME``, ``NAME_low``, ``NAME_high`` (95 % interval), ``NAME_null``, ``NAME_n`` (windows or questions), and
    ``top_tokens_NAME`` for the baseline. A figure that is undefined is empty.
    """
    explanation = result.explanation
    usage = explanation.provenance.usage if explanation else None
    out: dict[str, Any] = {
        "feature": result.feature,
        "sae": result.sae,
        "scale": result.scale,
        "density": result.density,
        "explanation": explanation.text if explanation else None,
        "rules": json.dumps([[r.activates_on, r.strength] for r in explanation.rules], ensure_ascii=False) if explanation else None,
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


def _plain(value: Any) -> Any:
    """A spreadsheet must not take a text for a formula."""
    return "'" + value if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    with explained_storage(path):
        write_atomic(path, sink.getvalue())
