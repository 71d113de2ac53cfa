"""The process that runs one job of the service: ``python -m featureinterp.server.worker FOLDER``. It goes on when the service ends."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import filelock

from featureinterp.errors import FeatureInterpError
from featureinterp.files import write_json
from featureinterp.jobs.plan import Event
from featureinterp.server.folder import JobsFolder, State, end, lock_of

WRITE_EVERY_S = 0.25
LOCK_S = 2.0
"""A service that looks whether a job is at work holds its lock for a moment."""


class _Watch:
    """Writes the job's progress now and then, and ends the job when it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._written = folder, 0.0

    def event(self, event: Event) -> None:
        now = time.monotonic()
        if now - self._written < WRITE_EVERY_S and event.done < event.total:
            return
        self._written = now
        explained = event.result.explanation
        latest = {"feature": event.result.feature, "explanation": explained.text if explained else None}
        write_json(self.folder / "progress.json", {**asdict(event.progress), "stage": event.stage, "latest": latest})

    def steps(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._written >= WRITE_EVERY_S:
            self._written = now
            write_json(self.folder / "progress.json", {"preparing": what, "step": done, "steps": total})


def work(folder: Path) -> int:
    """Runs the job in ``folder`` unless another worker does; returns the exit code."""
    from featureinterp import api

    jobs = JobsFolder(folder.parent)
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=LOCK_S)
    except filelock.Timeout:
        return 0
    with lock:
        if (folder / "outcome.json").exists():
            return 0
        if (folder / "cancel").exists():  # a worker that it reached too early to say so
            end(folder, "cancelled", "it was cancelled; what is finished is kept")
            return 0
        watch = _Watch(folder)
        try:
            results = api.run(jobs.job(folder.name), on_event=watch.event, steps=watch.steps)
        except KeyboardInterrupt:
            if not (folder / "cancel").exists():
                return 130  # whoever starts a worker next goes on from here
            end(folder, "cancelled", "it was cancelled; what is finished is kept")
            return 0
        except FeatureInterpError as error:
            end(folder, "failed", str(error))
            return 2
        state: State = "stopped" if results.stopped else "done"
        message = str(results.stopped) if results.stopped else f"{results.n_failures} stages failed" if results.n_failures else ""
        end(folder, state, message, n_features=len(results), n_failures=results.n_failures)
    return 0


if __name__ == "__main__":
    # a service in the background of a script has Ctrl-C's signal ignored or blocked, and so would its workers, which it ends by it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.exit(work(Path(sys.argv[1])))
