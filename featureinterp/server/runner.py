"""Starting workers for the jobs that wait, and telling whoever watches what changes."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from featureinterp.errors import FeatureInterpError, UnknownNameError
from featureinterp.server.disk import Disk, room, says_full
from featureinterp.server.folder import JobsFolder
from featureinterp.server.views import ENDED, JobView
from featureinterp.server.worker import DISK_FULL

EVERY_S = 0.5
ALIVE_S = 15.0
"""Whoever watches a job hears so often that the service is there, in seconds; a line that is dead is noticed
by it.
"""
MIN_FREE = 100_000_000
_log = logging.getLogger("featureinterp.server")


@dataclass(frozen=True)
class Round:
    """How the last round of the runner went. ``at``: seconds since 1970, None before the first. ``trouble``:
    why it could not be finished, without paths. ``stuck``: how many jobs could not be started in it."""

    at: float | None = None
    trouble: str | None = None
    stuck: int = 0
    disk: Disk | None = None


class Runner:
    """Keeps at most ``parallel`` workers at work, those included that an earlier service started.

    Each job and each round stands alone: what goes wrong with one is logged and seen in :attr:`round`, and
    the next goes on. No worker is started while the disk has less than ``min_free`` bytes of room.
    """

    def __init__(self, jobs: JobsFolder, *, parallel: int = 1, min_free: int = MIN_FREE) -> None:
        self.jobs, self.parallel, self.min_free = jobs, parallel, min_free
        self.round = Round()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._changed = anyio.Condition()
        self._told = -1
        self._was_full = False
        self._stuck: dict[str, str] = {}
        self._limiter = anyio.CapacityLimiter(1)  # a thread of its own, however many requests wait for one

    async def serve(self) -> None:
        """Looks after the folder until it is cancelled. Workers go on then."""
        while True:
            await self.once()
            await anyio.sleep(EVERY_S)

    async def once(self) -> None:
        """One round; never raises."""
        before = self.round
        try:
            self.round = await anyio.to_thread.run_sync(self._look_after, limiter=self._limiter)
        except Exception as error:  # a bug too: it is logged whole, and the jobs go on
            self.round = Round(time.time(), self._logged(error), before.stuck, before.disk)
        await self.tell()

    async def tell(self) -> None:
        """Wakes whoever watches when something has changed."""
        if self.jobs.version != self._told:
            async with self._changed:
                self._told = self.jobs.version
                self._changed.notify_all()

    def _look_after(self) -> Round:
        self._reap()
        disk = room(self.jobs.root, self.min_free, probe=self._was_full)
        self._was_full = not disk.enough
        trouble = None
        try:
            self.jobs.refresh()
        except Exception as error:  # about one job; the others have been looked at
            trouble = self._logged(error)
        if disk.enough:
            self._start_workers()
        return Round(time.time(), trouble, len(self._stuck), disk)

    def _logged(self, error: Exception) -> str:
        """What is said of a round that could not be finished; it is logged whole when it is new."""
        trouble = _without_paths(error)
        if trouble != self.round.trouble:
            _log.error("a round of the runner failed (%s); the next goes on", error, exc_info=error)
        return trouble

    def _reap(self) -> None:
        for number, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[number]
                self._was_full |= child.returncode == DISK_FULL

    def _start_workers(self) -> None:
        working = self.jobs.working() | self._children.keys()
        stuck: dict[str, str] = {}
        for number in self.jobs.queued():
            if len(working) >= self.parallel:
                break
            if number not in working:
                try:
                    if self._start(number):
                        working.add(number)
                except Exception as error:
                    self._was_full |= says_full(error)
                    stuck[number] = _without_paths(error)
                    if self._stuck.get(number) != stuck[number]:
                        _log.error("the job %s could not be started; others go on", number, exc_info=error)
        self._stuck = stuck

    def _start(self, number: str) -> bool:
        if not self.jobs.begin(number):
            return False
        try:
            self._children[number] = start_worker(self.jobs.root / number)
        except BaseException:
            self.jobs.take_back(number)
            raise
        return True

    async def watch(self, number: str) -> AsyncIterator[JobView | None]:
        """A job whenever something about it changes, from now until it has ended or is gone; None when it has
        long not changed.
        """
        last: JobView | None = None
        while True:
            view = self.jobs.peek(number)
            if view is None:
                try:
                    view = await anyio.to_thread.run_sync(self.jobs.view, number)
                except UnknownNameError:
                    return
            if view != last:
                last = view
                yield view
                if view.state in ENDED:
                    return
            if await self._waited(number, last):
                yield None

    async def _waited(self, number: str, last: JobView | None) -> bool:
        """Waits until a job has changed; True when it has not for long."""
        with anyio.move_on_after(ALIVE_S) as scope:
            async with self._changed:
                while self.jobs.peek(number) == last:
                    await self._changed.wait()
        return scope.cancelled_caught

    async def cancel(self, number: str) -> JobView:
        """Asks a job to end; its worker sees the wish. Raises ``WrongStateError``."""
        await anyio.to_thread.run_sync(self.jobs.cancel, number)
        await self.tell()
        return await anyio.to_thread.run_sync(self.jobs.view, number)

    async def resume(self, number: str, *, queue: int | None = None) -> JobView:
        """Lets a job that ended before it was through go on; whoever watches it from now on does not see its
        former end.
        """
        await anyio.to_thread.run_sync(lambda: self.jobs.resume(number, queue=queue))
        await self.tell()
        return await anyio.to_thread.run_sync(self.jobs.view, number)


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the worker of a job in a session of its own, so that what ends the service does not end it."""
    with (folder / "worker.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 (our own module, and a folder that the operator named)
            [sys.executable, "-m", "featureinterp.server.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _without_paths(error: Exception) -> str:
    """What went wrong, for those who need no token."""
    if says_full(error):
        return "the disk is full"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "a job's folder cannot be used" if isinstance(error, FeatureInterpError) else type(error).__name__
