"""The folder of jobs: everything that the service knows lies here, so that a restart loses nothing.

One folder per job, named by its id: ``submitted.json`` (what was asked for; a folder without it is no job), ``lock`` (held by the worker while it
runs), ``starts`` (one line per start of a worker), ``progress.json``, ``cancel`` (a wish), ``outcome.json`` (the end), ``out/`` (journal, results,
report). A job without an outcome is running when its lock is held and waits for a worker otherwise.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from featureinterp.errors import UnknownNameError
from featureinterp.files import write_json
from featureinterp.jobs.spec import Job

State = Literal["queued", "running", "done", "stopped", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "stopped", "failed", "cancelled")
MAX_STARTS = 5
"""A worker that ends so often without an outcome is not started again."""
_PROBING = threading.Lock()
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")


@dataclass(frozen=True)
class JobView:
    """A job as the service shows it. ``progress``: done, failed, total, in_flight, requests, tokens, cost_usd, seconds, left_s, and the
    latest explanation; empty before the first feature."""

    id: str
    state: State
    run: str
    features: str
    llm: str
    submitted_at: float
    message: str
    progress: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For the wire."""
        return asdict(self)


class JobsFolder:
    """The jobs below a folder, which is made when it is not there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def submit(self, job: Job, shown: dict[str, Any]) -> str:
        """Writes a new job, whose results are to go below its own folder; returns its id. ``shown``: the request, as its sender put it."""
        number = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        folder = self.root / number
        folder.mkdir()
        placed = job.model_copy(update={"out": folder / "out"})
        write_json(folder / "submitted.json", {"job": placed.model_dump(mode="json"), "shown": shown, "at": time.time()})
        return number

    def path(self, number: str) -> Path:
        """A job's folder. Raises ``UnknownNameError`` when there is none of that id."""
        if not _ID.fullmatch(number) or not (self.root / number / "submitted.json").is_file():
            raise UnknownNameError(f"there is no job {number[:40]!r}")
        return self.root / number

    def ids(self) -> list[str]:
        """Ids of all jobs, the oldest first."""
        return sorted(p.name for p in self.root.iterdir() if _ID.fullmatch(p.name) and (p / "submitted.json").is_file())

    def job(self, number: str) -> Job:
        """What was asked for."""
        return Job.model_validate(_read(self.path(number) / "submitted.json")["job"])

    def view(self, number: str) -> JobView:
        """A job as it is now."""
        folder = self.path(number)
        submitted, outcome = _read(folder / "submitted.json"), _read(folder / "outcome.json")
        shown = submitted["shown"]
        state: State = outcome["state"] if outcome else "running" if is_locked(folder) else "queued"
        return JobView(
            number,
            state,
            shown["run"],
            str(shown["features"]),
            shown.get("llm") or "embedded",
            submitted["at"],
            outcome.get("message", ""),
            _read(folder / "progress.json"),
        )

    def views(self, newest: int | None = None) -> Iterator[JobView]:
        """All jobs or the newest, the newest first."""
        for number in self.ids()[::-1][:newest]:
            yield self.view(number)

    def waiting(self) -> list[str]:
        """Jobs that need a worker, the oldest first."""
        return [n for n in self.ids() if not (self.root / n / "outcome.json").exists() and not is_locked(self.root / n)]

    def cancel(self, number: str) -> None:
        """Asks a job to end; one that no worker has begun ends at once."""
        folder = self.path(number)
        (folder / "cancel").touch()
        if not is_locked(folder) and not (folder / "outcome.json").exists():
            end(folder, "cancelled", "it was cancelled before it began")

    def resume(self, number: str) -> None:
        """Lets a job that stopped, failed or was cancelled go on."""
        folder = self.path(number)
        for name in ("cancel", "outcome.json", "starts"):
            (folder / name).unlink(missing_ok=True)

    def begin(self, number: str) -> bool:
        """Notes that a worker starts; False when it has ended too often without an outcome, which is then its outcome."""
        folder = self.path(number)
        starts = folder / "starts"
        n = len(starts.read_text().splitlines()) if starts.exists() else 0
        if n >= MAX_STARTS:
            end(folder, "failed", f"its worker ended {n} times without an outcome (killed for lack of memory?): see worker.log, then resume it")
            return False
        with starts.open("a") as file:
            file.write(f"{time.time():.0f}\n")
        return True


def end(folder: Path, state: State, message: str, **more: Any) -> None:
    """Writes a job's outcome."""
    write_json(folder / "outcome.json", {"state": state, "message": message, "at": time.time(), **more})


def lock_of(folder: Path) -> filelock.BaseFileLock:
    """The lock that a job's worker holds; the system frees it whatever way the worker ends."""
    return filelock.FileLock(folder / "lock")


def is_locked(folder: Path) -> bool:
    """Whether a worker holds a job."""
    if not (folder / "lock").exists():
        return False
    lock = lock_of(folder)
    with _PROBING:  # two looks at once would take each other for a worker
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            return True
        lock.release()
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
