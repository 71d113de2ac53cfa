"""A local HTTP server that plays an OpenAI-compatible endpoint, with latency and faults on demand, and a
ledger of what it was asked and would have billed.

In a test: ``with endpoint(answer) as server``. As a program of its own, for benchmarks and for tests that
kill processes:

    python tests/endpoint.py --latency 0.02 --fault 500=0.3 --ledger FILE

prints its address, and writes the ledger as JSON lines. Without ``answer`` it replies by the request alone,
so that the same request always has the same answer. The protocol is written by hand because a server that is
slower than the client would measure itself.
"""

from __future__ import annotations

import argparse
import asyncio
import email.utils
import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Answer = Callable[[dict[str, Any]], Any]
Dialect = Callable[["Entry", dict[str, Any]], Any]
KEY = "secret-key-of-the-test"
FAULTS = (
    "429",
    "429-date",
    "500",
    "503",
    "drop",
    "truncate",
    "malformed",
    "schema",
    "length",
    "stall",
    "drip",
)
STALL_S = 2.0


@dataclass
class Entry:
    """One request as the server saw it. ``whole``: its answer left the server complete, with status 200, and
    would have been billed.
    """

    number: int
    path: str
    key: str | None
    body: dict[str, Any]
    digest: str
    at: float
    fault: str | None = None
    status: int = 200
    whole: bool = False
    tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    free: bool = False

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass
class Endpoint:
    """``dialect`` gets a request's entry and body first, and answers it or leaves it (None) to ``answer``,
    which gets the body and returns a text, a (status, headers, body) triple, or a whole completion; status 0
    drops the connection. ``faults``: how often each of ``FAULTS`` happens, 0 to 1; every request has its own
    luck, drawn from ``seed``."""

    answer: Answer
    latency_s: float = 0.0
    faults: dict[str, float] = field(default_factory=dict)
    retry_after_s: float = 0.0
    key: str | None = None
    stall_s: float = STALL_S
    seed: int = 0
    url: str = ""
    ledger: list[Entry] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    keep_bodies: bool = True
    mistakes: list[Exception] = field(default_factory=list)
    file: TextIO | None = None
    dialect: Dialect | None = None

    def __post_init__(self) -> None:
        self._luck = random.Random(self.seed)

    def draw(self) -> str | None:
        """The fault of the next request."""
        place = self._luck.random()
        for name, share in self.faults.items():
            place -= share
            if place < 0:
                return name
        return None

    def paid_twice(self) -> dict[str, int]:
        """Requests whose answer left whole more than once, by digest."""
        return {digest: n for digest, n in Counter(e.digest for e in self.ledger if e.whole).items() if n > 1}


def completion(
    text: str,
    *,
    finish: str = "stop",
    logprobs: dict[str, float] | None = None,
    prompt_tokens: int = 11,
    completion_tokens: int = 3,
) -> dict[str, Any]:
    """A chat completion in OpenAI's wire format."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    if logprobs is not None:
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in logprobs.items()]
        choice["logprobs"] = {
            "content": [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top}]
        }
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def digest_of(body: dict[str, Any]) -> str:
    """A hash of a request's body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]


def play(body: dict[str, Any]) -> dict[str, Any]:
    """A well-formed answer that depends on the request alone: an instance of its schema, or a word with its
    probabilities.
    """
    luck = random.Random(digest_of(body))
    size = len(json.dumps(body.get("messages", ""))) // 4
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        n = body.get("n", 1)
        whole = completion(
            json.dumps(instance(form["json_schema"]["schema"], luck)),
            prompt_tokens=size,
            completion_tokens=12 * n,
        )
        for index in range(1, n):
            more = completion(json.dumps(instance(form["json_schema"]["schema"], luck)))["choices"][0]
            whole["choices"].append(more | {"index": index})
        return whole
    words = {
        "Yes": -luck.random() * 3,
        "No": -luck.random() * 3,
        **{str(i): -luck.random() * 5 for i in range(6)},
    }
    shots = [m["content"] for m in body.get("messages", ()) if m.get("role") == "assistant"]
    levels = bool(shots) and all(s in "012345" for s in shots)  # the worked examples say what is asked for
    word = max("012345" if levels else ("Yes", "No"), key=words.__getitem__)
    return completion(
        word, logprobs=words if body.get("logprobs") else None, prompt_tokens=size, completion_tokens=1
    )


def instance(schema: dict[str, Any], luck: random.Random) -> Any:
    """A value that a JSON schema allows (objects, arrays, strings, integers, numbers, booleans)."""
    kind = schema.get("type")
    if kind == "object":
        return {name: instance(inner, luck) for name, inner in schema.get("properties", {}).items()}
    if kind == "array" and "prefixItems" in schema:
        return [instance(item, luck) for item in schema["prefixItems"]]
    if kind == "array":
        return [
            instance(schema["items"], luck)
            for _ in range(luck.randint(schema.get("minItems", 1), schema.get("maxItems", 3)))
        ]
    if kind == "integer":
        return luck.randint(schema.get("minimum", 0), schema.get("maximum", 5))
    if kind == "number":
        return luck.random()
    if kind == "boolean":
        return luck.random() < 0.5
    return (
        f"words about {luck.choice(['the sea', 'money', 'war', 'law', 'time', 'farms', 'schools'])} "
        f"{luck.randint(0, 999)}"
    )


_WRONG_SCHEMA = '{"answer": [{"nothing": "that was asked for"}]}'


class _Connection(asyncio.Protocol):
    def __init__(self, state: Endpoint) -> None:
        self.state, self.buffer = state, b""
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if not found:
                return
            lines = head.decode("latin-1").split("\r\n")
            headers = {
                k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])
            }
            length = int(headers.get("content-length", 0))
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            task = asyncio.get_running_loop().create_task(
                self.serve(lines[0].split(" ")[1], headers, rest[:length])
            )
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def serve(self, path: str, headers: dict[str, str], raw: bytes) -> None:
        state = self.state
        state.in_flight += 1
        state.most_in_flight = max(state.most_in_flight, state.in_flight)
        fault = state.draw() if state.faults else None
        body = json.loads(raw) if raw else {}
        entry = Entry(
            len(state.ledger),
            path,
            headers.get("authorization"),
            body if state.keep_bodies else {},
            digest_of(body),
            time.time(),
            fault,
            headers=headers,
        )
        state.ledger.append(entry)
        try:
            wait = state.stall_s if fault == "stall" else state.latency_s
            if wait:
                await asyncio.sleep(wait)
            status, extra, payload = self.reply(entry, body)
        except Exception as error:
            # A mistake of the player's own: answered, so that nobody waits, and raised when the block ends.
            state.mistakes.append(error)
            status, extra, payload = 500, {}, repr(error).encode()
        finally:
            state.in_flight -= 1
        await self.send(entry, status, extra, payload)
        if state.file is not None:
            line = {k: v for k, v in vars(entry).items() if k not in ("body", "headers")}
            state.file.write(json.dumps(line) + "\n")
            state.file.flush()

    def reply(self, entry: Entry, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        state, fault = self.state, entry.fault
        if state.key is not None and entry.key != f"Bearer {state.key}":
            return 401, {}, b'{"error": {"message": "Incorrect API key provided"}}'
        if fault == "429":
            return 429, {"Retry-After": f"{state.retry_after_s:g}"}, b"{}"
        if fault == "429-date":
            return (
                429,
                {"Retry-After": email.utils.formatdate(time.time() + state.retry_after_s, usegmt=True)},
                b"{}",
            )
        if fault in ("500", "503"):
            return int(fault), {}, b"{}"
        answer = state.dialect(entry, body) if state.dialect is not None else None
        answer = state.answer(body) if answer is None else answer
        if isinstance(answer, tuple):
            status, extra, payload = answer
            entry.free = status != 200 or not (
                payload
                if isinstance(payload, bytes)
                else payload.get("choices")
                if isinstance(payload, dict)
                else None
            )
            return status, extra, payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        answer = completion(answer) if isinstance(answer, str) else answer
        if fault == "schema":
            answer["choices"][0]["message"]["content"] = _WRONG_SCHEMA
        if fault == "length":
            choice = answer["choices"][0]
            choice["message"]["content"], choice["finish_reason"] = (
                choice["message"]["content"][: len(choice["message"]["content"]) // 2],
                "length",
            )
        if fault == "malformed":
            return 200, {}, b'{"id": "x", "choices": [{"index": 0, "message": {"role": "assis'
        entry.tokens = (answer.get("usage") or {}).get("total_tokens", 0)
        return 200, {}, json.dumps(answer).encode()

    async def send(self, entry: Entry, status: int, extra: dict[str, str], payload: bytes) -> None:
        entry.status = status
        if status == 0 or entry.fault == "drop":
            self.transport.abort()
            return
        headers = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **extra}
        head = f"HTTP/1.1 {status} .\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        if self.transport.is_closing():
            return
        if entry.fault == "truncate":
            self.transport.write(head.encode() + payload[: len(payload) // 2])
            self.transport.close()
            return
        if entry.fault == "drip":
            self.transport.write(head.encode())
            for byte in payload:
                if self.transport.is_closing():
                    return
                self.transport.write(bytes([byte]))
                await asyncio.sleep(0.05)
        else:
            self.transport.write(head.encode() + payload)
        entry.whole = status == 200 and entry.fault != "malformed" and not entry.free


async def _serve(state: Endpoint, port: int, ready: Callable[[], None]) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(state), "127.0.0.1", port, backlog=2048
    )
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    ready()
    async with server:
        await server.serve_forever()


@contextmanager
def endpoint(answer: Answer = play, **settings: Any) -> Iterator[Endpoint]:
    """Serves on a free loopback port, from a thread of its own, for the length of the block."""
    state = Endpoint(answer, **settings)
    loop, ready = asyncio.new_event_loop(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    def run() -> None:
        asyncio.set_event_loop(loop)
        tasks.append(loop.create_task(_serve(state, 0, ready.set)))
        try:
            loop.run_until_complete(tasks[0])
        except asyncio.CancelledError:
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        finally:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not ready.wait(10):
        raise RuntimeError("the played endpoint did not start")
    try:
        yield state
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(10)
    if state.mistakes:
        raise state.mistakes[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per reply")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="NAME=SHARE", help=f"one of {', '.join(FAULTS)}"
    )
    parser.add_argument("--retry-after", type=float, default=0.0, help="seconds that a 429 asks for")
    parser.add_argument("--dialect", help="one of those of dialects.py, by name")
    parser.add_argument("--key", help="the only key that is let in")
    parser.add_argument("--ledger", type=Path, help="file to append the ledger to")
    args = parser.parse_args()
    faults = {name: float(share) for name, _, share in (f.partition("=") for f in args.fault)}
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    file = args.ledger.open("a", encoding="utf-8") if args.ledger else None
    state = Endpoint(play, args.latency, faults, args.retry_after, args.key, keep_bodies=False, file=file)
    if args.dialect:
        from dialects import PROVIDERS

        state.dialect = PROVIDERS[args.dialect]
    asyncio.run(_serve(state, args.port, lambda: print(state.url, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
