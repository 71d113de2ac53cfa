"""The process that runs one job of the service: ``python -m featureinterp.server.worker FOLDER``. It goes on
when the service ends.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock

from featureinterp.errors import FeatureInterpError, StorageError
from featureinterp.files import write_json
from featureinterp.jobs.plan import Event
from featureinterp.server.disk import is_full, says_full
from featureinterp.server.folder import JobsFolder
from featureinterp.server.views import State, end, lock_of

CANCELLED = "it was cancelled; what is finished is kept"

WRITE_EVERY_S = 0.25
LOCK_S = 2.0
"""A service that looks whether a job is at work holds its lock for a moment."""
LOOK_EVERY_S = 0.25
ASK_AGAIN_S = 30.0
DISK_FULL = 75
"""The exit code of a worker that found the disk full: the job has no outcome, and goes on when there is room.
"""


class _Watch:
    """Writes the job's progress now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._written = folder, 0.0

    def event(self, event: Event) -> None:
        now = time.monotonic()
        if now - self._written < WRITE_EVERY_S and event.done < event.total:
            return
        self._written = now
        explained = event.result.explanation
        latest = {"feature": event.result.feature, "explanation": explained.text if explained else None}
        self._write({**asdict(event.progress), "stage": event.stage, "latest": latest})

    def steps(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._written >= WRITE_EVERY_S:
            self._written = now
            self._write({"preparing": what, "step": done, "steps": total})

    def _write(self, progress: dict[str, Any]) -> None:
        if not _is_gone(self.folder):  # writing would make the folder anew
            write_json(self.folder / "progress.json", progress)


@contextmanager
def _ended_on_wish(folder: Path) -> Iterator[None]:
    """Interrupts the block, as Ctrl-C does, when somebody wishes the job to end or has taken its folder away.
    The wish is a file and not a signal from the service: the number of a process may be another's by the time
    that a signal reaches it."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            if (folder / "cancel").exists() or _is_gone(folder):
                _interrupt()
                over.wait(ASK_AGAIN_S)

    thread = threading.Thread(target=look, daemon=True, name="wishes")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _interrupt() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _is_gone(folder: Path) -> bool:
    return not (folder / "submitted.json").exists()


def work(folder: Path) -> int:
    """Runs the job in ``folder`` unless another worker does; returns the exit code."""
    try:
        held = lock_of(folder).acquire(timeout=LOCK_S)
    except filelock.Timeout:
        return 0
    with held:
        if _is_gone(folder) or (folder / "outcome.json").exists():
            return 0
        if (folder / "cancel").exists():  # a worker that it reached too early to say so
            return _end(folder, "cancelled", CANCELLED)
        return _work(folder)


def _work(folder: Path) -> int:
    from featureinterp import api

    watch = _Watch(folder)
    try:
        with _ended_on_wish(folder):
            results = api.run(
                JobsFolder(folder.parent).job(folder.name), on_event=watch.event, steps=watch.steps
            )
    except KeyboardInterrupt:
        if _is_gone(folder):
            return 0
        if not (folder / "cancel").exists():
            return 130  # whoever starts a worker next goes on from here
        return _end(folder, "cancelled", CANCELLED)
    except FeatureInterpError as error:
        if _is_gone(folder):
            return 0
        if isinstance(error, StorageError) and is_full(folder):
            print(error, file=sys.stderr)  # noqa: T201 (the worker's log)
            return DISK_FULL
        return _end(folder, "failed", str(error)) or 2
    except Exception as error:  # a bug; whoever starts a worker next would only meet it again
        traceback.print_exc()  # the worker's log
        if _is_gone(folder):
            return 0
        return (
            _end(
                folder,
                "failed",
                f"a mistake in the program ({type(error).__name__}): the traceback is in worker.log",
            )
            or 1
        )
    state: State = "stopped" if results.stopped else "done"
    message = str(results.stopped) if results.stopped else _missing(results.n_failed, results.n_partial)
    return _end(folder, state, message, n_features=len(results), n_failures=results.n_failures)


def _missing(failed: int, partial: int) -> str:
    """What a job that is through is without."""
    return f"{failed} features failed, {partial} have gaps" if failed or partial else ""


def _end(folder: Path, state: State, message: str, **more: int) -> int:
    """Writes how the job ended; it is as good as not ended when the disk does not take that."""
    if _is_gone(folder):
        return 0
    try:
        end(folder, state, message, **more)
    except StorageError as error:
        if not says_full(error):
            raise
        return DISK_FULL
    return 0


if __name__ == "__main__":
    # a service in the background of a script has Ctrl-C's signal ignored or blocked, and so would its
    # workers, which it ends by it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.exit(work(Path(sys.argv[1])))
