"""The embedded explainer behind llama.cpp's HTTP server, as a child process that cannot outlive us.

The child (``python -m featureinterp.llm.local_server``) binds a free port of the loopback interface, asks for
a key made for this one start, prints its port, and ends as soon as its standard input closes, which the
system does whatever way the parent ends.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from featureinterp.errors import EndpointUnavailableError, InputError

START_TIMEOUT_S = 300.0
CONTEXT_PER_SLOT = 4096


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Where a started server listens. ``key`` opens it."""

    base_url: str
    key: str
    process: subprocess.Popen[bytes]


@contextmanager
def local_server(
    gguf: Path,
    *,
    slots: int = 1,
    threads: int | None = None,
    timeout_s: float = START_TIMEOUT_S,
    command: Sequence[str] = (sys.executable, "-m", "featureinterp.llm.local_server"),
) -> Iterator[LocalServer]:
    """Starts a server for a GGUF file and stops it at the end of the block, whatever happens in it.

    ``threads``: one for each core of this process when not given. ``command``: what is started; it reads its
    settings from the first line of standard input and prints its address. Raises ``EndpointUnavailableError``
    with the server's last words when it does not come up within ``timeout_s``.
    """
    key = secrets.token_hex(16)
    settings = {"path": str(gguf), "slots": slots, "threads": threads or physical_cores(), "key": key}
    process = subprocess.Popen(  # noqa: S603 (our own module, or what the caller names)
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdin and process.stdout and process.stderr
        log, said = _Tail(process.stderr), _Tail(process.stdout)
        with suppress(BrokenPipeError):  # it ended at once, and its last words say why
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        address = said.first(timeout_s)
        if not address.startswith("http"):
            hangs = address == "" and process.poll() is None and said.is_alive()
            if hangs:
                process.kill()
            what = f"did not start within {timeout_s:.0f} s" if hangs else "did not start"
            raise EndpointUnavailableError(
                f"the local server for {gguf.name} {what}: {log.last() or 'it printed nothing'}"
            )
        yield LocalServer(address, key, process)
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def physical_cores() -> int:
    """Cores that this process may use, two threads of one core counted once: a second thread of a core makes
    llama.cpp no faster.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        threads_per_core = max(1, int(said["siblings"]) // int(said["cpu cores"]))
    except (OSError, KeyError, ValueError, ZeroDivisionError):
        threads_per_core = 1
    return max(1, usable // threads_per_core)


def slots_for(threads: int | None = None) -> int:
    """How many requests a server answers at once: on few cores one, since several share the same speed and
    each waits longer.
    """
    cores = threads or physical_cores()
    return 1 if cores < 8 else 2 if cores < 16 else 4


class _Tail(threading.Thread):
    """Reads a pipe to its end, so that the child never blocks on it, and keeps the last lines."""

    def __init__(self, pipe: Iterable[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._lines: list[str] = []
        self._first = ""
        self._begun = threading.Event()
        self.start()

    def run(self) -> None:
        for line in self._pipe:
            text = line.decode(errors="replace").strip()
            self._lines = [*self._lines[-19:], text]
            if not self._begun.is_set():
                self._first = text
                self._begun.set()
        self._begun.set()

    def first(self, timeout_s: float) -> str:
        """The first line; empty when there is none in time, or none at all."""
        self._begun.wait(timeout_s)
        return self._first

    def last(self, n: int = 3) -> str:
        """The last lines that say something."""
        self.join(1)
        return "; ".join([line for line in self._lines if line][-n:])[-600:]


def _serve() -> None:
    """The child: reads its settings from the first line of standard input, serves, and ends when that input
    does.
    """
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import xllamacpp
    except ImportError:
        sys.exit(
            "the package xllamacpp is missing: pip install xllamacpp, or give an endpoint with --base-url"
        )
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings["key"]]
    params.n_parallel = settings["slots"]
    params.n_ctx = CONTEXT_PER_SLOT * settings["slots"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.warmup = False
    params.ui = False
    params.endpoint_slots = False
    server = xllamacpp.Server(params)
    print(f"{server.listening_address.rstrip('/')}/v1", flush=True)
    while True:
        time.sleep(3600)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


def check_runtime() -> None:
    """Raises ``InputError`` when the package that holds the server is not installed."""
    import importlib.util

    if importlib.util.find_spec("xllamacpp") is None:
        raise InputError(
            "the embedded explainer needs the package xllamacpp: pip install xllamacpp, or give an "
            "endpoint with --base-url"
        )


if __name__ == "__main__":
    _serve()
