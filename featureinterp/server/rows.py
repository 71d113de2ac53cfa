"""Results of a job, read one by one and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from featureinterp.errors import DamagedStoreError, UnknownNameError
from featureinterp.server.folder import JobsFolder, WrongStateError, is_locked
from featureinterp.server.views import DamagedJobError
from featureinterp.stored.sums import checked_lines, read_marker

MAX_LINE = 1 << 25
"""No feature with its windows is larger, in bytes."""


def results_of(jobs: JobsFolder, number: str, start: int, end: int) -> list[dict[str, Any]]:
    """The features of a job from ``start`` to before ``end``."""
    return list(islice(rows_of(jobs, number), start, end))


def rows_of(jobs: JobsFolder, number: str) -> Iterator[dict[str, Any]]:
    """The results of a job one by one. Raises ``DamagedJobError`` at the first that is not what was
    written.
    """
    path = jobs.path(number) / "out" / "results.jsonl"
    if not path.is_file() and not path.with_name("about.json").is_file():
        return
    again = "resume the job to write it anew from the journal"
    try:
        with _lines(path, again) as lines:
            for i, line in enumerate(lines):
                yield _row(number, i, line)
    except DamagedStoreError as error:
        if is_locked(path.parent.parent):
            raise WrongStateError(
                f"the results of the job {number} are being written: ask again in a second"
            ) from error
        raise DamagedJobError(str(error).replace(str(path.parent) + "/", "")) from error


@contextmanager
def _lines(path: Path, remedy: str) -> Iterator[Iterator[bytes]]:
    """The lines of results, checked by their blocks; ``about.json`` of a version before checksums has none,
    and theirs are read as they are.
    """
    about = path.with_name("about.json")
    if not path.is_file():
        raise DamagedStoreError(f"{path} is missing: {remedy}")
    if not about.is_file():
        raise DamagedStoreError(f"{about} is missing, by which {path.name} is checked: {remedy}")
    files = read_marker(about, remedy).files
    if files is not None:
        if path.name not in files:
            raise DamagedStoreError(f"{about} has no checksums of {path.name}: {remedy}")
        yield checked_lines(path, files[path.name], remedy)
        return
    with path.open("rb") as file:
        yield iter(lambda: file.readline(MAX_LINE), b"")


def _row(number: str, i: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or type(row.get("feature")) is not int:
        again = "resume the job to write it anew from the journal"
        raise DamagedJobError(f"results.jsonl of the job {number} is damaged in line {i + 1}: {again}")
    return row


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def feature_of(jobs: JobsFolder, number: str, index: int) -> dict[str, Any]:
    """One feature of a job. Raises ``UnknownNameError`` when the job has no results of it."""
    for row in rows_of(jobs, number):
        if row["feature"] == index:
            return row
    raise UnknownNameError(f"the job {number} has no results of feature {index}")
