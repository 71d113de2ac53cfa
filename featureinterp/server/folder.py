"""The folder of jobs: everything that the service knows lies here, so that a restart loses nothing.

One folder per job, named by its id: ``submitted.json`` (what was asked for), ``lock`` (held by the worker
while it runs), ``starts`` (one line per start of a worker), ``progress.json``, ``cancel`` (a wish),
``outcome.json`` (the end), ``out/`` (journal, results, report). A job without an outcome is running when its
lock is held and waits for a worker otherwise.

What is known of the jobs is kept in memory: a look at the folder reads the jobs that have not ended, those
whose files have changed, and names that are new. Jobs that have ended cost nothing until they are shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from featureinterp.errors import InputError, UnknownNameError
from featureinterp.files import write_json
from featureinterp.jobs.spec import Job
from featureinterp.server.disk import says_full
from featureinterp.server.views import (
    ENDED,
    PASSING,
    RESTORE,
    DamagedJobError,
    JobView,
    Seen,
    State,
    end,
    is_locked,
    lock_of,
    look,
    submitted_in,
)
from featureinterp.validation import first_problem

__all__ = [
    "ENDED",
    "MAX_STARTS",
    "JobView",
    "JobsFolder",
    "QueueFullError",
    "State",
    "WrongStateError",
    "end",
    "is_locked",
    "lock_of",
]
MAX_STARTS = 5
"""A worker that ends so often without an outcome is not started again."""
LIST_AGAIN_S = 30.0
"""The names in the folder are read again after so long, for file systems that do not say when a folder has
changed.
"""
_UNSURE_NS = 2_000_000_000
"""Two changes of a folder within one tick of its clock look the same: names are read again until the last
change is so long ago.
"""
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}", re.ASCII)


class QueueFullError(InputError):
    """As many jobs wait as may."""


class WrongStateError(InputError):
    """A job is not in a state for what is wished."""


class JobsFolder:
    """The jobs below a folder, which is made when it is not there. Methods may be called from any thread;
    those that change a job see it and change it in one step."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.version = 0
        self._guard = threading.RLock()
        self._seen: dict[str, Seen] = {}
        self._live: set[str] = set()
        self._order: list[str] = []
        self._listed: tuple[int, int] | None = None

    def submit(self, job: Job, shown: dict[str, Any], *, queue: int | None = None) -> str:
        """Writes a new job, whose results are to go below its own folder; returns its id. ``shown``: the
        request, as its sender put it.

        Raises ``QueueFullError`` when ``queue`` jobs wait already. The job appears whole or not at all.
        """
        number = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        placed = job.model_copy(update={"out": self.root / number / "out"})
        draft = self.root / f".{number}.new"
        with self._guard:
            self._check_queue(queue)
            draft.mkdir()
            try:
                content = {"job": placed.model_dump(mode="json"), "shown": shown, "at": time.time()}
                write_json(draft / "submitted.json", content)
                draft.rename(self.root / number)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            self._look([number])
        return number

    def tidy(self) -> None:
        """Deletes jobs that a service was killed while it wrote them: nobody was told of them. Only for the
        service that owns the folder.
        """
        for draft in self.root.glob(".*.new"):
            if _ID.fullmatch(draft.name[1:-4]):
                shutil.rmtree(draft, ignore_errors=True)

    def _check_queue(self, queue: int | None) -> None:
        if queue is not None and len(self.waiting()) >= queue:
            raise QueueFullError(f"{queue} jobs are waiting already: try again when some have begun")

    def path(self, number: str) -> Path:
        """A job's folder. Raises ``UnknownNameError`` when there is none of that id."""
        if not _ID.fullmatch(number) or not (self.root / number).is_dir():
            raise UnknownNameError(f"there is no job {number[:40]!r}")
        return self.root / number

    def ids(self) -> list[str]:
        """Ids of all jobs, the oldest first."""
        with self._guard:
            self._list()
            return list(self._order)

    def job(self, number: str) -> Job:
        """What was asked for; its results go below its own folder, wherever that has been moved to. Raises
        ``DamagedJobError``.
        """
        folder = self.path(number)
        try:
            return Job.model_validate({**submitted_in(folder).job, "out": folder / "out"})
        except pydantic.ValidationError as error:
            raise DamagedJobError(
                f"submitted.json holds no job that can be run ({first_problem(error)}): submit it anew"
            ) from error

    def view(self, number: str) -> JobView:
        """A job as it is now. Raises ``UnknownNameError`` when there is none of that id."""
        self.path(number)
        with self._guard:
            self._look([number])
            if number not in self._seen:
                raise UnknownNameError(f"there is no job {number!r}")
            return self._seen[number].view

    def peek(self, number: str) -> JobView | None:
        """A job as it was when somebody last looked."""
        seen = self._seen.get(number)
        return None if seen is None else seen.view

    def views(self, newest: int | None = None, *, skip: int = 0) -> list[JobView]:
        """All jobs or the newest ones, the newest first, without the ``skip`` newest."""
        with self._guard:
            self.refresh()
            chosen = self._order[::-1][skip : None if newest is None else skip + newest]
            self._look(chosen)
            return [self._seen[number].view for number in chosen if number in self._seen]

    def waiting(self) -> list[str]:
        """Jobs that need a worker, the oldest first."""
        with self._guard:
            self.refresh()
            return self.queued()

    def queued(self) -> list[str]:
        """:meth:`waiting`, as it was when somebody last looked."""
        with self._guard:
            return sorted(n for n in self._live if self._seen[n].view.state == "queued")

    def working(self) -> set[str]:
        """Jobs that a worker held when somebody last looked."""
        with self._guard:
            return {n for n in self._live if self._seen[n].held}

    def counts(self) -> Counter[State]:
        """How many jobs there are in each state, as far as is known."""
        return Counter(seen.view.state for seen in list(self._seen.values()))

    def refresh(self) -> None:
        """Looks at the jobs that have not ended, and at those that are new. Each stands alone: the others are
        looked at when one of them cannot be; then raises what was in the way, ``OSError`` mostly."""
        with self._guard:
            self._list()
            self._look(self._live | (set(self._order) - self._seen.keys()))

    def _list(self) -> None:
        changed, now = self.root.stat().st_mtime_ns, time.time_ns()
        if self._listed is not None:
            at, last = self._listed
            if changed == last and at - last > _UNSURE_NS and 0 <= now - at < LIST_AGAIN_S * 1e9:
                return
        with os.scandir(self.root) as entries:
            names = {e.name for e in entries if _ID.fullmatch(e.name) and e.is_dir()}
        for number in self._seen.keys() - names:
            self._forget(number)
        self._order, self._listed = sorted(names), (now, changed)

    def _look(self, numbers: Iterable[str]) -> None:
        trouble: Exception | None = None
        for number in list(numbers):
            before = self._seen.get(number)
            try:
                seen = look(self.root / number, before)
            except FileNotFoundError:
                self._forget(number)
            except Exception as error:
                trouble = error
            else:
                self._remember(number, seen, before)
        if trouble is not None:
            raise trouble

    def _remember(self, number: str, seen: Seen, before: Seen | None) -> None:
        self._seen[number] = seen
        if before is None or before.view != seen.view:
            self.version += 1
        if seen.view.state in ENDED and seen.view.state != "damaged":
            self._live.discard(number)
        else:
            self._live.add(number)

    def _forget(self, number: str) -> None:
        if self._seen.pop(number, None) is not None:
            self.version += 1
        self._live.discard(number)

    def cancel(self, number: str) -> None:
        """Asks a job to end; one that no worker has begun ends at once. Raises ``WrongStateError`` when it
        has ended.
        """
        with self._guard, _damage_explained():
            state = self.view(number).state
            if state in ENDED:
                raise WrongStateError(f"the job has ended already: it is {state}")
            folder = self.path(number)
            (folder / "cancel").touch()
            if not is_locked(folder) and not (folder / "outcome.json").exists():
                end(folder, "cancelled", "it was cancelled before it began")
            self._look([number])

    def resume(self, number: str, *, queue: int | None = None) -> None:
        """Lets a job that stopped, failed or was cancelled go on, or one whose outcome is damaged.

        Raises ``WrongStateError`` when it has not ended, ``DamagedJobError`` when it cannot be known what was
        asked for, and ``QueueFullError`` when ``queue`` jobs wait already.
        """
        with self._guard, _damage_explained():
            state, folder = self.view(number).state, self.path(number)
            if state not in ENDED:
                raise WrongStateError(f"the job has not ended: it is {state}")
            submitted_in(folder)
            self._check_queue(queue)
            for name in ("cancel", "starts", "outcome.json"):
                with contextlib.suppress(FileNotFoundError):
                    (folder / name).unlink()
            self._look([number])

    def begin(self, number: str) -> bool:
        """Notes that a worker starts; False when it has ended too often without an outcome, which is then its
        outcome.
        """
        folder = self.path(number)
        starts = folder / "starts"
        n = len(starts.read_bytes().splitlines()) if starts.exists() else 0
        if n >= MAX_STARTS:
            why = "killed for lack of memory, or the disk was full?"
            end(
                folder,
                "failed",
                f"its worker ended {n} times without an outcome ({why}): see worker.log, then resume it",
            )
            return False
        with starts.open("a") as file:
            file.write(f"{time.time():.0f}\n")
        return True

    def take_back(self, number: str) -> None:
        """Takes back the last :meth:`begin`, after which no worker could be started."""
        starts = self.root / number / "starts"
        with contextlib.suppress(OSError):
            os.truncate(starts, sum(len(line) for line in starts.read_bytes().splitlines(keepends=True)[:-1]))


@contextlib.contextmanager
def _damage_explained() -> Iterator[None]:
    """Says of what cannot be done in a job's folder that the folder is damaged, unless the cause lies
    elsewhere.
    """
    try:
        yield
    except OSError as error:
        if error.errno in PASSING or says_full(error):
            raise
        what = Path(error.filename).name if error.filename else "its folder"
        raise DamagedJobError(f"{what} cannot be changed ({error.strerror or error}): {RESTORE}") from error
