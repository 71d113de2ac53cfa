"""The language-model client against its limits, on a played endpoint in a process of its own.

    python scripts/bench/client.py [--quick] [--device cpu]

Prints: requests per second at 256 in flight and 20 ms a reply, as a ratio to a bare asyncio client that only
writes and reads bytes, with the growth of memory over the run; our CPU milliseconds per request over 1.3; and
for replies that take 1 s and 0.3 s the ideal time over ours. Those limits are of a machine on which the bare
client makes 11,800 requests per second; on a slower one (``slower``: how many times) CPU milliseconds are
divided, and replies take longer, in that proportion. No GPU is used; ``--device`` is there because every
benchmark takes it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import psutil
from common import arguments, report

from featureinterp.domain.chat import Message, Request
from featureinterp.llm.config import Endpoint
from featureinterp.llm.metered import Meter
from featureinterp.llm.stack import open_stack

IN_FLIGHT = 256
BARE_RATE = 11_800
CPU_MS = 1.3
SERVER = Path(__file__).resolve().parents[2] / "tests" / "endpoint.py"


@contextmanager
def server(latency_s: float) -> Iterator[str]:
    """The played endpoint as a process; gives its address."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "--latency", str(latency_s)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


class Bare(asyncio.Protocol):
    """One connection that sends the same request again and again."""

    def __init__(self, request: bytes, left: list[int], done: asyncio.Event) -> None:
        self.request, self.left, self.done, self.buffer = request, left, done, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if self.left[0] > 0:
            self.left[0] -= 1
            self.transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
            self.buffer = b""
            self.left[1] += 1
            if self.left[1] == self.left[2]:
                self.done.set()
            self.send()


def bare(url: str, n: int) -> float:
    """Seconds for ``n`` requests by the bare client."""
    body = (
        b'{"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16, '
        b'"temperature": 0.0}'
    )
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
        b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )

    async def go() -> float:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        left = [n, 0, n]
        at = urlsplit(url)
        start = time.perf_counter()
        for _ in range(IN_FLIGHT):
            await loop.create_connection(
                lambda: Bare(request, left, done), at.hostname or "127.0.0.1", at.port or 80
            )
        await done.wait()
        return time.perf_counter() - start

    return asyncio.run(go())


def ours(url: str, n: int) -> tuple[float, float, float]:
    """Seconds, CPU milliseconds per request, and growth of memory in bytes per request, for ``n`` requests
    through the whole stack.
    """
    process = psutil.Process()

    async def go() -> tuple[float, float, float]:
        async with open_stack(Endpoint(url, "m", None, concurrency=IN_FLIGHT), Meter()) as stack:
            model = stack.model()
            left = iter(range(n))
            memory = 0

            async def worker() -> None:
                nonlocal memory
                for number in left:
                    await model.complete(Request((Message("user", f"hello {number}"),), 16))
                    if number == n // 4:
                        memory = process.memory_info().rss

            await model.complete(Request((Message("user", "first"),), 16))
            start, cpu = time.perf_counter(), time.process_time()
            async with anyio.create_task_group() as group:
                for _ in range(IN_FLIGHT):
                    group.start_soon(worker)
            took, used = time.perf_counter() - start, time.process_time() - cpu
            return took, used / n * 1000, (process.memory_info().rss - memory) / (n * 0.75)

    return anyio.run(go)


def main() -> None:
    args = arguments(__doc__ or "")
    n = 2_000 if args.quick else 100_000
    with server(0.02) as url:
        bare(url, n // 4)
        limit = n / bare(url, n)
        took, cpu_ms, growth = ours(url, n)
        limit = max(limit, n / bare(url, n))
    slower = max(1.0, BARE_RATE / limit)
    report(
        "client: requests per second, 256 in flight, 20 ms",
        n / took,
        limit,
        n / took / limit,
        bytes_per_request=round(growth, 1),
    )
    report(
        "client: CPU ms per request, as of the machine of the limit",
        cpu_ms / slower,
        CPU_MS,
        cpu_ms / slower / CPU_MS,
        slower=round(slower, 1),
    )
    for latency, rounds in ((1.0, 4), (0.3, 8)) if args.quick else ((1.0, 16), (0.3, 40)):
        with server(latency * slower) as url:
            took, _, _ = ours(url, IN_FLIGHT * rounds)
        ideal = latency * slower * rounds
        report(
            f"client: 256 in flight, {latency:g} s a reply, share of the ideal",
            ideal / took,
            1.0,
            ideal / took,
            slower=round(slower, 1),
        )


if __name__ == "__main__":
    main()
