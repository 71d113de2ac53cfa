"""Records on disk: JSON lines that name windows by row; texts and activations stay in the store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featureinterp.domain.record import FeatureRecord
from featureinterp.errors import IncompatibleError
from featureinterp.files import replaced_atomically
from featureinterp.stored.sums import SummedFile, read_marker, write_marker

SUMS = ".sums.json"


def record_to_json(record: FeatureRecord) -> dict[str, Any]:
    """One record as plain data: windows are [row, first token, number of tokens, largest activation];
    ``holistic`` holds the method and, in the order of ``splits``, the values of each window that has them."""
    return {
        "feature": record.feature.index,
        "sae": record.feature.sae,
        "scale": record.scale,
        "density": record.density,
        "count": record.count,
        "splits": {
            split: {
                source: [[w.row, w.start, len(w.pieces), round(w.max_activation, 6)] for w in windows]
                for source, windows in by_source.items()
            }
            for split, by_source in record.splits.items()
        },
        **({"holistic": _holistic(record)} if record.holistic else {}),
        "shortfalls": dict(record.shortfalls),
    }


def _holistic(record: FeatureRecord) -> dict[str, Any]:
    windows = {
        f"{split}/{source}": [
            None if w.holistic is None else [round(h, 6) for h in w.holistic.tolist()] for w in windows
        ]
        for split, by_source in record.splits.items()
        for source, windows in by_source.items()
        if any(w.holistic is not None for w in windows)
    }
    return {"method": record.holistic, "windows": windows}


def write_records(path: Path, records: Iterable[FeatureRecord], codes: str | None = None) -> int:
    """Writes records as JSON lines, atomically and one at a time; returns how many. ``NAME.sums.json`` beside
    ``NAME.jsonl`` has their checksums and ``codes``, the fingerprint of the store that they name windows of.
    """
    n = 0
    with replaced_atomically(path) as file:
        out = SummedFile(file)
        for record in records:
            n += 1
            out.write(json.dumps(record_to_json(record), ensure_ascii=False).encode() + b"\n")
    write_marker(path.with_suffix(SUMS), {"n": n, "codes": codes}, {path.name: out.sums})
    return n


def check_records(run: Path, codes: str) -> None:
    """Raises ``IncompatibleError`` when a run's ``records.jsonl`` names windows of other codes than
    ``codes``.
    """
    path, again = (run / "records.jsonl").with_suffix(SUMS), "run 'featureinterp records' again"
    if path.exists() and read_marker(path, again).value.get("codes") not in (None, codes):
        raise IncompatibleError(f"{run / 'records.jsonl'} is of other codes than {run / 'codes'}: {again}")
