"""The service: what it lets in, what it refuses, and that its jobs survive it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoint import endpoint
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Running, configured

import featureinterp as fi
from featureinterp.errors import EndpointRefusedError, EndpointUnavailableError, InputError, UnknownNameError
from featureinterp.jobs.spec import make_job
from featureinterp.server import worker
from featureinterp.server.app import Rules, make_app
from featureinterp.server.client import Service
from featureinterp.server.folder import MAX_STARTS, JobsFolder, end, lock_of
from featureinterp.server.gate import MAX_BODY, check_binding

TOKEN = "a-token-of-the-test-0123"
SMALL = {
    "run": "tiny",
    "features": "3,5,9",
    "simulator": "lexical",
    "explainer": "top-tokens",
    "stages": ["explain", "simulate"],
    "n_test": 2,
}


@pytest.fixture
def runs(run: Path, tmp_path: Path) -> Path:
    (tmp_path / "runs" / "unfinished").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "runs" / "tiny")
    return tmp_path / "runs"


@pytest.fixture
def rules(runs: Path, tmp_path: Path) -> Rules:
    return Rules(tmp_path / "jobs", runs, ("paid",), queue=3, parallel=0)


@pytest.fixture
def client(rules: Rules) -> Iterator[TestClient]:
    with TestClient(make_app(rules), base_url="http://127.0.0.1") as client:
        yield client


def test_what_a_request_may_name(client: TestClient, rules: Rules):
    assert client.get("/api/runs").json() == ["tiny"] and client.get("/api/endpoints").json() == ["paid"]
    for change, status in (
        ({"run": "unfinished"}, 404),
        ({"run": "../runs/tiny"}, 422),
        ({"run": str(rules.runs / "tiny")}, 422),
        ({"run": ".."}, 422),
        ({"run": "tiny\u0000"}, 422),
        ({"llm": "other"}, 404),
        ({"llm": "http://evil/v1"}, 422),
        ({"llm": "../paid"}, 422),
        ({"features": "0:9999"}, 422),
        ({"features": "/etc/passwd"}, 422),
        ({"simulator_model": "/etc"}, 404),
        ({"out": "/tmp/x"}, 422),
        ({"stages": ["score"]}, 422),
        ({"budget_usd": 0}, 422),
        ({"n_test": 10**6}, 422),
    ):
        answer = client.post("/api/jobs", json=SMALL | change)
        assert answer.status_code == status and isinstance(answer.json()["detail"], str), (
            change,
            answer.text,
        )
    assert client.get("/api/jobs").json() == []
    for path in (
        "%2e%2e%2fjobs",
        "..%2f..%2fetc",
        "..%5c..",
        "20260101-000000-00000000",
        "x" * 200,
    ):  # a client resolves bare dots itself
        for tail in ("", "/events", "/report", "/results", "/features/1"):
            assert client.get(f"/api/jobs/{path}{tail}").status_code in (404, 422)


def test_bodies_and_the_queue_are_bounded(client: TestClient):
    assert client.post("/api/jobs", content=b"x" * (MAX_BODY + 1)).status_code == 413
    assert client.post("/api/jobs", content=iter([b"x" * 40_000] * 2)).status_code == 413
    assert client.post("/api/jobs", content=b"{" * 1000).status_code == 422
    ids = [client.post("/api/jobs", json=SMALL).json()["id"] for _ in range(3)]
    full = client.post("/api/jobs", json=SMALL)
    assert full.status_code == 429 and full.headers["Retry-After"]
    assert [j["id"] for j in client.get("/api/jobs").json()] == sorted(ids, reverse=True)
    assert len(client.get("/api/jobs?limit=2&offset=2").json()) == 1
    cancelled = client.post(f"/api/jobs/{ids[0]}/cancel").json()
    assert cancelled["state"] == "cancelled" and client.post(f"/api/jobs/{ids[0]}/cancel").status_code == 409
    assert client.post(f"/api/jobs/{ids[1]}/resume").status_code == 409
    assert client.post(f"/api/jobs/{ids[0]}/resume").json()["state"] == "queued"


def test_the_token_guards_everything_but_the_health_check(rules: Rules):
    import base64
    from dataclasses import replace

    with TestClient(make_app(replace(rules, token=TOKEN)), base_url="http://jobs.example.org") as client:
        paths = list(
            client.get("/api/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()["paths"]
        )
        for path in [*paths, "/", "/api/openapi.json", "/nothing"]:
            for method in ("GET", "POST", "PUT", "OPTIONS"):
                answer = client.request(
                    method, path.replace("{job_id}", "20260101-000000-00000000").replace("{feature}", "1")
                )
                assert (answer.status_code == 401) == (path != "/health"), (method, path)
        for header in (
            "",
            "Bearer",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            "Basic !!!",
            f"Digest {TOKEN}",
            "Bearer \xff",
        ):
            assert (
                client.get("/api/runs", headers={"Authorization": header.encode("latin-1")}).status_code
                == 401
            )
        basic = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
        for header in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {basic}"):
            assert client.get("/api/runs", headers={"Authorization": header}).status_code == 200


def test_pages_of_other_sites_can_do_nothing(client: TestClient):
    assert client.get("/", headers={"Host": "evil.example:8765"}).status_code == 403
    assert client.get("/api/jobs", headers={"Host": ""}).status_code == 403
    for host in ("localhost:8765", "127.0.0.1:1", "[::1]:8765"):
        assert client.get("/api/jobs", headers={"Host": host}).status_code == 200
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("http://127.0.0.1", 404),
    ):
        assert (
            client.post("/api/jobs/20260101-000000-00000000/cancel", headers={"Origin": origin}).status_code
            == status
        )


def test_binding_beyond_this_machine_needs_a_token():
    for host in ("127.0.0.1", "::1", "localhost"):
        check_binding(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(InputError, match="token"):
            check_binding(host, None)
        check_binding(host, TOKEN)
    with pytest.raises(InputError, match="16"):
        check_binding("0.0.0.0", "short")


def test_a_page_escapes_what_a_job_says(client: TestClient, rules: Rules, runs: Path):
    nasty = "</script><script>alert(1)</script>\"'&"
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=runs / "tiny"), {"run": nasty, "features": nasty, "llm": nasty})
    end(rules.jobs / number, "failed", nasty)
    page = client.get("/")
    assert "alert(1)" in page.text and page.text.count("</script>") == 1 and "&lt;script&gt;" in page.text
    assert "<script>alert" not in page.text and "\\u003cscript" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_a_worker_gives_the_same_results_as_a_call(
    client: TestClient, rules: Rules, runs: Path, tmp_path: Path
):
    number = client.post("/api/jobs", json=SMALL).json()["id"]
    assert (
        client.get(f"/api/jobs/{number}/report").status_code == 404
        and client.get(f"/api/jobs/{number}/results").json() == []
    )
    assert worker.work(rules.jobs / number) == 0
    view = client.get(f"/api/jobs/{number}").json()
    assert view["state"] == "done" and view["progress"]["done"] == 3
    own = fi.explain(
        runs / "tiny",
        "3,5,9",
        out=tmp_path / "own",
        simulator="lexical",
        explainer="top-tokens",
        stages=("explain", "simulate"),
        plan={"n_test": 2},
    )
    whole = [r.to_json() for r in own]
    assert [client.get(f"/api/jobs/{number}/features/{f}").json() for f in (3, 5, 9)] == json.loads(
        json.dumps(whole)
    )
    assert client.get(f"/api/jobs/{number}/results?offset=1&limit=1").json()[0]["feature"] == 5
    assert client.get(f"/api/jobs/{number}/features/4").status_code == 404
    report = client.get(f"/api/jobs/{number}/report")
    assert report.text.startswith("<!doctype html>") and "no-store" in report.headers["Cache-Control"]
    with client.stream("GET", f"/api/jobs/{number}/events") as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1][6:])["state"] == "done"


def test_a_worker_leaves_a_job_alone_that_another_has_or_that_has_ended(rules: Rules, runs: Path):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(
        make_job(run=runs / "tiny", features="3", simulator="lexical", explainer="top-tokens"),
        {"run": "tiny", "features": "3"},
    )
    with lock_of(rules.jobs / number):
        held = subprocess.run(
            [sys.executable, "-m", "featureinterp.server.worker", str(rules.jobs / number)], check=False
        )
        assert held.returncode == 0 and not (rules.jobs / number / "outcome.json").exists()
    end(rules.jobs / number, "cancelled", "")
    assert worker.work(rules.jobs / number) == 0 and jobs.view(number).state == "cancelled"


def test_a_wish_to_cancel_outlives_the_worker_that_it_killed(rules: Rules, runs: Path):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(
        make_job(run=runs / "tiny", features="3", simulator="lexical", explainer="top-tokens"),
        {"run": "tiny", "features": "3"},
    )
    with lock_of(rules.jobs / number):
        jobs.cancel(number)
    assert not (rules.jobs / number / "outcome.json").exists()
    assert (
        worker.work(rules.jobs / number) == 0
        and jobs.view(number).state == "cancelled"
        and not (rules.jobs / number / "out").exists()
    )


def test_a_worker_that_dies_again_and_again_is_given_up(rules: Rules, runs: Path):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=runs / "tiny"), {"run": "tiny", "features": "3"})
    assert [jobs.begin(number) for _ in range(MAX_STARTS + 1)] == [True] * MAX_STARTS + [False]
    assert jobs.view(number).state == "failed" and "without an outcome" in jobs.view(number).message
    jobs.resume(number)
    assert jobs.view(number).state == "queued" and jobs.begin(number)


def test_a_job_that_cannot_work_fails_with_its_cause(rules: Rules, runs: Path):
    jobs = JobsFolder(rules.jobs)
    number = jobs.submit(make_job(run=runs / "nothing"), {"run": "nothing", "features": "3"})
    assert worker.work(rules.jobs / number) == 2
    assert jobs.view(number).state == "failed" and "nothing" in jobs.view(number).message


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_no_text_is_the_id_of_a_job_that_is_not_there(text: str):
    jobs = JobsFolder(Path(os.environ.get("TMPDIR", "/tmp")) / "featureinterp-no-jobs")
    with pytest.raises(UnknownNameError):
        jobs.path(text)


def test_a_job_survives_its_service_and_everybody_sees_it_end(runs: Path, tmp_path: Path):
    wanted = {
        "run": "tiny",
        "features": "3,5,9,11,17,20",
        "llm": "played",
        "simulator": "lexical",
        "n_test": 2,
    }
    with endpoint(latency_s=0.1) as played:
        service = Running(runs, tmp_path / "jobs", configured(tmp_path / "config.toml", played.url))
        try:
            with Service(service.url) as client:
                job = client.submit(**wanted)
                seen: list[Any] = [None] * 200

                def watch(i: int) -> None:
                    with crowded.stream("GET", f"{service.url}/api/jobs/{job.id}/events") as stream:
                        seen[i] = [
                            json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")
                        ][-1:]

                for view in client.watch(job.id):
                    if view.progress.get("requests", 0) >= 5:
                        break
                service.kill()
                service.start()
            with (
                Service(service.url) as client,
                httpx.Client(timeout=None, limits=httpx.Limits(max_connections=None)) as crowded,
            ):
                crowd = [threading.Thread(target=watch, args=(i,)) for i in range(200)]
                for thread in crowd:
                    thread.start()
                last = client.wait(job.id)
                assert last.state == "done" and last.progress["done"] == 6, last
                for thread in crowd:
                    thread.join(60)
                assert all(s and s[0]["state"] == "done" for s in seen)
                assert not played.paid_twice() and len(client.results(job.id)) == 6
                assert client.feature(
                    job.id, 5
                ).explanation is not None and "<!doctype html>" in client.report(job.id)
                second = client.submit(**wanted)
                for view in client.watch(second.id):
                    if view.progress.get("requests", 0) >= 3:
                        client.cancel(second.id)
                        break
                assert client.wait(second.id).state == "cancelled"
                client.resume(second.id)
                assert client.wait(second.id).state == "done"
                checks = {e.digest for e in played.ledger if "Say yes." in str(e.body)}
                again = [n - 2 for d, n in played.paid_twice().items() if n > 2 and d not in checks]
                assert sum(again) <= 2  # what was in flight when the second was cancelled
                with pytest.raises(UnknownNameError):
                    client.job("20260101-000000-00000000")
                with pytest.raises(InputError):
                    client.submit("tiny", "x")
        finally:
            service.kill()
    with pytest.raises(EndpointUnavailableError):
        Service(service.url).jobs()


def test_a_service_with_a_token(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = configured(tmp_path / "config.toml", "http://127.0.0.1:9/v1")
    service = Running(runs, tmp_path / "jobs", config, "--token-env", "TEST_TOKEN", TEST_TOKEN=TOKEN)
    try:
        with pytest.raises(InputError, match="TEST_TOKEN"):
            Service(service.url, token_env="TEST_TOKEN")
        monkeypatch.setenv("TEST_TOKEN", TOKEN)
        with Service(service.url, token_env="TEST_TOKEN") as client:
            assert client.runs() == ["tiny"]
        with pytest.raises(EndpointRefusedError):
            Service(service.url).runs()
    finally:
        service.kill()


@pytest.mark.slow
def test_the_interface_is_what_its_description_says(rules: Rules):
    import schemathesis

    app = make_app(rules)
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={"Host": "127.0.0.1"})
    statuses: Counter[int] = Counter()

    with TestClient(app):
        for operation in schema.get_all_operations():

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.ok().as_strategy())
            def check(case: Any) -> None:
                statuses[case.call_and_validate(headers={"Host": "127.0.0.1"}).status_code] += 1

            check()
    assert statuses.total() > 200 and min(statuses[200], statuses[404]) > 0 and not statuses[403], statuses
