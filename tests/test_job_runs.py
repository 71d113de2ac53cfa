"""Whole jobs against a played endpoint that misbehaves: nothing lost, nothing paid twice, and it ends when it
should.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from conftest import D_MODEL, HOOK
from endpoint import KEY, endpoint, play
from endpoint import Endpoint as Played
from test_cli import cli, refused
from tiny import make_sae, make_subject_folder

import featureinterp as fi
from featureinterp.codes.collect import collect
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.domain.result import FeatureResult
from featureinterp.errors import BudgetReachedError, EndpointRefusedError, InputError, TooManyFailuresError
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.records import alive_features
from featureinterp.llm.prices import Price
from featureinterp.resources import prompts_folder
from featureinterp.sae.load import load_sae, save_sae
from featureinterp.subject.load import Subject

FEW, MANY = 30, 200
AMOUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
MIXED = ("429", "429-date", "500", "503", "drop", "truncate", "malformed", "schema", "length", "stall")
COUNTS = {"top": (4, 2, 2), "random": (0, 2, 2)}
PLAN = {"n_test": 2, "n_valid": 2, "negatives": ("random",), "concurrency": 16}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, subject: Subject, corpus_file: Path) -> Path:
    """A run with more than 200 features that fire."""
    folder = tmp_path_factory.mktemp("wide")
    save_sae(folder / "sae", make_sae("topk", D_MODEL, 512), hook=HOOK, model="tiny")
    collect(
        subject,
        load_sae(str(folder / "sae")),
        load_corpus(str(corpus_file)),
        folder / "run",
        WindowPolicy(16, 8),
    )
    return folder / "run"


@pytest.fixture(scope="module")
def features(wide: Path) -> list[int]:
    return [int(f) for f in alive_features(fi.open_run(wide))[:MANY]]


def job(run: Path, out: Path, server: Played | str, features: list[int], **fields: Any) -> fi.Job:
    url = server if isinstance(server, str) else server.url
    llm = fi.Endpoint(
        url,
        "m",
        None,
        timeout_s=120,
        price=fields.pop("price", Price(1, 1)),
        **({"concurrency": 64} | fields.pop("llm", {})),
    )
    plan = fi.Plan(**(PLAN | fields.pop("plan", {})))
    return fi.Job(
        run=run,
        out=out,
        features=tuple(features),
        llm=llm,
        plan=plan,
        records=fi.RecordPolicy(COUNTS),
        **({"simulator": "lexical"} | fields),
    )


def essence(results: Any) -> list[Any]:
    """What does not depend on when or how often something was tried."""
    return [
        (
            r.feature,
            r.explanation.text if r.explanation else None,
            r.scores,
            r.null_of,
            r.windows,
            r.complexity,
        )
        for r in results
    ]


@dataclass
class Calm:
    """What a job gives when nothing disturbs it, and the number of requests that it takes."""

    features: list[int]
    results: list[FeatureResult]
    requests: int


@pytest.fixture(scope="module")
def undisturbed(
    wide: Path, features: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Calm]:
    @cache
    def calm(n: int) -> Calm:
        with endpoint() as server:
            results = fi.run(job(wide, tmp_path_factory.mktemp("calm"), server, features[:n]))
            assert results.stopped is None and results.n_failures == 0 and not server.paid_twice()
            return Calm(features[:n], list(results), len(server.ledger) - 1)

    return calm


def check_accounts(results: fi.Results, server: Played, features: list[int]) -> None:
    """Every feature is done, or has a failure with its cause, or gaps that are counted; no answer that came
    whole was bought again.
    """
    assert results.outcome is not None and results.stopped is None and not results.outcome.left
    assert [r.feature for r in results] == features and set(results.outcome.status) == set(features)
    for r in results:
        status = results.outcome.status[r.feature]
        assert (status == "failed") == bool(r.failures) and all(f.error and f.message for f in r.failures)
        if status == "partial":
            assert any(s.n_failed or s.null_failed for s in r.scores)
        if status == "done":
            assert r.explanation is not None and not any(s.n_failed for s in r.scores)
    assert not server.paid_twice()


@pytest.mark.parametrize("n_features", AMOUNTS)
def test_a_job_gets_through_every_fault_at_once(
    n_features: int, wide: Path, tmp_path: Path, undisturbed: Callable[[int], Calm]
):
    out, calm = tmp_path / "out", undisturbed(n_features)
    features = calm.features
    with endpoint(faults=dict.fromkeys(MIXED, 0.05), stall_s=0.2) as server:
        first = fi.run(job(wide, out, server, features, max_failure_rate=1.0, llm={"max_attempts": 4}))
        check_accounts(first, server, features)
        assert n_features == FEW or {e.fault for e in server.ledger} == {None, *MIXED}
        server.faults = {}
        url, n = server.url, len(server.ledger)
        again = fi.run(job(wide, out, url, features), retry_failed=True)
        assert set(again.outcome.status.values()) == {"done"} and again.n_failures == 0
        gaps = set(first.outcome.status.values()) != {"done"}
        assert (len(server.ledger) > n) == gaps and len(server.ledger) - n < 0.5 * n
        assert gaps or n_features == FEW
        n = len(server.ledger)
        third = fi.run(job(wide, out, url, features))
        assert len(server.ledger) == n and essence(third) == essence(again)
    texts = [
        {r.feature: r.explanation.text for r in results if r.explanation} for results in (again, calm.results)
    ]
    own = {
        r.feature for r in calm.results if texts[0][r.feature] == texts[1][r.feature]
    }  # the others have an explanation from a second attempt
    assert len(own) > (0.65 if n_features == MANY else 0.5) * len(features)
    alike = [
        (got, r)
        for got, r in zip(again, calm.results, strict=True)
        if r.feature in own and got.null_of == r.null_of and r.null_of in own
    ]
    assert len(alike) > 0.3 * len(features)
    for got, expected in alike:  # nothing else may depend on what happened on the way
        assert essence([got]) == essence([expected])
    connection = sqlite3.connect(out / "journal.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.parametrize("fault", MIXED)
def test_a_job_gets_through_each_fault_alone(fault: str, wide: Path, features: list[int], tmp_path: Path):
    with endpoint(faults={fault: 0.3}) as server:
        results = fi.run(
            job(wide, tmp_path / "out", server, features, max_failure_rate=1.0, llm={"max_attempts": 12})
        )
    check_accounts(results, server, features)
    if fault not in ("schema", "length"):
        assert set(results.outcome.status.values()) == {"done"}


def server_process(ledger: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    script = Path(__file__).parent / "endpoint.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--ledger", str(ledger), *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def written(job: fi.Job, path: Path) -> Path:
    """A job as a TOML file."""
    llm, plan = job.endpoint, job.plan
    assert not isinstance(job.features, str)
    path.write_text(
        f"run = {json.dumps(str(job.run))}\nout = {json.dumps(str(job.out))}\nfeatures = "
        f"{list(job.features)}\nsimulator = 'lexical'\n"
        f"[llm]\nbase_url = '{llm.base_url}'\nmodel = '{llm.model}'\napi_key_env = 'TEST_KEY'\nconcurrency "
        f"= {llm.concurrency}\nprice = {{ input = 1, output = 1 }}\n"
        f"[plan]\nn_test = {plan.n_test}\nn_valid = {plan.n_valid}\nnegatives = ['random']\nconcurrency = "
        f"{plan.concurrency}\n"
        f"[records.counts]\n" + "".join(f"{k} = {list(v)}\n" for k, v in COUNTS.items())
    )
    return path


def program(*args: str, interruptible: bool = True) -> subprocess.Popen[str]:
    """The program as a shell starts it; not ``interruptible``: as a script does in its background, where the
    system ignores Ctrl-C.
    """
    command, env = [sys.executable, "-m", "featureinterp.cli.main", *args], os.environ | {"TEST_KEY": KEY}

    def before() -> None:  # whatever the tests themselves were started from
        signal.signal(signal.SIGINT, signal.SIG_DFL if interruptible else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    return subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=before
    )


@pytest.mark.parametrize(("n_features", "times"), [(FEW, 2), pytest.param(MANY, 20, marks=pytest.mark.slow)])
def test_a_job_that_is_killed_goes_on_where_it_was(
    n_features: int, times: int, wide: Path, tmp_path: Path, undisturbed: Callable[[int], Calm]
):
    luck, folder, calm = random.Random(0), tmp_path, undisturbed(n_features)
    ledger = folder / "ledger.jsonl"
    server, url = server_process(ledger, "--latency", "0.1")
    try:
        wanted = job(wide, folder / "out", url, calm.features)
        file = written(wanted, folder / "job.toml")
        kills = in_flight = 0
        while kills < times:
            before = paid(ledger)
            process = program("run", str(file), "--json")
            goal = before + luck.randint(1, calm.requests // (times + 1))
            while process.poll() is None and paid(ledger) < goal:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            in_flight += 64
            if (folder / "out" / "journal.sqlite").exists():
                assert sqlite3.connect(folder / "out" / "journal.sqlite").execute(
                    "PRAGMA integrity_check"
                ).fetchone() == ("ok",)
        assert kills == times
        last = program("run", str(file), "--json")
        _, err = last.communicate()
        assert last.returncode == 0, err
    finally:
        server.kill()
    assert essence(
        FeatureResult.from_json(json.loads(line))
        for line in (folder / "out" / "results.jsonl").read_text().splitlines()
    ) == essence(calm.results)
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    checks = sum(1 for _ in entries) - len({e["digest"] for e in entries})
    assert checks <= in_flight + kills + 1
    digests = Counter(e["digest"] for e in entries)
    assert len(digests) - 1 == calm.requests


def paid(ledger: Path) -> int:
    return len(ledger.read_text().splitlines()) if ledger.exists() else 0


def test_a_wrong_key_stops_within_the_first_requests_and_names_the_variable(
    wide: Path, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_KEY", "a-wrong-key-1234")
    with endpoint(key=KEY) as server:
        wanted = job(wide, tmp_path / "out", server, features[:20])
        wanted = wanted.model_copy(update={"llm": fi.Endpoint(server.url, "m", "TEST_KEY")})
        with pytest.raises(EndpointRefusedError, match="TEST_KEY") as caught:
            fi.run(wanted)
        assert len(server.ledger) == 1 and not (tmp_path / "out").exists()
        monkeypatch.setenv("TEST_KEY", KEY)
        fi.run(wanted.model_copy(update={"features": tuple(features[:3])}))
        n = len(server.ledger)
        monkeypatch.setenv("TEST_KEY", "a-wrong-key-1234")
        with pytest.raises(EndpointRefusedError, match="TEST_KEY"):
            fi.run(wanted)
        assert len(server.ledger) - n <= 16
        kept = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    for secret in (KEY, "a-wrong-key-1234"):
        assert (
            secret.encode() not in kept
            and secret not in str(caught.value)
            and not any(secret in e.path for e in server.ledger)
        )


@pytest.mark.parametrize("fault", ["429", "429-date"])
def test_a_retry_comes_no_sooner_than_the_endpoint_asks(
    fault: str, wide: Path, features: list[int], tmp_path: Path
):
    with endpoint(faults={fault: 1.0}, retry_after_s=2.0) as server:
        server.draw = lambda: fault if len(server.ledger) in (1, 2) else None  # type: ignore[method-assign]
        results = fi.run(job(wide, tmp_path / "out", server, features[:1]))
    assert results.n_failures == 0
    tries = Counter(e.digest for e in server.ledger)
    for digest, n in tries.items():
        at = [e.at for e in server.ledger if e.digest == digest]
        assert n == 1 or min(b - a for a, b in pairwise(at)) >= (2.0 if fault == "429" else 1.0)
    assert max(tries.values()) > 1


def test_a_budget_stops_in_time_and_says_what_the_rest_would_cost(
    wide: Path, tmp_path: Path, undisturbed: Callable[[int], Calm]
):
    calm = undisturbed(FEW)
    features = calm.features
    with endpoint(latency_s=0.01) as server:
        whole = fi.dry_run(job(wide, tmp_path / "none", server, features))
        assert not server.ledger and not (tmp_path / "none").exists()
        assert (
            whole.left == FEW
            and whole.requests == pytest.approx(calm.requests, rel=0.15)
            and whole.cost_usd is not None
        )
        limit = whole.cost_usd / 4
        stopped = fi.run(
            job(
                wide,
                tmp_path / "out",
                server,
                features,
                budget=fi.Budget(usd=limit),
                llm={"concurrency": 16},
                plan={"concurrency": 2},
            )
        )
        assert isinstance(stopped.stopped, BudgetReachedError) and stopped.outcome is not None
        tokens = [e.tokens for e in server.ledger]
        spent = sum(tokens) / 1e6
        assert limit <= spent <= limit + 16 * max(tokens) / 1e6
        assert 0 < len(stopped) < FEW and len(stopped.outcome.left) == FEW - len(stopped)
        rest = stopped.outcome.price_of_the_rest
        assert rest is not None and rest > 0
        done = fi.run(job(wide, tmp_path / "out", server, features))
        assert essence(done) == essence(calm.results) and not server.paid_twice()
        assert sum(e.tokens for e in server.ledger) / 1e6 - spent == pytest.approx(rest, rel=0.25)


def searching(run: Path, out: Path, server: Played | str, features: list[int], **fields: Any) -> fi.Job:
    """A job that searches with causes, and judges by every kind of window."""
    negatives = ("random", "projected_similar_negative", "coactive_negative")
    tree = {"depth": 2, "negatives": ("coactive_negative", "projected_similar_negative"), "n_windows": 3}
    plan = {"negatives": negatives, "concurrency": 2} | fields.pop("plan", {})
    return job(
        run,
        out,
        server,
        features,
        explainer="tree",
        style="rules",
        holistic="exact",
        tree=fi.TreeSettings(**tree),
        plan=plan,
        **fields,
    )


def test_a_search_that_is_stopped_goes_on_where_it_was(wide: Path, features: list[int], tmp_path: Path):
    chosen = features[:4]
    with endpoint() as server:
        whole = fi.run(searching(wide, tmp_path / "whole", server, chosen))
        asked, tokens = len(server.ledger) - 1, sum(e.tokens for e in server.ledger)
        assert whole.stopped is None and whole.n_failures == 0 and not server.paid_twice()
        assert fi.dry_run(searching(wide, tmp_path / "whole", server, chosen)).left == 0
        expected = fi.dry_run(searching(wide, tmp_path / "none", server, chosen))
        assert expected.left == 4 and expected.requests == pytest.approx(asked, rel=0.3)
    for r in whole:
        assert (
            r.explanation is not None and r.explanation.provenance.method == "tree" and r.holistic == "exact"
        )
        nodes = r.explanation.search
        assert (
            [n.depth for n in nodes[:3]] == [0, 0, 0]
            and max(n.depth for n in nodes) <= 2
            and sum(n.chosen for n in nodes) == 1
        )
        chosen_node = next(n for n in nodes if n.chosen)
        main = r.score("correlation")
        assert main is not None and chosen_node.rules == r.explanation.rules
        assert chosen_node.test == (None if main.value is None else pytest.approx(main.value, abs=1e-4))
        assert {"correlation_projected_similar_negative", "correlation_coactive_negative"} <= {
            s.name for s in r.scores
        }
        assert all(
            (w.holistic is not None) == (w.split == "train" and max(w.activations) > 0) for w in r.windows
        )
        assert FeatureResult.from_json(json.loads(json.dumps(r.to_json()))) == r
    with endpoint() as server:
        runs = []
        while not runs or runs[-1].stopped is not None:
            assert len(runs) < 20
            runs.append(
                fi.run(
                    searching(wide, tmp_path / "out", server, chosen, budget=fi.Budget(tokens=tokens // 6))
                )
            )
        assert len(runs) > 3 and not server.paid_twice() and len(server.ledger) - len(runs) <= asked
    assert essence(runs[-1]) == essence(whole)
    for again, once in zip(runs[-1], whole, strict=True):
        a, b = again.explanation, once.explanation
        assert a is not None and b is not None and (a.rules, a.search) == (b.rules, b.search)
        assert (a.provenance.usage.requests, a.provenance.usage.prompt_tokens) == (
            b.provenance.usage.requests,
            b.provenance.usage.prompt_tokens,
        )


def test_a_search_with_gaps_is_gone_on_with(wide: Path, features: list[int], tmp_path: Path):
    """An improvement that failed for good is a gap of its search, not the end of it: the next run asks for it
    again, and for nothing else.
    """

    def answer(body: dict[str, Any]) -> Any:
        if failing and "improvement" in json.dumps(body.get("response_format", {})):
            return 400, {}, {"error": {"message": "no"}}
        return play(body)

    failing = True
    with endpoint(answer) as server:
        first = fi.run(searching(wide, tmp_path / "out", server, features[:2], max_failure_rate=1.0))
        assert first.outcome is not None and set(first.outcome.status.values()) == {"partial"}
        assert all(
            any("no" in (n.failure or "") for n in r.explanation.search) for r in first if r.explanation
        )
        n, failing = len(server.ledger), False
        again = fi.run(searching(wide, tmp_path / "out", server, features[:2]))
        assert (
            again.outcome is not None
            and set(again.outcome.status.values()) == {"done"}
            and len(server.ledger) > n
            and not server.paid_twice()
        )
        assert not any(n.failure for r in again if r.explanation for n in r.explanation.search)
        n = len(server.ledger)
        fi.run(searching(wide, tmp_path / "out", server, features[:2]))
        assert len(server.ledger) == n


@pytest.mark.parametrize("simulator", ["all-at-once", "rated"])
def test_a_dry_run_of_a_finished_job_leaves_nothing(
    simulator: str, wide: Path, features: list[int], tmp_path: Path
):
    model = str(make_subject_folder(tmp_path / "model", "llama"))
    with endpoint() as server:
        settings = {
            "simulator": simulator,
            "simulator_model": model,
            "simulator_dtype": "float32",
            "plan": {"n_test": 2},
        }
        asked = job(wide, tmp_path / "out", server, features[:2], **settings)
        before = fi.dry_run(asked)
        assert (before.done, before.left) == (0, 2) and before.requests
        done = fi.run(asked)
        assert done.n_failures == 0 and all(r.score("correlation") for r in done)
        after = fi.dry_run(asked)
        assert (after.done, after.left, after.requests) == (2, 0, 0)


def test_a_budget_in_money_needs_a_price(wide: Path, features: list[int], tmp_path: Path):
    with endpoint() as server, pytest.raises(InputError, match=r"prices\.\"m\""):
        fi.run(job(wide, tmp_path / "out", server, features[:2], price=None, budget=fi.Budget(usd=1)))
    assert len(server.ledger) == 1, "one small request, to see whether the endpoint says what a reply costs"


def test_time_that_is_over_stops_a_job(wide: Path, features: list[int], tmp_path: Path):
    with endpoint(latency_s=0.05) as server:
        results = fi.run(
            job(
                wide,
                tmp_path / "out",
                server,
                features,
                budget=fi.Budget(minutes=0.01),
                plan={"concurrency": 2},
            )
        )
    assert (
        isinstance(results.stopped, BudgetReachedError)
        and results.outcome is not None
        and results.outcome.left
    )
    assert (tmp_path / "out" / "report.html").exists() == bool(results)


def test_too_many_failures_stop_a_job_and_name_their_causes(wide: Path, features: list[int], tmp_path: Path):
    with endpoint(lambda _: "no JSON at all") as server:
        results = fi.run(job(wide, tmp_path / "out", server, features, plan={"concurrency": 4}))
    assert isinstance(results.stopped, TooManyFailuresError) and "times explain: MalformedReplyError" in str(
        results.stopped
    )
    assert len(server.ledger) < 150


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_quickly_and_loses_nothing(
    number: signal.Signals, wide: Path, features: list[int], tmp_path: Path
):
    ledger = tmp_path / "ledger.jsonl"
    server, url = server_process(ledger, "--latency", "0.3")
    try:
        file = written(job(wide, tmp_path / "out", url, features), tmp_path / "job.toml")
        process = program("run", str(file), interruptible=number == signal.SIGINT)
        while paid(ledger) < 100:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        start = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - start < 3 and process.returncode == 130
        assert "the same command goes on" in err and "Traceback" not in err
        n = (
            sqlite3.connect(tmp_path / "out" / "replies.sqlite")
            .execute("SELECT count(*) FROM replies")
            .fetchone()[0]
        )
        assert n >= paid(ledger) - 64 - 1
        shown = json.loads(cli("status", str(tmp_path / "out"), "--json").stdout)
        assert shown["wanted"] == MANY and shown["left"] == MANY - shown["done"]
        assert "interrupted" in shown["last_run"]
    finally:
        server.kill()


def test_a_changed_prompt_reruns_the_stages_that_use_it_and_no_other(
    wide: Path, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = tmp_path / "prompts"
    shutil.copytree(prompts_folder(), prompts)
    monkeypatch.setattr("featureinterp.prompts.prompts_folder", lambda: prompts)
    some = features[:6]
    with endpoint() as server:
        fi.run(job(wide, tmp_path / "out", server, some))
        rows = stages(tmp_path / "out")
        text = (prompts / "detect" / "v1" / "system.txt").read_text()
        (prompts / "detect" / "v1" / "system.txt").write_text(text + " Think first.")
        n = len(server.ledger)
        fi.run(job(wide, tmp_path / "out", server, some))
        new = [e.body["messages"][0]["content"] for e in server.ledger[n:]]
        assert new and all("Think first." in system for system in new)
    after = stages(tmp_path / "out")
    assert {s for s in after if after[s] != rows[s]} == {"detection", "detection-null"} and after[
        "detection"
    ] == 2 * rows["detection"]


def stages(out: Path) -> dict[str, int]:
    return dict(
        sqlite3.connect(out / "journal.sqlite").execute("SELECT stage, count(*) FROM results GROUP BY stage")
    )


def test_a_file_a_value_and_the_command_line_are_one_job(
    wide: Path, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_KEY", KEY)
    some = features[:4]
    with endpoint() as server:
        value = job(wide, tmp_path / "a", server, some)
        one = fi.run(value)
        file = written(value.model_copy(update={"out": tmp_path / "b"}), tmp_path / "job.toml")
        dry = json.loads(cli("run", str(file), "--dry-run", "--json").stdout)
        assert dry["left"] == 4 and dry["requests"] > 0 and not (tmp_path / "b").exists()
        n = len(server.ledger)
        done = cli("run", str(file), "--json")
        assert done.returncode == 0, done.stderr
        assert len(server.ledger) - n == dry["requests"] + 1  # that of the check of the endpoint
        assert essence(fi.load_job(file).model_copy() and read(tmp_path / "b")) == essence(one)
        n = len(server.ledger)
        again = json.loads(cli("run", str(file), "--dry-run", "--json").stdout)
        assert (
            again["left"] == 0
            and again["requests"] == 0
            and again["cost_usd"] == 0
            and cli("run", str(file)).returncode == 0
        )
        assert len(server.ledger) == n


def read(folder: Path) -> list[FeatureResult]:
    return [
        FeatureResult.from_json(json.loads(line))
        for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_status_and_export(wide: Path, features: list[int], tmp_path: Path):
    def nasty(body: dict[str, Any]) -> Any:
        reply = play(body)
        if body.get("response_format"):
            reply["choices"][0]["message"]["content"] = '{"explanation": "=cmd(\\"x\\"), \\"quoted\\" | ü"}'
        return reply

    out = tmp_path / "out"
    with endpoint(nasty) as server:
        results = fi.run(job(wide, out, server, features[:3]))
    shown = cli("status", str(out))
    assert "3 of 3 features done" in shown.stdout and "detection" in shown.stdout and "$" in shown.stdout
    for to in ("parquet", "csv", "jsonl"):
        assert cli("export", str(out), "--to", to).returncode == 0
    table = pyarrow.parquet.read_table(out / "features.parquet").to_pylist()
    lines = [json.loads(line) for line in (out / "features.jsonl").read_text(encoding="utf-8").splitlines()]
    with (out / "features.csv").open(newline="", encoding="utf-8") as file:
        sheet = list(csv.DictReader(file))
    assert table == lines and [r["feature"] for r in table] == features[:3] == [
        int(r["feature"]) for r in sheet
    ]
    score = results[0].score("correlation")
    assert (
        score is not None
        and table[0]["correlation"] == score.value
        and table[0]["correlation_null"] == score.null
    )
    assert all(r["explanation"].startswith("=cmd") for r in table) and all(
        r["explanation"].startswith("'=cmd") for r in sheet
    )
    refused(cli("export", str(out), "--to", "xlsx"), "xlsx", "parquet")
    refused(cli("status", str(tmp_path)), "holds no job")


def test_endpoints_by_name(tmp_path: Path):
    file = tmp_path / "config.toml"
    env = {"FEATUREINTERP_CONFIG": str(file), "FEATUREINTERP_CACHE": str(tmp_path / "cache"), "TEST_KEY": KEY}
    assert "no endpoints yet" in cli("llm", "list", **env).stdout
    with endpoint(key=KEY) as server:
        file.write_text(
            f'[endpoints.paid]\nbase_url = "{server.url}"\nmodel = "m"\napi_key_env = "TEST_KEY"\nprice = '
            f"{{ input = 1, output = 1 }}\n"
            f'[endpoints.keyless]\nbase_url = "{server.url}"\nmodel = "n"\n'
        )
        assert cli("llm", "list", **env).stdout.count("not tested") == 2
        tested = cli("llm", "test", "paid", **env)
        assert (
            tested.returncode == 0
            and "JSON schema" in tested.stdout
            and "one small call" in tested.stdout
            and "$0.0000" in tested.stdout
        )
        rows = json.loads(cli("llm", "list", "--json", **env).stdout)["endpoints"]
        assert rows["paid"]["probed"]["logprobs"] is True and rows["keyless"]["probed"] is None
        keyless = cli("llm", "test", "keyless", **env)
        assert (
            keyless.returncode == 1
            and "refused the key" in keyless.stdout
            and "--api-key-env" in keyless.stdout
            and "not tested" in keyless.stdout
        )
        assert "this test" in keyless.stdout and not keyless.stderr
    refused(cli("llm", "test", "nobody", **env), "nobody", "paid, keyless")
    assert KEY not in tested.stdout + json.dumps(rows)


def test_jobs_that_make_no_sense(wide: Path, tmp_path: Path):
    file = tmp_path / "j.toml"
    for text, words in (
        ("", ("run",)),
        ("run = 3", ("run",)),
        ('run = "x"\nwhat = 1', ("what", "no known field")),
        ('run = "x"\n[plan]\nn = 1', ("plan.n",)),
        ('run = "x"\n[budget]\nusd = 0', ("budget",)),
        ('run = "x"\nllm = "nobody"', ("x",)),
        (f'run = "{wide}"\nllm = "nobody"', ("nobody",)),
        (f'run = "{wide}"\nfeatures = "9999"', ("9999",)),
        ("run = ", ("cannot be read",)),
    ):
        file.write_text(text)
        refused(cli("run", str(file), FEATUREINTERP_CONFIG=str(tmp_path / "c.toml")), *words)
    refused(cli("run", str(tmp_path / "none.toml")), "none.toml")


def test_a_journal_of_another_version_is_left_alone(tmp_path: Path):
    connection = sqlite3.connect(tmp_path / "j.sqlite")
    connection.execute("CREATE TABLE results (key TEXT)")
    connection.commit()
    connection.close()
    with pytest.raises(InputError, match="another version"):
        Journal(tmp_path / "j.sqlite")
