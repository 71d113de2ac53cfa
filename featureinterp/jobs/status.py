"""How far a job is, read from its folder by whoever asks, also while it runs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featureinterp.domain.usage import cost_in_words
from featureinterp.errors import InputError
from featureinterp.jobs.journal import Journal
from featureinterp.stored.sums import described, read_marker


@dataclass(frozen=True)
class JobStatus:
    """``wanted``: features of the job; ``done``, ``partial`` (some requests failed), ``failed``, ``left``.
    ``stages``: per stage and status, how many rows and what they cost. ``causes``: the commonest failures.
    ``last_run``: how the newest run ended, or that it goes on."""

    folder: str
    wanted: int
    done: int
    partial: int
    failed: int
    left: int
    last_run: str
    stages: list[dict[str, Any]]
    causes: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def job_folder(folder: Path) -> Path:
    """The job's folder: the one that is named, or ``explain`` in it. Raises ``InputError`` when neither holds
    a job.
    """
    for place in (folder, folder / "explain"):
        if (place / "job.json").is_file():
            return place
    raise InputError(f"{folder} holds no job: give the folder that 'featureinterp run' or 'explain' wrote")


def job_status(folder: Path) -> JobStatus:
    """Reads a job's journal. Raises ``InputError`` when there is none."""
    folder = job_folder(folder)
    remedy = "run the same job again, which writes it anew and keeps the rest"
    job = read_marker(folder / "job.json", remedy).value
    with described(folder / "job.json", remedy):
        key, features = str(job["key"]), [int(f) for f in job["features"]]
    with Journal(folder / "journal.sqlite") as journal:
        finished = journal.finished(key)
        counts = {s: sum(finished.get(f) == s for f in features) for s in ("done", "partial", "failed")}
        last = journal.last_run()
        stages, causes = journal.stages(), journal.causes()
    left = len(features) - sum(counts.values())
    return JobStatus(
        str(folder),
        len(features),
        counts["done"],
        counts["partial"],
        counts["failed"],
        left,
        _told(last),
        stages,
        causes,
    )


def _told(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["started"]))
    if run["ended"] is None:
        return f"began {began}; it is under way, or was killed"
    return (
        f"began {began}, ended as {run['outcome']} after {run['ended'] - run['started']:.0f} s and "
        f"{run['requests']:,} requests {cost_in_words(run['cost_usd'])}"
    )
