"""What lies in the folder of one job, and how the service shows it. What cannot be read is shown as damaged,
with its cause.
"""

from __future__ import annotations

import calendar
import errno
import json
import math
import os
import stat
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import filelock
import pydantic

from featureinterp.errors import InputError
from featureinterp.files import write_json
from featureinterp.validation import first_problem

State = Literal["queued", "running", "done", "stopped", "failed", "cancelled", "damaged"]
ENDED: tuple[State, ...] = ("done", "stopped", "failed", "cancelled", "damaged")
"""States that nothing but a wish changes: to resume the job, or to mend its folder."""
MAX_FILE = 1_000_000
"""No file that the service reads to show a job is larger, in bytes."""
RESTORE = "put the job's folder back from a backup, or delete it"
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
"""Causes that lie with this process at this moment, and say nothing about the folder."""
_FILES = ("submitted.json", "outcome.json", "progress.json")
_PROBING = threading.Lock()


class DamagedJobError(InputError):
    """A job's folder that cannot be understood."""


@dataclass(frozen=True)
class JobView:
    """A job as the service shows it. ``progress``: done, failed, total, in_flight, requests, tokens,
    cost_usd, seconds, left_s, and the latest explanation; empty before the first feature. ``submitted_at``:
    seconds since 1970. A damaged job says in ``message`` what is wrong with its folder."""

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


Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class Seen:
    """A job when it was last looked at. ``stamps``: inode, size and time of the files that were read.
    ``held``: by a worker.
    """

    view: JobView
    stamps: tuple[Stamp, ...]
    held: bool


class _File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Shown(_File):
    run: str
    features: str
    llm: str | None = None


class _Submitted(_File):
    job: dict[str, Any]
    shown: _Shown
    at: float


class _Outcome(_File):
    state: Literal["done", "stopped", "failed", "cancelled"]
    message: str = ""


Form = TypeVar("Form", bound=pydantic.BaseModel)
Count = Annotated[int, pydantic.Field(ge=0)]


class _Latest(_File):
    feature: int
    explanation: str | None


class _Working(_File):
    done: Count
    failed: Count
    total: Count
    requests: Count
    cost_usd: float | None
    left_s: float | None
    latest: _Latest | None = None


class _Preparing(_File):
    preparing: str
    step: Count
    steps: Count


def look(folder: Path, before: Seen | None = None) -> Seen:
    """The job in a folder as it is now; nothing is read again that has not changed since ``before``.

    Raises ``FileNotFoundError`` when the folder is gone, and ``OSError`` for what only concerns this process
    at this moment.
    """
    if not stat.S_ISDIR(folder.stat().st_mode):
        raise FileNotFoundError(errno.ENOENT, "no folder", str(folder))
    stamps = tuple(_stamp(folder / name) for name in _FILES)
    same = before is not None and before.stamps == stamps
    if before is not None and same and before.view.state in ENDED and before.view.state != "damaged":
        return before
    held = False
    try:
        outcome = (
            read_json(folder / "outcome.json", _Outcome) if os.path.lexists(folder / "outcome.json") else None
        )
        held = outcome is None and is_locked(folder)
        view = _view(folder, outcome, held)
    except DamagedJobError as error:
        view = _damaged(folder.name, str(error))
        held = is_locked(folder)
    except OSError as error:
        if error.errno in PASSING:
            raise
        what = Path(error.filename).name if error.filename else "its folder"
        view = _damaged(folder.name, f"{what} cannot be read ({error.strerror or error}): {RESTORE}")
    return (
        before
        if before is not None and same and before.view == view and before.held == held
        else Seen(view, stamps, held)
    )


def _view(folder: Path, outcome: _Outcome | None, held: bool) -> JobView:
    submitted = submitted_in(folder)
    state: State = outcome.state if outcome is not None else "running" if held else "queued"
    shown, message = submitted.shown, "" if outcome is None else outcome.message
    llm = shown.llm or "embedded"
    return JobView(
        folder.name, state, shown.run, shown.features, llm, submitted.at, message, _progress(folder)
    )


def _progress(folder: Path) -> dict[str, Any]:
    """What the worker says of itself, or nothing: the next that it writes takes the place of what cannot be
    read.
    """
    for form in (_Working, _Preparing):
        try:
            return read_json(folder / "progress.json", form).model_dump(mode="json")
        except DamagedJobError:
            continue
    return {}


def _damaged(number: str, why: str) -> JobView:
    return JobView(number, "damaged", "", "", "", submitted_at(number), why, {})


def submitted_at(number: str) -> float:
    """When a job was submitted, by its id. Seconds since 1970."""
    try:
        return float(calendar.timegm(time.strptime(number[:15], "%Y%m%d-%H%M%S")))
    except (ValueError, OverflowError):
        return 0.0


def submitted_in(folder: Path) -> _Submitted:
    """What was asked for. Raises ``DamagedJobError``."""
    return read_json(folder / "submitted.json", _Submitted)


def read_json(path: Path, form: type[Form]) -> Form:
    """A small file's content. Raises ``DamagedJobError`` when it is missing, too large, no file, no JSON, or
    of another form.
    """
    advice = "resume the job to have it written anew" if path.name == "outcome.json" else RESTORE
    try:
        return form.model_validate(_parsed(path))
    except pydantic.ValidationError as error:
        raise DamagedJobError(f"{path.name} is damaged ({first_problem(error)}): {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedJobError(f"{path.name} is damaged ({str(error)[:200]}): {advice}") from error
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise DamagedJobError(f"{path.name} cannot be read ({error.strerror or error}): {advice}") from error


def _parsed(path: Path) -> Any:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError(f"it has more than {MAX_FILE:,} bytes")
    return json.loads(content, parse_constant=_no_number, parse_float=_finite)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


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


def end(folder: Path, state: State, message: str, **more: Any) -> None:
    """Writes a job's outcome."""
    write_json(folder / "outcome.json", {"state": state, "message": message, "at": time.time(), **more})
