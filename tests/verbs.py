"""Verbs in processes of their own: forks of one process that has imported everything, so that each begins at
once. A verb can be told to stop (SIGSTOP) where it has said that it owns a folder, or reads it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 300
"""A verb that takes longer is ended."""
SERVER = """
import json, os, signal, sys
import torch, transformers
import featureinterp.api as api
import featureinterp.api.training, featureinterp.cli.main as entry
import featureinterp.claims.owners as owners
import featureinterp.training.recipe, featureinterp.jobs.run, featureinterp.codes.collect
import featureinterp.reports.probing, featureinterp.reports.layers, featureinterp.training.layers

def stop(at, what):
    def stops():
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "owner":
        write = owners.write_json
        def written(path, value):
            write(path, value)
            if str(path) == os.path.join(at, owners.OWNER):
                stops()
        owners.write_json = written
    else:
        look = owners._replaced
        def looked(folder):
            if str(folder) == at:
                stops()
            return look(folder)
        owners._replaced = looked

def child(wish):
    signal.alarm(wish["deadline_s"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(wish[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["featureinterp", *wish["args"]]
    if wish["stop"]:
        stop(wish["at"], wish["stop"])
    code = 0
    try:
        entry.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    wish = json.loads(line)
    if "wait" in wish:
        _, status = os.waitpid(wish["wait"], os.WUNTRACED)
        print(json.dumps(None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)), flush=True)
        continue
    number = os.fork()
    if number == 0:
        child(wish)
    print(number, flush=True)
"""


@dataclass
class Verb:
    """A verb at work. ``code``: its exit code, None while it is stopped."""

    verbs: Verbs
    pid: int
    folder: Path
    code: int | None = None

    def wait(self) -> Verb:
        """Until it ends or stops."""
        self.code = self.verbs.ask({"wait": self.pid})
        return self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait().code == -signal.SIGKILL

    def go_on(self) -> Verb:
        os.kill(self.pid, signal.SIGCONT)
        return self.wait()

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")


class Verbs:
    """Starts verbs; only one wish at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._folder = tempfile.TemporaryDirectory()
        self._n = 0
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, wish: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def start(self, *args: str, stop: str = "", at: Path | None = None) -> Verb:
        """``stop``: as "owner" or as "reader" of the folder ``at``."""
        self._n += 1
        folder = Path(self._folder.name) / str(self._n)
        folder.mkdir()
        places = {name: str(folder / name) for name in ("out", "err")}
        wish = {"args": args, "stop": stop, "at": str(at), "deadline_s": DEADLINE_S, **places}
        return Verb(self, self.ask(wish), folder)

    def run(self, *args: str) -> Verb:
        """A verb that has ended."""
        return self.start(*args).wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self._folder.cleanup()


@contextmanager
def verbs_at_hand() -> Iterator[Verbs]:
    """The process that others are forked from."""
    found = Verbs()
    try:
        yield found
    finally:
        found.close()
