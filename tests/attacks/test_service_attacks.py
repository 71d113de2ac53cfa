"""Attacks on the service: hostile requests, half requests, crowds, damaged folders, a full disk. Bounded, and
on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from endpoint import endpoint
from fastapi.testclient import TestClient
from service import Running, configured

from featureinterp.domain.result import FeatureResult
from featureinterp.errors import EndpointUnavailableError, UnknownNameError
from featureinterp.jobs.spec import make_job
from featureinterp.reports.render import write_results
from featureinterp.server import worker
from featureinterp.server.app import Rules, make_app
from featureinterp.server.client import Service
from featureinterp.server.connections import BEYOND, bounded
from featureinterp.server.folder import JobsFolder, end, lock_of
from featureinterp.server.runner import Runner
from featureinterp.stored.sums import sealed

SMALL = {"run": "tiny", "features": "3", "simulator": "lexical", "explainer": "top-tokens", "n_test": 2}
SMALL |= {"stages": ["explain", "simulate"]}
NOBODY = "20260101-000000-00000000"


@pytest.fixture
def rules(run: Path, tmp_path: Path) -> Rules:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run)
    return Rules(tmp_path / "jobs", tmp_path / "runs", ("paid",), queue=10_000, parallel=0, min_free=0)


@pytest.fixture
def client(rules: Rules) -> Iterator[TestClient]:
    with TestClient(make_app(rules), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def until(true: Callable[[], Any], within_s: float = 60.0) -> Any:
    """What ``true`` gives when it gives something, asked for at most so long."""
    end_at = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < end_at, "it did not come about"
        time.sleep(0.02)
    return found


# ── requests
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────

INTEGERS = ("n_test", "seed", "rule_cap")
FIELDS = (
    *INTEGERS,
    "run",
    "features",
    "llm",
    "stages",
    "explainer",
    "holistic",
    "style",
    "simulator",
    "simulator_model",
    "budget_usd",
    "max_minutes",
    "no_field",
)
NO_INTEGERS = (
    '"5"',
    "true",
    '"1_0"',
    '"٣"',
    "5.5",
    '"5.0"',
    '" 5"',
    "[5]",
    '{"5": 5}',
    "1e400",
    "NaN",
    "Infinity",
    "-Infinity",
)
VALUES = (
    *NO_INTEGERS,
    "null",
    "-1",
    "0",
    str(2**63),
    "9" * 400,
    "9" * 5000,
    "1e-400",
    "[]",
    "{}",
    '""',
    '"\\ud800"',
    '"\\u0000"',
    '"\\u202e"',
    '"../../etc/passwd"',
    '"' + "x" * 5000 + '"',
    '"http://127.0.0.1:1/v1"',
    '"{{7*7}}"',
    "[" * 2000 + "]" * 2000,
)


def test_no_value_of_a_field_is_more_than_refused(client: TestClient):
    statuses: Counter[int] = Counter()
    for field in FIELDS:
        for value in VALUES:
            body = json.dumps({k: v for k, v in SMALL.items() if k != field})[:-1] + f', "{field}": {value}}}'
            answer = client.post(
                "/api/jobs", content=body.encode(), headers={"Content-Type": "application/json"}
            )
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (field, value[:60], answer.text)
            assert answer.status_code == 201 or isinstance(answer.json()["detail"], str)
            if field in INTEGERS and value in NO_INTEGERS:
                assert answer.status_code in (400, 422), (field, value)
    assert statuses.total() >= 300 and statuses[422] > 250 and statuses[201] < 30, statuses


def test_no_body_query_path_or_method_is_more_than_refused(client: TestClient):
    rng, n = random.Random(19), 0
    whole = json.dumps(SMALL).encode()
    bodies = [whole[: rng.randrange(len(whole))] for _ in range(20)] + [
        rng.randbytes(rng.randrange(200)) for _ in range(20)
    ]
    bodies += [
        b"[" * 60_000,
        b'{"a":' * 10_000,
        whole.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + whole,
        b"\x1f\x8b" + whole,
    ]
    for body in bodies:
        for kind in (
            "application/json",
            "text/plain",
            "multipart/form-data; boundary=x",
            "application/json; charset=utf-16",
        ):
            status = client.post("/api/jobs", content=body, headers={"Content-Type": kind}).status_code
            assert status in (400, 422) or (status == 201 and body[:3] in (b"\xff\xfe{", b"\xef\xbb\xbf")), (
                body[:60]
            )
            n += 1
    for value in (
        "",
        "-1",
        "0x5",
        "1_0",
        "٣",
        "+5",
        "%205",
        "5.0",
        "5e0",
        "true",
        "9" * 30,
        "9" * 5000,
        "NaN",
        "%00",
        "１",
        "01",
    ):
        for query in (f"limit={value}", f"offset={value}"):
            assert client.get(f"/api/jobs?{query}").status_code == 422, query
            assert client.get(f"/api/jobs/{NOBODY}/results?{query}").status_code == 422, query
            n += 2
        assert client.get(f"/api/jobs/{NOBODY}/features/{value or '-'}").status_code in (404, 422)
    paths = [
        "%2e%2e/%2e%2e/etc/passwd",
        "..%2f..",
        "%00",
        "%ff%fe",
        "a" * 5000,
        "{job_id}",
        f"{NOBODY}%00",
        f"{NOBODY}/",
        "٢٠٢٦",
    ]
    for path in paths:
        for tail in ("", "/events", "/report", "/results", "/features/1", "/cancel", "/resume"):
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"):
                assert 300 <= client.request(method, f"/api/jobs/{path}{tail}").status_code < 500, (
                    method,
                    path,
                    tail,
                )
                n += 1
    assert n >= 300


MALFORMED_HOSTS = (
    "[::1",
    "::1]",
    "[",
    "]",
    "[]",
    "[::1]]",
    "[::1]:port",
    "127.0.0.1:99999",
    "127.0.0.1:1:2",
    "a b",
    "127.0.0.1/x",
)
MALFORMED_HOSTS += (
    "user@127.0.0.1",
    "127.0.0.1?x",
    "127.0.0.1#x",
    "[127.0.0.1]",
    "[::1%25eth0]",
    "[v1.a]",
    "\xff",
    "127.0.0.1\\x",
    "<b>",
)


def test_malformed_hosts_and_origins_are_bad_requests(client: TestClient):
    for host in MALFORMED_HOSTS:
        assert client.get("/api/jobs", headers={"Host": host.encode("latin-1")}).status_code == 400, host
        assert client.get("/health", headers={"Host": host.encode("latin-1")}).status_code == 400, host
    for origin in (*MALFORMED_HOSTS, "http://", "://x", "http:///", "1http://x", "http://x/y", ""):
        for value in {origin, f"http://{origin}"} - {"http://http://"}:
            answer = client.post("/api/jobs", json=SMALL, headers={"Origin": value.encode("latin-1")})
            assert answer.status_code == 400, value
    double = [("Host", "127.0.0.1"), ("Host", "evil.example")]
    assert client.get("/api/jobs", headers=httpx.Headers(double)).status_code == 400
    assert client.get("/api/jobs", headers={"Host": "evil.example"}).status_code == 403
    assert client.post("/api/jobs", json=SMALL, headers={"Origin": "HTTP://127.0.0.1"}).status_code == 201


def test_what_steers_a_terminal_is_an_escape_in_answers_and_pages(client: TestClient, rules: Rules):
    nasty = "a\u202eb\x1b[31m\x9b2J\u2066é"
    number = JobsFolder(rules.jobs).submit(
        make_job(run=rules.runs / "tiny"), {"run": nasty, "features": nasty, "llm": nasty}
    )
    end(rules.jobs / number, "failed", nasty + "\ud800")
    for path in ("/api/jobs", f"/api/jobs/{number}", f"/api/jobs/{number}/events", "/"):
        text = client.get(path).text
        assert not set(text) & set("\u202e\x1b\x9b\u2066\ud800"), path
        assert "\\u202e" in text and "é" in text
    assert client.get(f"/api/jobs/{number}").json()["message"] == nasty + "\ud800"
    refused = client.post("/api/jobs", json=SMALL | {"x\u202e\x9b": 1})
    assert refused.status_code == 422 and "\u202e" not in refused.text and "x\\u202e\\u009b" in refused.text


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script: node is not here")
def test_the_page_s_script_shows_text_as_the_program_does(client: TestClient):
    from featureinterp.visible import visible

    head = client.get("/").text.split("<script>")[1].split("const show =")[0]
    ranges = [(0, 0x10000), (0x1BC90, 0x1BCB0), (0x1D170, 0x1D180), (0xDFFF0, 0xE1010)]
    texts = [chr(c) for start, stop in ranges for c in range(start, stop)] + ["👩‍👩‍👧", "#️⃣", "می‌خواهم", "a‍b"]
    script = (
        head + "const t = JSON.parse(require('fs').readFileSync(0)); "
        "process.stdout.write(JSON.stringify(t.map(visible)))"
    )
    done = subprocess.run(
        ["node", "-e", script], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [visible(t) for t in texts]


# ── connections
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def served(rules: Rules, *, most: int = 1000, request_s: float = 0.5) -> Iterator[uvicorn.Server]:
    """The service on a port of its own, in a thread; ``server.port`` is that port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            make_app(rules), http=bounded(most, request_s), ws="none", log_level="critical"
        )
        server = uvicorn.Server(config)
        server.port = listening.getsockname()[1]  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield server
        finally:
            server.should_exit = True
            thread.join(60)


def opened(port: int, sent: bytes = b"") -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port), timeout=60)
    with contextlib.suppress(ConnectionError):
        found.sendall(sent)
    return found


def read_to_the_end(sock: socket.socket) -> bytes:
    """What the service says until it closes the connection; fails when it does not."""
    found = b""
    with sock, contextlib.suppress(ConnectionError):
        while block := sock.recv(65536):
            found += block
    return found


HALVES = (
    b"",
    b"G",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea",
)


def half_requests(rules: Rules, n: int) -> None:
    with served(rules) as server:
        port = server.port  # type: ignore[attr-defined]
        halves = [opened(port, HALVES[i % len(HALVES)]) for i in range(n)]
        assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
        answers = [read_to_the_end(h) for h in halves]
        for i, answer in enumerate(answers):
            half = HALVES[i % len(HALVES)]
            assert answer.startswith(b"HTTP/1.1 200" if b"/health HTTP" in half else b"HTTP/1.1 408"), (
                half,
                answer,
            )
        until(lambda: not server.server_state.connections)


def test_half_requests_are_cut_while_whole_ones_are_answered(rules: Rules):
    half_requests(rules, 3 * len(HALVES))


@pytest.mark.slow
def test_500_half_requests_are_cut(rules: Rules):
    half_requests(rules, 500)


def test_a_request_that_drips_is_cut_too(rules: Rules):
    with served(rules) as server:
        drip = opened(server.port, HALVES[3])  # type: ignore[attr-defined]
        drip.settimeout(0.05)
        answer = b""
        for _ in range(400):
            with contextlib.suppress(ConnectionError, TimeoutError):
                drip.sendall(b" ")
            try:
                answer += (block := drip.recv(1000))
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not block:
                break
        else:
            raise AssertionError("it was not cut")
        assert answer.startswith(b"HTTP/1.1 408")


def test_whoever_watches_is_not_cut(rules: Rules):
    number = JobsFolder(rules.jobs).submit(make_job(run=rules.runs / "tiny"), SMALL)
    with served(rules, request_s=0.2) as server:
        address = f"http://127.0.0.1:{server.port}/api/jobs/{number}"  # type: ignore[attr-defined]
        with httpx.stream("GET", f"{address}/events", timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: job"
            assert read_to_the_end(opened(server.port, HALVES[2])).startswith(b"HTTP/1.1 408")  # type: ignore[attr-defined]
            assert httpx.post(f"{address}/cancel").status_code == 200
            assert '"state":"cancelled"' in [line for line in lines if line.startswith("data")][-1]


def test_connections_beyond_the_limit_are_turned_away_and_the_others_served(rules: Rules):
    with served(rules, most=8, request_s=60) as server:
        port = server.port  # type: ignore[attr-defined]
        held = [opened(port, HALVES[2]) for _ in range(8)]
        until(lambda: len(server.server_state.connections) == 8)
        for _ in range(20):
            assert read_to_the_end(opened(port, b"GET /api/jobs HTTP/1.1\r\n")).startswith(b"HTTP/1.1 503")
        silent = [opened(port) for _ in range(BEYOND + 9)]
        assert all(read_to_the_end(sock).startswith(b"HTTP/1.1 503") for sock in silent[:9])
        for _ in range(3):  # whoever asks whether the service works hears it all the same, and nothing else
            whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            heard = read_to_the_end(opened(port, whole + whole.replace(b"/health", b"/api/jobs")))
            assert heard.startswith(b"HTTP/1.1 200") and heard.count(b"HTTP/1.1") == 1, heard
        for sock in silent:
            sock.close()
        until(lambda: len(server.server_state.connections) == 8)
        held.pop().close()
        until(lambda: len(server.server_state.connections) == 7)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        for sock in held:
            sock.close()


RAW = (
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET //evil.example/%2e%2e HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /%ff%fe HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: \x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\r\n b\r\nConnection: close\r\nOrigin: [\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 30_000 + b"\r\n",
    b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1_0\r\n\r\n" + b"x" * 10,
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\nTransfer-Encoding: "
    b"chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\nContent-Length: "
    b"999999999999\r\n\r\n" + b"x" * 90_000,
    b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
)


def test_bytes_that_are_no_requests_are_refused_and_the_service_goes_on(rules: Rules):
    rng = random.Random(20)
    whole = b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    flipped = []
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(len(whole))] = rng.randrange(256)
        flipped.append(bytes(changed))
    with served(rules) as server:
        sockets = [(sent, opened(server.port, sent)) for sent in (*RAW, *flipped)]  # type: ignore[attr-defined]
        for sent, sock in sockets:
            answer = read_to_the_end(sock)
            statuses = [int(line[9:12]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
            assert all(100 <= s < 500 for s in statuses), (sent[:80], answer[:200])
        assert httpx.get(f"http://127.0.0.1:{server.port}/health").json()["status"] == "ok"  # type: ignore[attr-defined]


# ── limits
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_once(calls: list[Callable[[], httpx.Response]]) -> Counter[int]:
    """Statuses of requests that are let go at the same moment."""
    gate = threading.Barrier(len(calls))

    def one(call: Callable[[], httpx.Response]) -> int:
        gate.wait(60)
        return call().status_code

    with ThreadPoolExecutor(len(calls)) as pool:
        return Counter(pool.map(one, calls))


def test_no_more_jobs_wait_than_may_however_many_ask_at_once(rules: Rules):
    with TestClient(make_app(replace(rules, queue=5)), base_url="http://127.0.0.1") as client:
        for _ in range(3):
            asked = at_once([lambda: client.post("/api/jobs", json=SMALL)] * 20)
            assert asked == {201: 5, 429: 15}
            ids = [j["id"] for j in client.get("/api/jobs").json() if j["state"] == "queued"]
            assert len(ids) == 5
            cancelled = at_once(
                [lambda n=n: client.post(f"/api/jobs/{n}/cancel") for n in ids for _ in range(3)]
            )
            assert cancelled == {200: 5, 409: 10}
        ended = [j["id"] for j in client.get("/api/jobs").json()]
        assert len(ended) == 15
        resumed = at_once([lambda n=n: client.post(f"/api/jobs/{n}/resume") for n in ended])
        assert resumed == {200: 5, 429: 10}
        number = next(j["id"] for j in client.get("/api/jobs").json() if j["state"] == "queued")
        assert client.post(f"/api/jobs/{number}/cancel").status_code == 200
        assert at_once([lambda: client.post(f"/api/jobs/{number}/resume")] * 10) == {200: 1, 409: 9}


# ── folders
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def made_a(folder: Path) -> None:
    folder.unlink(missing_ok=True)
    folder.mkdir()


def made_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda p: p.unlink(missing_ok=True),
    "empty": lambda p: p.write_bytes(b""),
    "zeroed": lambda p: p.write_bytes(bytes(100)),
    "half": lambda p: p.write_bytes((p.read_bytes() if p.exists() else b'{"a": 1}')[:-9]),
    "no text": lambda p: p.write_bytes(b"\xff\xfe{}"),
    "a list": lambda p: p.write_text("[1]"),
    "other fields": lambda p: p.write_text('{"shown": 3, "state": "asleep", "done": "x", "total": null}'),
    "no numbers": lambda p: p.write_text(
        '{"job": {}, "shown": {"run": "a", "features": "b"}, "at": NaN, "state": NaN, "done": NaN, '
        '"total": 1e999}'
    ),
    "deep": lambda p: p.write_text("[" * 100_000),
    "long number": lambda p: p.write_text('{"at": ' + "9" * 10_000 + "}"),
    "large": lambda p: (p.touch(), os.truncate(p, 1 << 22)),
    "a folder": made_a,
    "a pipe": made_fifo,
    "a loop": lambda p: (p.unlink(missing_ok=True), p.symlink_to(p)),
}
STORED = (
    "submitted.json",
    "outcome.json",
    "progress.json",
    "lock",
    "starts",
    "out/results.jsonl",
    "out/report.html",
)


def test_results_are_read_with_their_checksums(client: TestClient, rules: Rules):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    out = jobs.path(number) / "out"
    found = [
        FeatureResult(f, "sae", 0.5, 0.01, 3, (), shortfalls={"top/test": "wörds " * 4000}) for f in range(9)
    ]
    write_results(out, found, {"title": "t"})
    end(jobs.path(number), "done", "")
    rows = client.get(f"/api/jobs/{number}/results").json()
    assert [r["feature"] for r in rows] == list(range(9)) and rows[8]["shortfalls"] == found[8].shortfalls
    path = out / "results.jsonl"
    data = path.read_bytes()
    changed = data.rindex(b"rds")
    path.write_bytes(data[:changed] + b"X" + data[changed + 1 :])  # still JSON, and a text that nobody wrote
    assert client.get(f"/api/jobs/{number}/features/0").status_code == 200
    assert [r["feature"] for r in client.get(f"/api/jobs/{number}/results?limit=2").json()] == [0, 1], (
        "blocks before it are whole"
    )
    answer = client.get(f"/api/jobs/{number}/features/8")
    assert answer.status_code == 409 and "results.jsonl is damaged at byte" in answer.json()["detail"], (
        answer.text
    )
    assert "resume the job" in answer.json()["detail"] and str(out) not in answer.text
    path.write_bytes(data[:-1])
    assert client.get(f"/api/jobs/{number}/features/8").status_code == 409
    with lock_of(jobs.path(number)):  # a worker is at it
        answer = client.get(f"/api/jobs/{number}/results")
        assert answer.status_code == 409 and "are being written" in answer.json()["detail"]


def test_results_without_their_checksums_are_not_served(client: TestClient, rules: Rules):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    out = jobs.path(number) / "out"
    assert client.get(f"/api/jobs/{number}/results").json() == [], "nothing is written yet"
    write_results(out, [FeatureResult(3, "sae", 0.5, 0.01, 3, ())], {"title": "t"})
    end(jobs.path(number), "done", "")
    about, results = out / "about.json", out / "results.jsonl"
    whole, rows = about.read_bytes(), results.read_bytes()
    other = sealed({"title": "t"}, {})
    for change, words in (
        (about.unlink, "about.json is missing, by which results.jsonl is checked"),
        (lambda: about.write_text(json.dumps(other)), "about.json has no checksums of results.jsonl"),
        (lambda: about.write_text("{"), "about.json is damaged"),
        (results.unlink, "results.jsonl is missing"),
    ):
        change()
        for path in ("results", "features/3"):
            answer = client.get(f"/api/jobs/{number}/{path}")
            assert answer.status_code == 409 and words in answer.json()["detail"], answer.text
            assert "resume the job" in answer.json()["detail"] and str(out) not in answer.text
        with lock_of(jobs.path(number)):
            assert "are being written" in client.get(f"/api/jobs/{number}/results").json()["detail"]
        about.write_bytes(whole)
        results.write_bytes(rows)
    about.write_text(json.dumps({"title": "t"}))  # as versions before checksums wrote it
    assert [r["feature"] for r in client.get(f"/api/jobs/{number}/results").json()] == [3]


def expected(name: str, kind: str, ended: bool) -> str:
    """The state in which a job is shown whose file ``name`` is damaged."""
    if name == "submitted.json" or (name == "outcome.json" and kind != "missing"):
        return "damaged"
    if name == "lock" and kind == "a folder" and not ended:
        return "damaged"
    return "done" if ended and name != "outcome.json" else "queued"


def looked_at_everywhere(client: TestClient, number: str, state: str) -> None:
    paths = [
        "",
        "/results",
        "/features/3",
        "/report",
        *(["/events"] if state not in ("queued", "running") else []),
    ]
    for path in paths:
        answer = client.get(f"/api/jobs/{number}{path}")
        assert answer.status_code < 500, (path, answer.text)
    for wish in ("cancel", "resume"):
        answer = client.post(f"/api/jobs/{number}/{wish}")
        assert answer.status_code < 500, (wish, answer.text)


@pytest.mark.parametrize(
    ("name", "ended"), [*((name, True) for name in STORED), *((name, False) for name in STORED[:5])]
)
def test_a_damaged_job_is_shown_as_such_and_nothing_else_suffers(
    client: TestClient, rules: Rules, name: str, ended: bool
):
    jobs = JobsFolder(rules.jobs)
    other = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    kinds = {jobs.submit(make_job(run=rules.runs / "tiny"), SMALL): kind for kind in DAMAGES}
    for number in kinds:
        (rules.jobs / number / "out").mkdir()
        if ended:
            end(rules.jobs / number, "done", "")
    before = {j["id"]: j["state"] for j in client.get("/api/jobs").json()}
    assert before == {other: "queued", **dict.fromkeys(kinds, "done" if ended else "queued")}
    for number, kind in kinds.items():
        DAMAGES[kind](rules.jobs / number / name)
    listed = {j["id"]: j for j in client.get("/api/jobs").json()}
    wanted = {number: expected(name, kind, ended) for number, kind in kinds.items()}
    assert {number: job["state"] for number, job in listed.items()} == {other: "queued", **wanted}
    for number in (n for n, state in wanted.items() if state == "damaged"):
        assert name in listed[number]["message"] and str(rules.jobs) not in listed[number]["message"]
    health = client.get("/health").json()
    assert health["queue"]["damaged"] == list(wanted.values()).count("damaged")
    assert (
        ("damaged" in str(health["problems"]))
        == (health["status"] == "degraded")
        == ("damaged" in wanted.values())
    )
    assert client.get("/").status_code == 200
    for number, state in wanted.items():
        looked_at_everywhere(client, number, state)
        if (rules.jobs / number).is_dir():
            shutil.rmtree(rules.jobs / number)
    assert [j["id"] for j in client.get("/api/jobs").json()] == [other]
    assert client.get("/health").json()["status"] == "ok"


def started(rules: Rules, number: str) -> bool:
    return (rules.jobs / number / "starts").exists()


def rounds(rules: Rules, n: int = 1) -> Runner:
    """A runner that has gone so many rounds; what it started is ended."""
    runner = Runner(JobsFolder(rules.jobs), parallel=1, min_free=rules.min_free)

    async def go() -> None:
        for _ in range(n):
            await runner.once()

    try:
        anyio.run(go)
    finally:
        for child in runner._children.values():
            child.kill()
            child.wait()
    return runner


@pytest.mark.parametrize("name", ["submitted.json", "starts", "worker.log", "lock", "gone"])
def test_a_job_that_cannot_be_started_does_not_keep_others_from_it(rules: Rules, name: str):
    jobs = JobsFolder(rules.jobs)
    bad, good = sorted(jobs.submit(make_job(run=rules.runs / "tiny"), SMALL) for _ in range(2))
    if name == "gone":
        shutil.rmtree(rules.jobs / bad)
    else:
        made_a(rules.jobs / bad / name)
    runner = rounds(rules)
    assert started(rules, good) and runner.round.trouble is None
    assert runner.round.stuck == (name in ("starts", "worker.log"))


def test_a_jobs_folder_that_is_gone_is_told_and_found_again(rules: Rules, tmp_path: Path):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    with TestClient(make_app(rules), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        assert client.get("/health").json()["status"] == "ok"
        rules.jobs.rename(tmp_path / "elsewhere")
        health = until(lambda: (h := client.get("/health").json())["status"] != "ok" and h)
        assert "last round failed" in health["problems"][0] and str(tmp_path) not in str(health)
        assert (
            client.get("/api/jobs").status_code == 503
            and client.post("/api/jobs", json=SMALL).status_code == 503
        )
        assert not rules.jobs.exists()
        (tmp_path / "elsewhere").rename(rules.jobs)
        until(lambda: client.get("/health").json()["status"] == "ok")
        assert client.get(f"/api/jobs/{number}").json()["state"] == "queued"


def test_descriptors_that_run_out_are_no_damage_and_the_next_round_goes_on(rules: Rules):
    resource = pytest.importorskip("resource")
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    runner = Runner(jobs, parallel=0, min_free=0)

    async def go() -> None:
        await runner.once()
        highest = os.open(os.devnull, os.O_RDONLY)
        os.close(highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        await runner.once()
        with pytest.raises(OSError):
            jobs.views()

    try:
        anyio.run(go)
        assert runner.round.trouble == os.strerror(errno.EMFILE)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert jobs.peek(number).state == "queued" and jobs.views()[0].state == "queued"  # type: ignore[union-attr]
    anyio.run(runner.once)
    assert runner.round.trouble is None


def test_half_a_job_is_deleted_by_the_next_service_and_nothing_else(rules: Rules):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    (rules.jobs / f".{NOBODY}.new" / "part").mkdir(parents=True)
    (rules.jobs / ".mine.new").mkdir()
    jobs.tidy()
    assert sorted(p.name for p in rules.jobs.iterdir()) == [".mine.new", number] and jobs.ids() == [number]


# ── the disk
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tmpfs:
    """A file system of 4 MB of its own, where this may be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / "filler").unlink()

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class NoRoom:
    """Where nothing may be mounted: the system call that makes what was written last refuses, as a full
    disk's does.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        folder.mkdir()

    def fill(self) -> None:
        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch.setattr(os, "fsync", refuse)

    def free(self) -> None:
        self.patch.undo()

    def close(self) -> None:
        self.patch.undo()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Tmpfs | NoRoom]:
    patch = pytest.MonkeyPatch()
    try:
        found: Tmpfs | NoRoom = Tmpfs(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(tmp_path / "disk")
        found = NoRoom(tmp_path / "disk", patch)
    try:
        yield found
    finally:
        found.close()


def test_jobs_wait_for_a_full_disk_and_go_on_when_it_is_freed(rules: Rules, disk: Tmpfs | NoRoom):
    rules = replace(rules, jobs=disk.folder / "jobs")
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(
        make_job(run=rules.runs / "tiny", **{k: v for k, v in SMALL.items() if k not in ("run", "n_test")}),
        SMALL,
    )
    with TestClient(make_app(rules), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        disk.fill()
        answer = client.post("/api/jobs", json=SMALL)
        assert answer.status_code == 503 and answer.json()["detail"].startswith(
            "the disk of the service is full"
        )
        assert client.post(f"/api/jobs/{number}/cancel").status_code in (200, 503)
        assert worker.work(rules.jobs / number) in (0, worker.DISK_FULL)
        disk.free()
        (rules.jobs / number / "cancel").unlink(missing_ok=True)
        assert client.post("/api/jobs", json=SMALL).status_code == 201
    assert len(list(rules.jobs.glob("*"))) == 2, "half a job was left"


def test_a_worker_that_finds_the_disk_full_leaves_the_job_to_be_gone_on_with(
    rules: Rules, disk: Tmpfs | NoRoom
):
    rules = replace(rules, jobs=disk.folder / "jobs")
    jobs = JobsFolder(rules.jobs)
    fields = {k: v for k, v in SMALL.items() if k not in ("run", "n_test")}
    number = jobs.submit(make_job(run=rules.runs / "tiny", **fields), SMALL)
    disk.fill()
    assert worker.work(rules.jobs / number) == worker.DISK_FULL
    assert jobs.view(number).state == "queued"
    disk.free()
    assert worker.work(rules.jobs / number) == 0
    assert jobs.view(number).state == "done"


@pytest.mark.parametrize("needed", [0, 3_000_000])
def test_no_worker_is_started_on_a_full_disk(rules: Rules, disk: Tmpfs | NoRoom, needed: int):
    rules = replace(rules, jobs=disk.folder / "jobs", min_free=needed)
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    disk.fill()
    runner = rounds(replace(rules, min_free=0), 2)
    full = not runner.round.disk.enough or runner.round.stuck == 1  # type: ignore[union-attr]
    if isinstance(disk, Tmpfs):
        assert full and jobs.view(number).state == "queued"
        runner = rounds(rules)
        assert not needed or not runner.round.disk.enough  # type: ignore[union-attr]
    disk.free()
    assert rounds(rules, 2).round.disk.enough and started(rules, number)  # type: ignore[union-attr]


# ── many ended jobs
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────

OPENED: list[str] = []
COUNTING = threading.Event()


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and COUNTING.is_set():
        OPENED.append(f"{event} {args[0]}")


def many_ended(root: Path, n: int) -> None:
    shown = json.dumps({"job": {}, "shown": {"run": "tiny", "features": "3", "llm": None}, "at": 1.0})
    for i in range(n):
        folder = root / f"20260101-{i // 3600:02d}{i // 60 % 60:02d}{i % 60:02d}-{i:08x}"
        folder.mkdir(parents=True)
        (folder / "submitted.json").write_text(shown)
        (folder / "outcome.json").write_text('{"state": "done", "message": ""}')
    os.utime(root, (1, 1))


def opened_at_rest(rules: Rules, n: int) -> None:
    many_ended(rules.jobs, n)
    runner = Runner(JobsFolder(rules.jobs), parallel=1, min_free=0)

    async def go() -> None:
        await runner.once()
        OPENED.clear()
        COUNTING.set()
        try:
            for _ in range(20):
                await runner.once()
            assert len(runner.jobs.views(100)) == min(100, n) and runner.jobs.counts()["done"] == n
        finally:
            COUNTING.clear()

    sys.addaudithook(hook)
    anyio.run(go)
    assert [o for o in OPENED if str(rules.jobs) in o] == []
    number = runner.jobs.submit(make_job(run=rules.runs / "tiny"), SMALL)
    end(rules.jobs / number, "failed", "it is seen")
    assert runner.jobs.views(1)[0].message == "it is seen" and len(runner.jobs.ids()) == n + 1


def test_ended_jobs_are_not_opened_again(rules: Rules):
    opened_at_rest(rules, 150)


@pytest.mark.slow
def test_3000_ended_jobs_are_not_opened_again(rules: Rules):
    opened_at_rest(rules, 3000)


# ── two services, and everything at once
# ─────────────────────────────────────────────────────────────────────────────────


def test_a_second_service_on_a_folder_says_who_holds_it(rules: Rules):
    from featureinterp.claims import owned
    from featureinterp.cli.serve import serve
    from featureinterp.errors import FolderInUseError

    with owned(rules.jobs, "featureinterp serve"), pytest.raises(FolderInUseError) as refused:
        serve(rules.runs, rules.jobs, "127.0.0.1", 0, None, [], ["lexical"], 1, 1, 0)
    said = str(refused.value)
    assert all(
        part in said
        for part in (str(rules.jobs), f"process {os.getpid()}", socket.gethostname(), "featureinterp serve")
    )


@pytest.mark.slow
def test_the_service_stays_through_all_of_it(rules: Rules, disk: Tmpfs | NoRoom, tmp_path: Path):
    """3,000 ended jobs, a damaged folder, one that vanishes at work, 500 half requests with few descriptors,
    a second service, ``kill -9``, and a full disk that is freed: the jobs of the others go on, and /health
    tells."""
    jobs = disk.folder / "jobs" if isinstance(disk, Tmpfs) else rules.jobs
    many_ended(tmp_path / "jobs", 3000)
    if isinstance(disk, Tmpfs):
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=1m", str(disk.folder)], check=True)
        shutil.copytree(tmp_path / "jobs", jobs)
    damaged = jobs / "20260101-000000-00000000"
    (damaged / "submitted.json").write_bytes(bytes(50))
    wanted = {"run": "tiny", "features": "3,5,9,11", "llm": "played", "simulator": "lexical", "n_test": 2}
    with endpoint(latency_s=0.2) as played:
        config = configured(tmp_path / "config.toml", played.url)
        service = Running(rules.runs, jobs, config, "--min-free-mb", "1", descriptors=256)
        try:
            with Service(service.url, timeout_s=60) as client:
                health = client.health()
                assert (
                    health["queue"]["damaged"] == 1
                    and health["queue"]["jobs"] == 3000
                    and health["status"] == "degraded"
                )
                shutil.rmtree(damaged)
                first, second = client.submit(**wanted), client.submit(**wanted)
                for view in client.watch(first.id):
                    if view.progress.get("requests", 0) >= 3:
                        break
                shutil.rmtree(jobs / first.id, ignore_errors=True)
                again = subprocess.run(
                    service.args, env=service.env, capture_output=True, text=True, timeout=120, check=False
                )
                assert again.returncode == 2 and f"process {service.process.pid}" in again.stderr, (
                    again.stderr
                )
                port = int(service.url.rsplit(":", 1)[1])
                with ThreadPoolExecutor(50) as pool:
                    halves = list(pool.map(lambda i: opened(port, HALVES[i % 5]), range(500)))
                assert all(b" 5" not in (a := read_to_the_end(h))[8:10] or b" 503 " in a for h in halves)
                for view in client.watch(second.id):
                    if view.progress.get("requests", 0) >= 3:
                        break
                service.kill()
                service.start()
            with Service(service.url, timeout_s=60) as client:
                assert client.wait(second.id).state == "done" and len(client.results(second.id)) == 4
                with pytest.raises(UnknownNameError):
                    list(client.watch(first.id))
                third = client.submit(**wanted | {"features": "17"})
                if isinstance(disk, Tmpfs):
                    disk.fill()
                    until(
                        lambda: "disk is full" in str(httpx.get(f"{service.url}/health").json()["problems"])
                    )
                    with pytest.raises(EndpointUnavailableError, match="full"):
                        client.submit(**wanted)
                    disk.free()
                assert client.wait(third.id).state == "done"
                assert [j.state for j in client.jobs(limit=3)] == ["done", "done", "done"]
                until(lambda: httpx.get(f"{service.url}/health").json()["status"] == "ok")
        finally:
            service.kill()
