"""The explain job: nothing paid twice, failures as rows, no result invented."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from featureinterp.codes.store import CodesStore
from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult
from featureinterp.domain.score import Failure, Simulation
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, EndpointUnavailableError, StorageError
from featureinterp.explainers.one_shot import OneShot
from featureinterp.explainers.styles import SentenceStyle
from featureinterp.jobs.explain import ExplainJob
from featureinterp.jobs.journal import Journal, Row
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.spec import Job
from featureinterp.llm.config import LOCAL, Endpoint
from featureinterp.llm.function import FunctionModel
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.policy import RecordPolicy

POLICY = RecordPolicy({"top": (4, 4, 4), "random": (0, 4, 4), "random_negative": (2, 4, 4)})
PLAN = Plan(n_test=4, n_valid=3, negatives=("random", "random_negative"), concurrency=2)


class Levels:
    """Predicts the true level plus noise for texts about 'good' explanations, and noise for others."""

    settings = {"simulator": "levels"}

    def __init__(self) -> None:
        self.calls = 0

    async def simulate(self, explanation: Any, windows: Any) -> list[Simulation]:
        self.calls += 1
        rng = np.random.default_rng(len(explanation.text))
        good = 1.0 if explanation.text.startswith("good") else 0.0
        return [
            Simulation(np.clip(good * w.activations + rng.random(len(w.activations)), 0, 5)) for w in windows
        ]


@pytest.fixture(scope="module")
def records(store: CodesStore) -> list[FeatureRecord]:
    alive = [i for i in range(64) if store.counts()[i] > 60][:5]
    return list(RecordBuilder(store, POLICY).build(alive))


def answer(request: Request) -> str | Reply:
    if request.schema is not None:
        return json.dumps({"explanation": f"good {hash(request.messages[-1].content) % 10_000}"})
    logprobs = {"Yes": -0.2, "No": -1.7, "2": -0.1}
    return Reply(("Yes",), (False,), Usage(1, 5, 1, 0.0, None), (logprobs,))


def run(
    folder: Path, records: list[FeatureRecord], reply: Any = answer, plan: Plan = PLAN, sim: Any = None
) -> tuple[list[FeatureResult], FunctionModel, Any]:
    model, simulator = FunctionModel(reply), sim or Levels()

    with Journal(folder / "j.sqlite") as journal:
        results = go(
            ExplainJob(journal, OneShot(model, SentenceStyle()), simulator, judge=model, plan=plan), records
        )
    return results, model, simulator


def go(job: ExplainJob, records: list[FeatureRecord]) -> list[FeatureResult]:
    by_index = {r.feature.index: r for r in records}
    wanted = list(by_index)
    outcome = anyio.run(job.run, wanted, lambda features: iter([by_index[f] for f in features]))
    assert outcome.stopped is None and not outcome.left
    return list(job.journal.features(job.key, wanted))


def test_a_whole_job(tmp_path: Path, records: list[FeatureRecord]):
    results, model, _ = run(tmp_path, records)
    assert [r.feature for r in results] == [r.feature.index for r in records]
    for result in results:
        names = [s.name for s in result.scores]
        assert names[:2] == ["correlation", "correlation_random_negative"]
        assert {
            "explained_variance",
            "deviation_explained",
            "false_positives_random_negative",
            "detection_auroc",
            "fuzzing_f1",
            "complexity",
        } <= set(names)
        main = result.score("correlation")
        assert main is not None and main.value is not None and main.n_scored == 8 and main.null is not None
        judged = {s.name: s for s in result.scores if s.name != "complexity"}
        assert all(s.null is not None or s.value is None for s in judged.values()), (
            "every score stands beside that of another feature's explanation"
        )
        assert result.null_of in {r.feature for r in results} - {result.feature}
        assert result.baseline_score("correlation") is not None and not result.failures
        splits = {(w.split, w.source) for w in result.windows}
        assert {("test", "top"), ("test", "random"), ("valid", "top"), ("train", "top")} <= splits
        assert FeatureResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert model.requests


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path: Path, records: list[FeatureRecord]):
    first, _, _ = run(tmp_path, records)
    second, model, simulator = run(tmp_path, records)
    assert not model.requests and not simulator.calls and second == first


def test_only_what_a_change_affects_runs_again(tmp_path: Path, records: list[FeatureRecord]):
    run(tmp_path, records)
    _, model, simulator = run(
        tmp_path, records, plan=Plan(n_test=3, n_valid=3, negatives=("random", "random_negative"))
    )
    assert simulator.calls == 2 * len(records)
    assert not [r for r in model.requests if r.schema is not None]


def test_a_failure_is_a_row_and_stops_nothing_and_is_tried_again(
    tmp_path: Path, records: list[FeatureRecord]
):
    victim = records[1].get("train", "top")[0].pieces

    def sometimes(request: Request) -> str | Reply:
        if (
            request.schema is not None
            and "".join(victim[-4:]).strip()[:6] in request.messages[-1].content
            and len(seen) < 3
        ):
            seen.append(1)
            return "no json"
        return answer(request)

    seen: list[int] = []
    results, _, _ = run(
        tmp_path,
        records,
        sometimes,
        plan=Plan(n_test=4, n_valid=3, negatives=("random", "random_negative"), concurrency=1),
    )
    failed = [r for r in results if r.failures]
    assert len(failed) == 1 and failed[0].explanation is None and not failed[0].scores
    assert failed[0].failures[0].error == "MalformedReplyError" and failed[0].failures[0].stage == "explain"
    rows = (
        sqlite3.connect(tmp_path / "j.sqlite")
        .execute("SELECT feature, stage, value FROM results WHERE status = 'failed'")
        .fetchall()
    )
    assert rows[0][:2] == (failed[0].feature, "explain") and "MalformedReplyError" in rows[0][2]
    again, model, _ = run(tmp_path, records)
    assert not any(r.failures for r in again) and [r for r in model.requests if r.schema is not None]
    assert sqlite3.connect(tmp_path / "j.sqlite").execute(
        "SELECT count(*) FROM results WHERE status = 'failed'"
    ).fetchone() == (0,)


def test_a_refused_key_stops_everything_at_once(tmp_path: Path, records: list[FeatureRecord]):
    def refuse(_: Request) -> str:
        raise EndpointRefusedError("wrong key")

    model = FunctionModel(refuse)
    with Journal(tmp_path / "j.sqlite") as journal:
        job = ExplainJob(journal, OneShot(model, SentenceStyle()), Levels(), plan=Plan(concurrency=1))
        with pytest.raises(EndpointRefusedError):
            go(job, records)
    assert len(model.requests) == 1


def test_a_simulator_that_fails_leaves_no_scores(tmp_path: Path, records: list[FeatureRecord]):
    class Broken:
        settings = {"simulator": "broken"}

        async def simulate(self, explanation: Any, windows: Any) -> list[Simulation]:
            if "random" not in str(explanation):
                return [Simulation(None, "down") for _ in windows]
            raise EndpointUnavailableError("down")

    results, _, _ = run(tmp_path, records[:2], sim=Broken())
    for result in results:
        assert result.explanation is not None and result.score("correlation") is None
        assert {f.stage for f in result.failures} >= {"simulate"}
        assert result.score("detection_auroc") is not None


def test_a_single_feature_has_no_null_and_says_nothing_about_one(
    tmp_path: Path, records: list[FeatureRecord]
):
    results, _, simulator = run(tmp_path, records[:1])
    main = results[0].score("correlation")
    assert main is not None and main.null is None and results[0].null_of is None and simulator.calls == 1


def test_partly_failed_windows_are_counted(tmp_path: Path, records: list[FeatureRecord]):
    class Half(Levels):
        async def simulate(self, explanation: Any, windows: Any) -> list[Simulation]:
            made = await super().simulate(explanation, windows)
            return [Simulation(None, "cut") if i == 0 else s for i, s in enumerate(made)]

    results, _, _ = run(tmp_path, records[:2], sim=Half())
    main = results[0].score("correlation")
    assert main is not None and (main.n_scored, main.n_failed) == (7, 1)
    assert [w.failure for w in results[0].windows if w.failure] == ["cut"]


def test_events_tell_what_happened(tmp_path: Path, records: list[FeatureRecord]):
    seen = []
    model = FunctionModel(answer)
    with Journal(tmp_path / "j.sqlite") as journal:
        job = ExplainJob(
            journal, OneShot(model, SentenceStyle()), Levels(), judge=model, plan=PLAN, on_event=seen.append
        )
        go(job, records)
    n = len(records)
    for stage in ("explained", "scored"):
        assert [(e.done, e.total, e.reused) for e in seen if e.stage == stage] == [
            (i + 1, n, False) for i in range(n)
        ]
    assert seen[-1].progress.done == n and seen[-1].progress.failed == 0 and seen[-1].progress.left_s == 0


def test_the_journal_survives_and_refuses_what_is_none(tmp_path: Path):
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.stage(
            "k", 1, "explain", {"a": [1, "ü"]}, usage=Usage(2, 30, 4, 0.5, None), provenance={"model": "m"}
        )
        journal.failed("f", Failure(1, "explain", "E", "m"))
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.get("k") == Row("done", {"a": [1, "ü"]}, Usage(2, 30, 4, 0.5, None))
        assert journal.get("f") is None and journal.get("none") is None
        journal.stage("f", 1, "explain", 3, partial=True)
        assert journal.get("f") == Row("partial", 3, Usage())
    (tmp_path / "bad.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="bad.sqlite"):
        Journal(tmp_path / "bad.sqlite")
    assert sqlite3.connect(tmp_path / "j.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(
    ("fields", "in_process"),
    [
        ({}, True),
        ({"simulator": "rated"}, False),
        ({"simulator_model": "another"}, False),
        ({"stages": ("explain", "score")}, False),
        ({"llm": Endpoint("http://localhost:1/v1")}, False),
    ],
)
def test_questions_go_to_the_simulator_s_model_when_it_is_the_embedded_one(
    fields: dict[str, Any], in_process: bool
):
    job = Job(run=Path("run"), **fields)
    assert (job.judge_endpoint != job.endpoint) == in_process and (
        job.judge_endpoint.base_url == LOCAL
    ) == in_process
    assert job.judge_endpoint.model == job.endpoint.model
