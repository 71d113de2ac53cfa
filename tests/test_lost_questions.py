"""Questions that got no answer are told of: with their causes, as failed stages when none was answered."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from endpoint import endpoint, play

import featureinterp as fi
from featureinterp.cli.screen import Screen, end
from featureinterp.errors import TooManyFailuresError
from featureinterp.jobs.records import alive_features
from featureinterp.llm.prices import Price

COUNTS = {"top": (4, 2, 2), "random": (0, 2, 2)}


@pytest.fixture(scope="module")
def features(run: Path) -> tuple[int, ...]:
    return tuple(int(f) for f in alive_features(fi.open_run(run))[:12])


def job(run: Path, out: Path, url: str, features: tuple[int, ...], **fields: Any) -> fi.Job:
    llm = fi.Endpoint(url, "m", None, price=Price(1, 1), max_attempts=1)
    plan = fi.Plan(n_test=2, n_valid=2, negatives=("random",))
    made = {"simulator": "lexical", "max_failure_rate": 1.0} | fields
    return fi.Job(
        run=run, out=out, features=features, llm=llm, plan=plan, records=fi.RecordPolicy(COUNTS), **made
    )


def refusing(which: Callable[[int], bool]) -> Callable[[dict[str, Any]], Any]:
    """Answers as usual, but refuses those of the short questions whose number is chosen."""
    number = 0

    def answer(body: dict[str, Any]) -> Any:
        nonlocal number
        if body.get("response_format"):
            return play(body)
        number += 1
        if which(number):
            return 400, {}, {"error": {"message": "the account is in arrears"}}
        return play(body)

    return answer


def stages(out: Path) -> set[tuple[str, str]]:
    rows = sqlite3.connect(out / "journal.sqlite").execute("SELECT stage, status FROM results")
    return set(rows)


def test_a_stage_of_which_no_question_was_answered_has_failed(
    run: Path, features: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    with endpoint(refusing(lambda n: n > 1)) as server:  # the first one is the check of the endpoint
        results = fi.run(job(run, out, server.url, features[:3]))
    assert results.outcome is not None and set(results.outcome.status.values()) == {"failed"}
    assert {
        ("detection", "failed"),
        ("fuzzing", "failed"),
        ("complexity", "failed"),
        ("explain", "done"),
    } <= stages(out)
    for result in results:
        assert result.explanation is not None and result.score("correlation") is not None
        assert {f.stage for f in result.failures} >= {"detection", "fuzzing", "complexity"}
        assert all("arrears" in f.message for f in result.failures)
    causes = fi.status(out).causes
    assert causes and all("arrears" in c["message"] for c in causes)
    with pytest.raises(typer.Exit) as ended:
        end(Screen(), results)
    said = capsys.readouterr().err
    assert (
        ended.value.exit_code == 1
        and "3 of 3 features failed" in said
        and "arrears" in said
        and "detection" in said
    )
    with endpoint() as server:
        again = fi.run(job(run, tmp_path / "again", server.url, features[:3]))
    assert (
        again.outcome is not None
        and set(again.outcome.status.values()) == {"done"}
        and not fi.status(again.folder).causes
    )


def test_they_count_for_the_limit_of_failures(run: Path, features: tuple[int, ...], tmp_path: Path):
    with endpoint(refusing(lambda n: n > 1)) as server:
        results = fi.run(job(run, tmp_path / "out", server.url, features, max_failure_rate=0.4))
    assert isinstance(results.stopped, TooManyFailuresError) and "arrears" in str(results.stopped)


def test_some_questions_without_an_answer_are_gaps_with_their_causes(
    run: Path, features: tuple[int, ...], tmp_path: Path
):
    out = tmp_path / "out"
    with endpoint(refusing(lambda n: n > 1 and n % 4 == 0)) as server:
        results = fi.run(job(run, out, server.url, features[:3]))
    assert results.outcome is not None and "partial" in results.outcome.status.values()
    assert any(s.n_failed for r in results for s in r.scores)
    causes = fi.status(out).causes
    gaps = [c for c in causes if c["error"] == "RequestRefusedError"]
    assert gaps and all("arrears" in c["message"] and c["n"] >= 1 for c in gaps)
    rows = (
        sqlite3.connect(out / "journal.sqlite")
        .execute("SELECT provenance FROM results WHERE status = 'partial'")
        .fetchall()
    )
    assert rows and all(sum(json.loads(p)["gaps"].values()) > 0 for (p,) in rows)


def test_what_was_estimated_is_kept_and_said(run: Path, features: tuple[int, ...], tmp_path: Path):
    def answer(body: dict[str, Any]) -> Any:
        return {k: v for k, v in play(body).items() if k != "usage"}

    out = tmp_path / "out"
    with endpoint(answer) as server:
        results = fi.run(job(run, out, server.url, features[:2]))
        n = len(server.ledger)
    assert results.outcome is not None and results.outcome.progress.estimated == n
    found = fi.status(out).stages
    assert sum(s["estimated"] for s in found) >= n - 1 and all(
        s["cost_usd"] > 0 for s in found if s["estimated"]
    )
