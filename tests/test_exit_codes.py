"""What a user gets of each kind of trouble, by the command line: exit code, sentence, what the same command
asks again, and what was billed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dialects import FINAL
from endpoint import KEY, Endpoint, Entry, completion, endpoint, play
from test_cli import cli

import featureinterp as fi
from featureinterp.jobs.records import alive_features

Dialect = Callable[[Entry, dict[str, Any]], Any]
ANSWERED = 6
"""So many requests are answered before the trouble begins, the check among them."""


@pytest.fixture(scope="module")
def features(run: Path) -> list[int]:
    return [int(f) for f in alive_features(fi.open_run(run))[:3]]


PRICE = "price = { input = 1, output = 1 }"


def written(path: Path, run: Path, features: list[int], url: str, extra: str = "", llm: str = PRICE) -> Path:
    """A job as a file."""
    path.write_text(
        f"run = {json.dumps(str(run))}\nout = {json.dumps(str(path.parent / 'out'))}\n"
        f"features = {features}\nsimulator = 'lexical'\n{extra}\n"
        f"[llm]\nbase_url = '{url}'\nmodel = 'm'\napi_key_env = 'TEST_KEY'\n"
        f"concurrency = 2\nmax_attempts = 1\n{llm}\n"
        "[plan]\nn_test = 2\nn_valid = 2\nnegatives = ['random']\n"
        "[records.counts]\ntop = [4, 2, 2]\nrandom = [0, 2, 2]\n"
    )
    return path


def later(name: str, *, one: bool = False) -> Dialect:
    """A refusal of everything after the first answers, or of one explanation alone."""
    case, victim = FINAL[name], []

    def dialect(entry: Entry, body: dict[str, Any]) -> Any:
        if not one:
            return (case.status, {}, case.body) if entry.number >= ANSWERED else None
        if "response_format" in body:
            victim[:] = victim or [str(body["messages"])]
        return (case.status, {}, case.body) if victim and str(body["messages"]) == victim[0] else None

    return dialect


def loading(entry: Entry, body: dict[str, Any]) -> Any:
    return (503, {"Retry-After": "0"}, FINAL["loading-llama-cpp"].body) if entry.number < 3 else None


def malformed(entry: Entry, body: dict[str, Any]) -> Any:
    return completion("I would rather talk about something else.") if "response_format" in body else None


def unmetered(entry: Entry, body: dict[str, Any]) -> Any:
    return {name: value for name, value in play(body).items() if name != "usage"}


@dataclass(frozen=True)
class Kind:
    """``first``: exit code. ``says``: on standard error. ``second``: exit code of the same command, at an
    endpoint that is well by then; ``asks``: how many requests it sends, None for whatever was not answered.
    """

    dialect: Dialect
    first: int
    says: str
    second: int = 0
    asks: int | None = None
    extra: str = ""


KINDS = {
    "key": Kind(later("key-openai"), 2, "refused the key"),
    "credit-402": Kind(later("credit-402"), 2, "no credit left"),
    "credit-insufficient-quota": Kind(later("credit-openai-quota"), 2, "no credit left"),
    "quota-of-a-day": Kind(later("quota-gemini-day"), 2, "limit per day"),
    "one-prompt-moderated": Kind(later("content-openrouter", one=True), 1, "1 of 3 features failed"),
    "unknown-path": Kind(lambda e, b: (404, {}, {"detail": "Not Found"}), 2, "--base-url"),
    "loading": Kind(loading, 0, "", asks=0),
    "malformed": Kind(malformed, 1, "3 of 3 features failed", 1, 0),
    "no-usage-under-a-budget": Kind(unmetered, 1, "an estimate", 0, None, "[budget]\ntokens = 900"),
}
QUICK = ("credit-402", "one-prompt-moderated", "malformed", "no-usage-under-a-budget")


def billed(server: Endpoint) -> int:
    return sum(e.tokens for e in server.ledger)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]
)
def test_each_kind_of_trouble_ends_as_it_is_documented(
    name: str, run: Path, features: list[int], tmp_path: Path
):
    kind = KINDS[name]
    with endpoint(dialect=kind.dialect) as server:
        file = written(tmp_path / "job.toml", run, features, server.url, kind.extra)
        first = cli("run", str(file), TEST_KEY=KEY)
        assert (
            first.returncode == kind.first and kind.says in first.stderr and "Traceback" not in first.stderr
        ), first.stderr
        assert KEY not in first.stderr + first.stdout
        answered = {e.digest for e in server.ledger if e.whole}
        sent, cost = len(server.ledger), billed(server)
        server.dialect = None
        if name != "malformed":
            file = written(tmp_path / "job.toml", run, features, server.url)
        second = cli("run", str(file), TEST_KEY=KEY)
        assert second.returncode == kind.second, second.stderr
        again = server.ledger[sent:]
        assert not answered & {e.digest for e in again} and not server.paid_twice(), (
            "what was answered is asked again"
        )
        assert kind.asks is None or len(again) == kind.asks
        if kind.first == 2:
            refused = [e for e in server.ledger[:sent] if e.status != 200]
            assert 1 <= len(refused) <= 4 and len(again) >= 1, "it goes on to ask where there is no hope"
        assert billed(server) - cost == sum(e.tokens for e in again)
        if name == "malformed":
            assert cli("run", str(file), "--retry-failed", TEST_KEY=KEY).returncode == 0


def priced(body: dict[str, Any]) -> Any:
    """OpenRouter: each reply with its bill, in USD."""
    whole = play(body)
    return whole | {
        "usage": whole["usage"]
        | {"cost": whole["usage"]["total_tokens"] * 2e-6, "cost_details": {"upstream_inference_cost": None}}
    }


def test_a_budget_in_usd_is_kept_by_the_bills_of_the_provider(run: Path, features: list[int], tmp_path: Path):
    """No price is known, and none is needed: it stops in time, says so, and goes on."""
    limit = 0.004
    with endpoint(priced) as server:
        file = written(tmp_path / "job.toml", run, features, server.url, f"[budget]\nusd = {limit}", "")
        first = cli("run", str(file), TEST_KEY=KEY)
        spent = billed(server) * 2e-6
        assert first.returncode == 1 and f"the budget of ${limit:g} is spent" in first.stderr, first.stderr
        assert limit <= spent <= limit + 2 * max(e.tokens for e in server.ledger) * 2e-6
        assert cli("run", str(file), "--budget-usd", "1", TEST_KEY=KEY).returncode == 0
        assert not server.paid_twice()


def test_a_budget_in_usd_without_price_and_bill_is_refused_before_any_work(
    run: Path, features: list[int], tmp_path: Path
):
    with endpoint() as server:
        file = written(tmp_path / "job.toml", run, features, server.url, "[budget]\nusd = 1", "")
        first = cli("run", str(file), TEST_KEY=KEY)
        assert (
            first.returncode == 2
            and "the price of 'm'" in first.stderr
            and "[prices." in first.stderr
            and len(server.ledger) == 1
        )
    assert not (tmp_path / "out").exists()


def started(*args: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as a shell starts it."""
    return subprocess.run(
        [sys.executable, "-m", "featureinterp", *args],
        env=os.environ | {"TEST_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def no_credit_for_questions(entry: Entry, body: dict[str, Any]) -> Any:
    """Explanations are answered, and the check; every question after them is refused with 402."""
    case = FINAL["credit-402"]
    return None if entry.number == 0 or "response_format" in body else (case.status, {}, case.body)


def some_questions(entry: Entry, body: dict[str, Any]) -> Any:
    """Every third of the requests that are no explanations is refused as such."""
    refused = entry.number % 3 == 0 and entry.number > 0 and "response_format" not in body
    return (400, {}, {"error": {"message": "it is purple"}}) if refused else None


PROCESSES: dict[str, tuple[Dialect | None, int, str]] = {
    "clean": (None, 0, ""),
    "every-question-refused-with-402": (no_credit_for_questions, 2, "no credit left"),
    "gaps": (some_questions, 1, "have gaps"),
    "unreachable": (None, 2, "cannot be reached"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exit_code_of_a_process_says_how_a_job_ended(
    name: str, run: Path, features: list[int], tmp_path: Path
):
    dialect, code, says = PROCESSES[name]
    with endpoint(dialect=dialect) as server:
        url = "http://127.0.0.1:9/v1" if name == "unreachable" else server.url
        file = written(tmp_path / "job.toml", run, features, url)
        ended = started("run", str(file))
    said = ended.stdout + ended.stderr
    assert ended.returncode == code and says in ended.stderr, ended.stderr
    assert "Traceback" not in said and KEY not in said
    assert (code == 2) == ("featureinterp: " in ended.stderr)
    assert bool(server.ledger) == (name != "unreachable") and not server.paid_twice()
