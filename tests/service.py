"""The service in a process of its own, as a shell starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from endpoint import KEY


class Running:
    """A service in a process of its own; ``descriptors``: how many the system lets it have."""

    def __init__(
        self, runs: Path, jobs: Path, config: Path, *options: str, descriptors: int | None = None, **env: str
    ) -> None:
        self.descriptors = descriptors
        self.args = [
            sys.executable,
            "-m",
            "featureinterp.cli.main",
            "serve",
            "--runs",
            str(runs),
            "--jobs",
            str(jobs),
            "--allow-llm",
            "played",
        ]
        self.args += options
        self.env = os.environ | {"FEATUREINTERP_CONFIG": str(config), "TEST_KEY": KEY, **env}
        self.start()

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        args: list[str] = [*self.args, "--port", str(port)]
        if self.descriptors is not None:
            args = ["bash", "-c", f'ulimit -n {self.descriptors}; exec "$@"', "service", *args]
        self.process = subprocess.Popen(
            args, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{port}"
        assert self.url in self.process.stdout.readline()
        for _ in range(1200):
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.05)
        raise AssertionError("the service did not come up")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def configured(path: Path, url: str) -> Path:
    path.write_text(
        f'[endpoints.played]\nbase_url = "{url}"\nmodel = "m"\napi_key_env = "TEST_KEY"\nconcurrency = '
        f"2\nprice = {{ input = 1, output = 1 }}\n"
    )
    return path
