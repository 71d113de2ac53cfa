"""The service's Python client against what is no service, and against connections that break."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import featureinterp as fi
from featureinterp.errors import EndpointUnavailableError
from featureinterp.server import client as client_module
from featureinterp.server.views import JobView

VIEW = JobView("7", "running", "run", "0:3", "paid", 0.0, "", {}).to_json()


@contextmanager
def answering(*bodies: bytes) -> Iterator[str]:
    """A server that gives each request the next body, and the last one for ever."""
    left = list(bodies)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "body", [b"<html>It works!</html>", b"[" * 100_000, b'"text"', b"[3]", b"{}", b"\xff"], ids=repr
)
def test_what_is_no_service_is_one_sentence(body: bytes):
    with answering(body) as url, fi.Service(url) as service:
        with pytest.raises(EndpointUnavailableError, match="no service of featureinterp") as error:
            service.job("7")
        assert "\n" not in str(error.value)


def test_fields_of_a_later_version_are_left_alone():
    with answering(json.dumps(VIEW | {"later": 1}).encode()) as url, fi.Service(url) as service:
        assert service.job("7").state == "running"


def test_a_watch_that_hears_nothing_pauses_longer_each_time(monkeypatch: pytest.MonkeyPatch):
    def event(state: str) -> bytes:
        return f"data: {json.dumps(VIEW | {'state': state})}\n\n".encode()

    pauses: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", pauses.append)
    bodies = [b"", b"", b"", event("running"), b"", *[b""] * 8, event("done")]
    with answering(*bodies) as url, fi.Service(url) as service:
        states = [now.state for now in service.watch("7")]
    assert states == ["running", "done"]
    assert pauses[:3] == [0.1, 0.2, 0.4] and pauses[3] == 0.1 and pauses[-1] == 5.0
