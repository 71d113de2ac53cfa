"""Whole jobs through every provider's dialect, each by the example that the docs give for it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dialects import FINAL, PROVIDERS
from endpoint import KEY, Entry, endpoint, play
from test_cli import cli
from test_job_runs import COUNTS, PLAN, features, wide, written

import featureinterp as fi
from featureinterp.llm.config import load_config
from featureinterp.llm.prices import Price

__all__ = ["features", "wide"]
FEW = ("openai", "azure", "deepseek", "dashscope", "ollama")
"""These together put everything otherwise that can be."""
DOCS = Path(__file__).parent.parent / "docs" / "endpoints.md"


def examples() -> dict[str, dict[str, Any]]:
    """The examples of the docs, by name."""
    text = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    found: dict[str, dict[str, Any]] = tomllib.loads(text[0])["endpoints"]
    return found


def test_the_docs_have_an_example_for_every_dialect_and_each_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    (tmp_path / "c.toml").write_text(text)
    monkeypatch.setenv("FEATUREINTERP_CONFIG", str(tmp_path / "c.toml"))
    assert set(load_config().endpoints) == set(examples()) == set(PROVIDERS)


def at(url: str, example: dict[str, Any]) -> str:
    """The example's address, on this machine: its path and query as they are."""
    path = re.sub(r"https?://[^/]+", "", example["base_url"])
    return url.removesuffix("/v1") + path


def routed(name: str) -> Any:
    """The dialect at the paths of its provider: what stands before ``/chat/completions`` in the example, with
    ``/v1`` where it has no version.
    """
    given = re.sub(r"https?://[^/]+|\?.*|/chat/completions", "", examples()[name]["base_url"]).rstrip("/")
    right = f"{given or '/v1'}/chat/completions"

    def dialect(entry: Entry, body: dict[str, Any]) -> Any:
        if entry.path.split("?")[0] != right and name != "lm-studio":
            return 404, {}, {"detail": "Not Found"}
        return PROVIDERS[name](entry, body)

    return dialect


@pytest.mark.parametrize(
    ("name", "n"),
    [*((name, 3) for name in FEW), *(pytest.param(name, 40, marks=pytest.mark.slow) for name in PROVIDERS)],
)
def test_a_job_runs_through_each_dialect_and_asks_nothing_again(
    name: str, n: int, wide: Path, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    example = examples()[name]
    monkeypatch.setenv("TEST_KEY", KEY)
    with endpoint(dialect=routed(name), latency_s=0.002) as server:
        fields = {k: v for k, v in example.items() if k not in ("base_url", "api_key_env", "rpm", "tpm")}
        there = fi.Endpoint(
            at(server.url, example), **fields, api_key_env="TEST_KEY", price=Price(1, 1), max_attempts=2
        )
        job = fi.Job(
            run=wide,
            out=tmp_path / "out",
            features=tuple(features[:n]),
            llm=there,
            plan=fi.Plan(**PLAN),
            records=fi.RecordPolicy(COUNTS),
            simulator="lexical",
        )
        results = fi.run(job)
        assert (
            results.outcome is not None
            and results.stopped is None
            and not [f.message for r in results for f in r.failures]
        )
        assert set(results.outcome.status.values()) == {"done"} and len(results) == n
        sent = len(server.ledger)
        again = fi.run(job)
        assert len(server.ledger) == sent and [r.explanation for r in again] == [
            r.explanation for r in results
        ]
    assert not server.paid_twice() and sent > n


def test_one_prompt_that_is_moderated_is_a_failure_of_its_feature_and_the_job_ends(
    wide: Path, features: list[int], tmp_path: Path
):
    """Also in the second run, which asks that prompt once more and nothing else."""
    victim: list[str] = []

    def dialect(entry: Entry, body: dict[str, Any]) -> Any:
        if "response_format" not in body:
            return None
        victim[:] = victim or [str(body["messages"])]
        return (403, {}, FINAL["content-openrouter"].body) if str(body["messages"]) == victim[0] else None

    with endpoint(dialect=dialect) as server:
        there = fi.Endpoint(server.url, "m", None, price=Price(1, 1))
        job = fi.Job(
            run=wide,
            out=tmp_path / "out",
            features=tuple(features[:4]),
            llm=there,
            plan=fi.Plan(**PLAN),
            records=fi.RecordPolicy(COUNTS),
            simulator="lexical",
        )
        first = fi.run(job)
        failed = [f for r in first for f in r.failures]
        assert (
            first.stopped is None
            and len(failed) == 1
            and failed[0].error == "ContentRefusedError"
            and "violence" in failed[0].message
        )
        assert sorted(first.outcome.status.values()).count("failed") == 1 and not first.outcome.left
        sent = len(server.ledger)
        second = fi.run(job)
        assert [e.status for e in server.ledger[sent:]] == [403] and len(
            [f for r in second for f in r.failures]
        ) == 1
        server.dialect = None
        third = fi.run(job)
        assert third.n_failures == 0 and set(third.outcome.status.values()) == {"done"}


@pytest.mark.parametrize(
    "name",
    [
        "credit-402",
        "credit-openai-quota",
        "quota-openrouter-day",
        "key-openai",
        "place-openai",
        "model-ollama",
    ],
)
def test_what_no_request_can_get_round_stops_the_job_at_once(
    name: str, wide: Path, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the first answers: by the command line, with exit code 2 and one sentence; the second run goes
    on.
    """
    case, answered = FINAL[name], 12
    monkeypatch.setenv("TEST_KEY", KEY)

    def dialect(entry: Entry, body: dict[str, Any]) -> Any:
        return (case.status, {}, case.body) if entry.number >= answered else None

    with endpoint(dialect=dialect) as server:
        there = fi.Endpoint(server.url, "m", "TEST_KEY", concurrency=2, price=Price(1, 1))
        job = fi.Job(
            run=wide,
            out=tmp_path / "out",
            features=tuple(features[:4]),
            llm=there,
            plan=fi.Plan(**PLAN),
            records=fi.RecordPolicy(COUNTS),
            simulator="lexical",
        )
        file = written(job, tmp_path / "job.toml")
        ended = cli("run", str(file), TEST_KEY=KEY)
        assert ended.returncode == 2 and case.says in ended.stderr and "Traceback" not in ended.stderr
        assert len(server.ledger) <= answered + 2, "nothing more is sent than what was under way"
        server.dialect = None
        assert cli("run", str(file), TEST_KEY=KEY).returncode == 0
    assert not server.paid_twice()


def test_options_reach_the_endpoint(wide: Path, features: list[int], tmp_path: Path):
    with endpoint() as server:
        ended = cli(
            "explain", str(wide), "--features", str(features[0]), "--simulator", "lexical", "--base-url",
            server.url, "--llm-model", "m", "--n-test", "1",
            "--reply-tokens", "700", "--thinking-tokens", "50", "--effort", "low", "--extra-body",
            '{"top_p": 0.5}', "--extra-header", "X-Title: features",
            "--out", str(tmp_path / "out"),
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        bodies = [e.body for e in server.ledger]
        assert {(b["max_tokens"], b["reasoning_effort"], b["top_p"]) for b in bodies} == {(750, "low", 0.5)}
        assert {e.headers["x-title"] for e in server.ledger} == {"features"}
    for wrong, words in (
        (["--extra-body", "{"], "--extra-body"),
        (["--extra-body", "[]"], "--extra-body"),
        (["--extra-header", "x"], "--extra-header"),
    ):
        said = cli("explain", str(wide), "--base-url", "http://127.0.0.1:9/v1", "--llm-model", "m", *wrong)
        assert said.returncode == 2 and words in said.stderr
    said = cli("explain", str(wide), "--effort", "low")
    assert said.returncode == 2 and "--base-url" in said.stderr


def test_the_played_provider_is_not_the_client_itself():
    """A dialect that accepts everything would prove nothing: each refuses, ignores or moves something that
    the usual one takes.
    """
    usual = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
    "max_tokens": 4, "temperature": 0.0, "logprobs": True,
             "top_logprobs": 10, "n": 2, "seed": 1,
             "response_format": {"type": "json_schema", "json_schema": {"schema": {
                 "type": "object",
                 "properties": {"a": {"type": "array",
                 "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 5}], "minItems": 1}},
                 "additionalProperties": False}}}}  # fmt: skip
    entry = Entry(0, "/chat/completions", None, usual, "d", 0.0)
    for name, dialect in PROVIDERS.items():
        answer = dialect(entry, usual)
        assert answer is not None and answer != play(usual), name
    assert replace(entry, path="/v1/chat/completions").path
