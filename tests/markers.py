"""Markers of stored parts, changed as their writer would have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featureinterp.stored.sums import Sums, read_marker, write_marker


def change_marker(path: Path, **changes: Any) -> None:
    """Writes other values into a marker, and the checksums of the files as they are now."""
    marker = read_marker(path, "")
    changes = {name: value for name, value in changes.items() if name not in ("checksum", "files")}
    if marker.files is None:
        path.write_text(json.dumps({**marker.value, **changes}))
        return
    there = [
        p for p in path.parent.iterdir() if p.is_file() and (p.name in marker.files or p.suffix == ".bin")
    ]
    write_marker(path, {**marker.value, **changes}, {p.name: Sums.of(p) for p in there})


def unseal(path: Path) -> None:
    """Makes a marker what versions before checksums wrote."""
    path.write_text(json.dumps(read_marker(path, "").value))
