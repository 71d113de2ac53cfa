"""Reads all of a folder and says of every part whether it is what was written."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featureinterp.errors import FeatureInterpError, StorageError
from featureinterp.files import opened_file, whole_file
from featureinterp.stored.sums import Sums, is_sealed, read_marker

GOOD, DAMAGED, UNCHECKED = "good", "damaged", "no checksums"
MARKERS = {
    "windows.json",
    "codes.json",
    "metadata.json",
    "dense.json",
    "study.json",
    "about.json",
    "job.json",
    "summary.json",
    "run.json",
    "extracting.json",
    "collecting.json",
    "layers.json",
    "metrics.json",
    "records.sums.json",
    "request.json",
}
"""Markers of our own, which are named when an earlier version wrote them without checksums."""
Check = Callable[[Path], int]
"""Raises for a damaged file; how many of its rows have no checksum."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a part. ``state``: ``good``, ``damaged`` or ``no checksums`` (an earlier version wrote
    it). ``why``: what is wrong, in a sentence that says what to do; of a part without checksums, what could
    not be told. ``n_bytes``: how much was read."""

    part: str
    state: str
    why: str = ""
    n_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def verify_files(
    folder: Path, tables: Mapping[str, Check], checkpoints: Mapping[str, Check]
) -> Iterator[Found]:
    """Every part of a folder, in the order of their names. ``tables``, ``checkpoints``: how a file of a name
    is checked that proves itself. Raises ``StorageError`` for a folder that cannot be read."""
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}: give one that featureinterp wrote")
    named: set[Path] = set()
    files = sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)
    for path in files:
        if path.name in tables or path.name in checkpoints:
            named.add(path)
            yield _checked(path, {**tables, **checkpoints}[path.name])
        elif path.suffix in (".json", ".sums"):
            yield from _marker(path, named)
    for path in files:
        if path.suffix in (".bin", ".npy") and path not in named and not path.name.endswith(".part"):
            yield Found(str(path), UNCHECKED, "no marker has checksums of it", _size(path))


def _checked(path: Path, check: Check) -> Found:
    try:
        with opened_file(path):
            pass
        bare = check(path)
    except FeatureInterpError as error:
        return Found(str(path), DAMAGED, str(error), _size(path))
    state = UNCHECKED if bare else GOOD
    return Found(str(path), state, f"{bare:,} rows of an earlier version" if bare else "", _size(path))


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a link to nothing, or a file that is gone by now."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _marker(path: Path, named: set[Path]) -> Iterator[Found]:
    """A marker, and the files that it has checksums of."""
    remedy = "make it again with the command that wrote it"
    try:
        value = json.loads(whole_file(path))
        ours = isinstance(value, dict) and (is_sealed(value) or path.name in MARKERS)
    except (StorageError, ValueError, RecursionError):
        ours = True
    if not ours:
        return
    size = _size(path)
    try:
        marker = read_marker(path, remedy)
    except StorageError as error:
        yield Found(str(path), DAMAGED, str(error), size)
        return
    yield (
        Found(str(path), UNCHECKED, "an earlier version wrote it", size)
        if marker.files is None
        else Found(str(path), GOOD, "", size)
    )
    for name, sums in (marker.files or {}).items():
        file = path.parent / name
        found = _file(file, sums, remedy)
        if file not in named or found.state == DAMAGED:
            yield found
        named.add(file)


def _file(path: Path, sums: Sums, remedy: str) -> Found:
    try:
        why = sums.damage(path)
    except StorageError as error:
        why = str(error)
    return Found(str(path), DAMAGED if why else GOOD, f"{why}: {remedy}" if why else "", sums.size)


def version_of(path: Path) -> int:
    """The version that a SQLite file says it has, without touching it; −1 when it cannot be read."""
    try:
        with closing(sqlite3.connect(f"file:{path.absolute().as_posix()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        return -1
