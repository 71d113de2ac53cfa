"""Starting workers for the jobs that wait, and telling whoever watches what changes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread

from featureinterp.server.folder import ENDED, JobsFolder, JobView, is_locked

EVERY_S = 0.5


class Runner:
    """Keeps at most ``parallel`` workers at work, those included that an earlier service started."""

    def __init__(self, jobs: JobsFolder, *, parallel: int = 1) -> None:
        self.jobs, self.parallel = jobs, parallel
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._views: dict[str, JobView] = {}
        self._changed = anyio.Condition()
        self._looking = anyio.Lock()

    async def serve(self) -> None:
        """Looks after the folder until it is cancelled. Workers go on then."""
        while True:
            async with self._looking:
                await anyio.to_thread.run_sync(self._start_workers)
                await self._look()
            await anyio.sleep(EVERY_S)

    async def _look(self) -> None:
        views = await anyio.to_thread.run_sync(lambda: {v.id: v for v in self.jobs.views()})
        if views != self._views:
            async with self._changed:
                self._views = views
                self._changed.notify_all()

    def _start_workers(self) -> None:
        for number, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[number]
        waiting = self.jobs.waiting()
        ids = self.jobs.ids()
        working = {n for n in ids if n not in waiting and not (self.jobs.root / n / "outcome.json").exists()} | self._children.keys()
        for number in waiting:
            if len(working) >= self.parallel:
                break
            if number not in working and self.jobs.begin(number):
                self._children[number] = start_worker(self.jobs.root / number)
                working.add(number)

    async def watch(self, number: str) -> AsyncIterator[JobView]:
        """A job whenever something about it changes, from now until it has ended."""
        last: JobView | None = None
        while True:
            known = self._views.get(number)
            view: JobView = known if known is not None else await anyio.to_thread.run_sync(self.jobs.view, number)
            if view != last:
                last = view
                yield view
                if view.state in ENDED:
                    return
            async with self._changed:
                if self._views.get(number, view) == last:
                    await self._changed.wait()

    async def cancel(self, number: str) -> None:
        """Asks a job to end, its worker with the signal of Ctrl-C."""
        async with self._looking:
            await anyio.to_thread.run_sync(self._cancel, number)
            await self._look()

    async def resume(self, number: str) -> None:
        """Lets a job that ended before it was through go on; whoever watches it from now on does not see its former end."""
        async with self._looking:
            await anyio.to_thread.run_sync(self.jobs.resume, number)
            await self._look()

    def _cancel(self, number: str) -> None:
        self.jobs.cancel(number)
        folder = self.jobs.path(number)
        pid = folder / "pid"
        if is_locked(folder) and pid.exists():
            with contextlib.suppress(ProcessLookupError, ValueError):  # it may just have ended
                os.kill(int(pid.read_text()), signal.SIGINT)


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the worker of a job in a session of its own, so that what ends the service does not end it."""
    with (folder / "worker.log").open("ab") as log:
        child = subprocess.Popen(  # noqa: S603 (our own module, and a folder that the operator named)
            [sys.executable, "-m", "featureinterp.server.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(child.pid))
    return child
