"""The embedded explainer behind llama.cpp's HTTP server, as a child process that cannot outlive us.

The child (``python -m featureinterp.llm.local_server``) binds a free port of the loopback interface, asks for a key made for
this one start, prints its port, and ends as soon as its standard input closes, which the system does whatever way the
parent ends.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from featureinterp.errors import EndpointUnavailableError, InputError

START_TIMEOUT_S = 120.0
CONTEXT_PER_SLOT = 4096


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Where a started server listens. ``key`` opens it."""

    base_url: str
    key: str
    process: subprocess.Popen[bytes]


@contextmanager
def local_server(gguf: Path, *, slots: int = 2, threads: int | None = None) -> Iterator[LocalServer]:
    """Starts a server for a GGUF file and stops it at the end of the block, whatever happens in it.

    Raises ``EndpointUnavailableError`` with the server's own words when it does not come up.
    """
    key = secrets.token_hex(16)
    settings = {"path": str(gguf), "slots": slots, "threads": threads or os.cpu_count() or 1, "key": key}
    process = subprocess.Popen(
        [sys.executable, "-m", "featureinterp.llm.local_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        log = _Tail(process.stderr)
        line = process.stdout.readline()
        if not line.startswith(b"http"):
            process.wait(5)
            raise EndpointUnavailableError(f"the local server for {gguf.name} did not start: {log.last() or 'it printed nothing'}")
        _Tail(process.stdout)
        yield LocalServer(line.decode().strip(), key, process)
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Tail(threading.Thread):
    """Reads a pipe to its end, so that the child never blocks on it, and keeps the last lines."""

    def __init__(self, pipe: object) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._lines: list[str] = []
        self.start()

    def run(self) -> None:
        for line in self._pipe:  # type: ignore[attr-defined]
            self._lines = [*self._lines[-19:], line.decode(errors="replace").strip()]

    def last(self) -> str:
        self.join(1)
        return next((line for line in reversed(self._lines) if line), "")[:300]


def _serve() -> None:
    """The child: reads its settings from the first line of standard input, serves, and ends when that input does."""
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import xllamacpp
    except ImportError:
        sys.exit("the package xllamacpp is missing: pip install xllamacpp, or give an endpoint with --base-url")
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
        raise InputError("the embedded explainer needs the package xllamacpp: pip install xllamacpp, or give an endpoint with --base-url")


if __name__ == "__main__":
    _serve()
