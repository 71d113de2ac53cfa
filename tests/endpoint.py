"""A local HTTP server that plays an OpenAI-compatible endpoint, with faults on demand and a ledger of what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], Any]
KEY = "secret-key-of-the-test"


@dataclass
class Endpoint:
    """``answer`` gets the request's body and returns a text, a (status, headers, body) triple, or a whole completion."""

    answer: Answer
    url: str = ""
    ledger: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(text: str, *, finish: str = "stop", logprobs: dict[str, float] | None = None) -> dict[str, Any]:
    """A chat completion in OpenAI's wire format."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if logprobs is not None:
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top}]}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def endpoint(answer: Answer) -> Iterator[Endpoint]:
    """Serves on a free loopback port for the length of the block."""
    state = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
                state.ledger.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
            try:
                answer = state.answer(body)
            finally:
                with state.lock:
                    state.in_flight -= 1
            if isinstance(answer, str):
                answer = completion(answer)
            status, headers, payload = answer if isinstance(answer, tuple) else (200, {}, answer)
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            if status == 0:  # drop the connection
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
