"""An endpoint that wants harm: memory stays bounded, the key lands nowhere, and every answer is a value or
one sentence.
"""

from __future__ import annotations

import base64
import json
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import anyio
import pytest
from endpoint import KEY, completion, endpoint
from hostile import IN_USAGE, TOO_MUCH, WITH_KEY, key_forms, usage_of
from hypothesis import given, settings
from hypothesis import strategies as st

import featureinterp as fi
from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.errors import EndpointRefusedError, InputError, LanguageModelError, MalformedReplyError
from featureinterp.llm.config import Endpoint
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.prices import Price
from featureinterp.llm.secrets import HIDDEN, Secrets

ASK = Request((Message("user", "hi"),), max_tokens=20)
FORM = {"type": "object", "properties": {"explanation": {"type": "string"}}, "required": ["explanation"]}
REQUESTS = (
    ASK,
    Request(ASK.messages, 20, schema=FORM, n=2),
    Request(ASK.messages, 4, top_logprobs=5),
    Request(prompt=(5, 6), read_at=(1,), top_logprobs=2),
)
RANDOM_KEY = "sk-proj-9fK2mX7Lq0RtZ4vB81nYcWpE"
HERE = Path(__file__).parent
MEMORY_MB = 150
"""What all too large answers one after the other may add to a process. One reply of 4 MB takes a few times
that once it is read.
"""


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


def ask(url: str, request: Request, **options: Any) -> Reply:
    async def go() -> Reply:
        model = OpenAIModel(url, "m", **({"api_key_env": "TEST_KEY", "timeout_s": 30} | options))
        try:
            return await model.complete(request)
        finally:
            await model.aclose()

    return anyio.run(go)


def outcome(url: str, request: Request) -> str:
    """All that comes back, as text."""
    try:
        return repr(ask(url, request))
    except LanguageModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return f"{type(error).__name__}: {error} {vars(error)!r} {error.__cause__!r}"


CLIENT = """
import json, resource, sys
sys.path[:0] = sys.argv[1].split()
from test_hostile_endpoint import ask, outcome, ASK
outcome(sys.argv[2], ASK)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = []
for line in sys.stdin:
    found.append(outcome(sys.argv[2], ASK)[:300])
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"grown": grown, "found": found}))
"""


def test_no_answer_takes_much_memory(tmp_path: Path):
    names = iter([None, *TOO_MUCH])

    def answer(body: dict[str, Any]) -> Any:
        name = next(names)
        return completion("Yes") if name is None else TOO_MUCH[name](body)

    command = [sys.executable, "-c", CLIENT, f"{HERE} {HERE.parent}", ""]
    with endpoint(answer) as server:
        command[-1] = server.url
        done = subprocess.run(
            command, input="\n" * len(TOO_MUCH), capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    found = dict(zip(TOO_MUCH, told["found"], strict=True))
    assert told["grown"] < MEMORY_MB, told["grown"]
    for name in (
        "a body of 64 MB",
        "a gzip bomb",
        "a gzip bomb in a gzip bomb",
        "a deflate bomb",
        "nested too deep",
    ):
        assert found[name].startswith("MalformedReplyError"), (name, found[name])
    assert "4 MB" in found["a gzip bomb"] and "nested" in found["nested too deep"]
    assert "Yes" in found["cookies"] and "RequestRefusedError" in found["an error nested too deep"]


@pytest.mark.parametrize("name", WITH_KEY)
def test_the_key_is_in_nothing_that_comes_back(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    caplog.set_level("DEBUG")
    with endpoint(WITH_KEY[name]) as server:
        told = [outcome(server.url, request) for request in REQUESTS]
        assert server.ledger
    told += [caplog.text, *capfd.readouterr()]
    assert not Secrets(KEY).found_in("\n".join(told).encode())
    assert KEY not in "".join(told) and KEY[:12] not in "".join(told)


def test_a_key_that_looks_random_is_found_in_every_form():
    secrets = Secrets(RANDOM_KEY)
    for name, form in key_forms(RANDOM_KEY).items():
        text = f"one {form} two"
        assert secrets.found_in(text.encode()), name
        cleaned = secrets.clean(text)
        assert HIDDEN in cleaned and not secrets.found_in(cleaned.encode()), name
        body = secrets.clean_body(json.dumps({"a": [text, 1.5, None], "b": "kept"}).encode())
        assert json.loads(body)["b"] == "kept" and json.loads(body)["a"][1:] == [1.5, None]


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.sampled_from([RANDOM_KEY, KEY, "short", "lm-studio", "not-needed"]),
)
def test_what_holds_no_key_is_left_as_it_is(text: str, key: str):
    if key not in text:
        assert Secrets(key).clean(text) == text
        body = json.dumps({"a": text}).encode()
        assert Secrets(key).clean_body(body) is body


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=40),
    st.binary(max_size=40),
    st.text("abcdefghijkmnopqrstuvwxyz0123456789-_", min_size=16, max_size=60),
)
def test_a_key_in_base64_is_found_whatever_stands_around_it(before: bytes, after: bytes, key: str):
    coded = base64.b64encode(before + key.encode() + after).decode()
    assert Secrets(key).found_in(f"x {coded} y".encode())


def test_placeholders_are_no_secrets():
    for word in ("none", "EMPTY", "ollama", "test", None):
        assert Secrets(word).clean(f"it is {word} of these") == f"it is {word} of these"
    assert Secrets("not-needed").clean("what is not needed") == "what is not needed"


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int):
    with endpoint(lambda _: "fine") as other:
        target = f"{other.url}/chat/completions?key={KEY}"
        with (
            endpoint(lambda _: (status, {"Location": target}, {})) as server,
            pytest.raises(EndpointRefusedError) as error,
        ):
            ask(server.url, ASK)
        assert (
            other.url in str(error.value) and "--base-url" in str(error.value) and KEY not in str(error.value)
        )
    assert not other.ledger and len(server.ledger) == 1


def test_a_redirect_to_anything_is_one_sentence():
    for location in (
        "",
        "/v1/x",
        "//evil\x1b[2J/",
        "http://[::1",
        "http://user:pw@host/p",
        "javascript:alert(1)",
        "x" * 5000,
    ):
        headers = {"Location": location} if location else {}
        with (
            endpoint(lambda _, headers=headers: (302, headers, {})) as server,
            pytest.raises(LanguageModelError) as error,
        ):
            ask(server.url, ASK)
        assert (
            "\x1b" not in str(error.value) and "pw@" not in str(error.value) and len(str(error.value)) < 600
        )


def test_no_cookie_is_kept_or_sent_back():
    async def go(url: str) -> int:
        model = OpenAIModel(url.replace("127.0.0.1", "localhost"), "m", api_key_env=None)
        try:
            for _ in range(3):
                await model.complete(ASK)
            client = model._client
            return len(client.cookies.jar) + sum(len(t.client.cookie_jar) for t in client._made if t.client)
        finally:
            await model.aclose()

    with endpoint(lambda _: (200, {"Set-Cookie": "a=b; Path=/"}, completion("x"))) as server:
        assert anyio.run(go, server.url) == 0
        assert not any("cookie" in e.headers for e in server.ledger)


GOOD_ADDRESSES = (
    "https://x.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21",
    "https://x.openai.azure.com/openai/v1/?api-version=preview",
    "https://x/v1?api-version=2025-04-01-preview",
    "http://[::1]:8000/v1",
    "https://x/v1?v=1&beta=true&region=eastus2",
)
SECRET_ADDRESSES = (
    "https://x/v1?key=abcdefgh",
    "https://x/v1?api-key=abcdefgh",
    "https://x/v1?code=SWordfish99",
    "https://x/v1?a=b&subscription-key=2024-10-21",
    f"https://x/v1?x={RANDOM_KEY}",
    f"https://x/v1?api-version={RANDOM_KEY}",
    f"https://x/v1?{RANDOM_KEY}",
    f"https://x/v1?{RANDOM_KEY}=1",
    "https://x/v1?whatever=SWordfish99",
    "https://x/v1?sig=1",
    "https://x/v1#SWordfish99",
    "https://SWordfish99@x/v1",
    "https://user:SWordfish99@x/v1",
    "https://x/v1?region=SWordfish99SWordfish99SWordfish99SW",
    "https://x/v1?%6Bey=SWordfish99",
)


@pytest.mark.parametrize("address", SECRET_ADDRESSES)
def test_an_address_with_a_secret_is_refused_without_being_repeated(address: str):
    for make in (lambda: OpenAIModel(address, "m"), lambda: Endpoint(address, "m")):
        with pytest.raises(InputError, match="--api-key-env") as error:
            make()
        assert not any(word in str(error.value) for word in ("SWordfish", "abcdefgh", RANDOM_KEY[:10]))


def test_addresses_with_versions_are_taken():
    for address in GOOD_ADDRESSES:
        assert Endpoint(address, "m").base_url == address


def test_a_key_in_the_place_of_its_name_is_refused_without_being_repeated():
    for given_key in (RANDOM_KEY, "gsk_Ab12Cd34Ef56Gh78Ij90Kl12", "hf_aB3dE5fG7hJ9kL1mN3", "two words"):
        for make in (
            lambda k=given_key: Endpoint("http://x/v1", "m", k),
            lambda k=given_key: OpenAIModel("http://x/v1", "m", api_key_env=k),
        ):
            with pytest.raises(InputError, match="environment variable") as error:
                make()
            assert given_key not in str(error.value)
    assert Endpoint("http://x/v1", "m", "MY_OPENAI_KEY2").api_key_env == "MY_OPENAI_KEY2"


def test_fields_with_a_key_are_refused():
    for fields in (
        {"api_key": "abc"},
        {"a": [{"Authorization": "x"}]},
        {"deep": {"b": RANDOM_KEY}},
        {"x": "Bearer abcdefghi1"},
    ):
        with pytest.raises(InputError, match="extra_body") as error:
            Endpoint("http://x/v1", "m", extra_body=fields)
        assert RANDOM_KEY not in str(error.value)
    kept = {
        "provider": {"order": ["a"]},
        "prompt_cache_key": "mine",
        "user": "3f2a9c4e5b6d7f8091a2b3c4",
        "stop_token_ids": [1],
        "max_tokens": 5,
    }
    assert Endpoint("http://x/v1", "m", extra_body=kept).extra_body == kept


@pytest.mark.parametrize("name", IN_USAGE)
def test_counts_that_no_reply_has_are_refused(name: str):
    with endpoint(usage_of(name)) as server, pytest.raises(MalformedReplyError, match="no reply can have"):
        ask(server.url, ASK)


def test_choices_and_alternatives_are_bounded():
    more = completion("x")["choices"] * 5
    with endpoint(lambda _: completion("x") | {"choices": more}) as server:
        assert ask(server.url, ASK).texts == ("x",) and len(ask(server.url, REQUESTS[1]).texts) == 2
    for name, words in (("choices without end", "20,000 choices"), ("a text of 3 MB", "characters")):
        with endpoint(TOO_MUCH[name]) as server, pytest.raises(MalformedReplyError, match=words):
            ask(server.url, ASK)
    with endpoint(lambda _: completion("x", logprobs={f"t{i}": -float(i) for i in range(5_000)})) as server:
        first = ask(server.url, REQUESTS[2]).first_token[0]
    assert list(first) == [f"t{i}" for i in range(256)]


def job(run: Path, out: Path, url: str) -> fi.Job:
    llm = fi.Endpoint(url, "m", "TEST_KEY", price=Price(1, 1), max_attempts=1, max_wait_s=0.2)
    plan = fi.Plan(n_test=2, n_valid=2, negatives=("random",))
    records = fi.RecordPolicy({"top": (4, 2, 2), "random": (0, 2, 2)})
    fields = {
        "features": "random:2",
        "simulator": "rated",
        "max_failure_rate": 1.0,
        "budget": fi.Budget(usd=1.0),
    }
    return fi.Job(run=run, out=out, llm=llm, plan=plan, records=records, **fields)


def everything_in(folder: Path) -> bytes:
    """All bytes of all files, with the packed columns of the journal unpacked."""
    found = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    if (folder / "journal.sqlite").exists():
        rows = (
            sqlite3.connect(folder / "journal.sqlite")
            .execute("SELECT summary, windows FROM features")
            .fetchall()
        )
        found += [part for summary, windows in rows for part in (summary.encode(), zlib.decompress(windows))]
    return b"\n".join(found)


SOME = (
    "a text, as it is",
    "a text, escaped in part",
    "a text, in base64",
    "in log-probabilities",
    "in an error",
    "in what is no JSON",
    "in half a reply",
)


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in WITH_KEY]
)
def test_the_key_is_in_nothing_that_a_job_leaves(
    name: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    caplog.set_level("DEBUG")
    told: list[str] = []
    calm = 1  # the check of the endpoint is answered, so that the job begins

    def answer(body: dict[str, Any]) -> Any:
        nonlocal calm
        calm -= 1
        return completion("Yes") if calm >= 0 else WITH_KEY[name](body)

    out = tmp_path / "out"
    with endpoint(answer) as server:
        try:
            results = fi.run(job(run, out, server.url), on_event=lambda event: told.append(repr(event)))
            told += [repr(list(results)), str(results.stopped)]
            fi.export(out, to="csv")
        except LanguageModelError as error:
            told.append(str(error))
    told += [caplog.text, *capfd.readouterr(), repr(fi.status(out))]
    kept = everything_in(out)
    assert len(kept) > 1000 and len(server.ledger) > 1
    for data in (kept, "\n".join(told).encode()):
        assert (
            KEY.encode() not in data
            and KEY[::-1].encode() not in data
            and base64.b64encode(KEY.encode()) not in data
        )
        assert KEY.encode().hex().encode() not in data.lower() and KEY.encode().upper() not in data


@pytest.mark.parametrize("name", ["negative", "beyond 64 bits", "text", "a cost below zero"])
def test_a_job_with_such_counts_ends_with_failures_and_no_made_up_cost(name: str, run: Path, tmp_path: Path):
    calm = 1

    def answer(body: dict[str, Any]) -> Any:
        nonlocal calm
        calm -= 1
        return completion("Yes") if calm >= 0 else usage_of(name)(body)

    with endpoint(answer) as server:
        results = fi.run(job(run, tmp_path / "out", server.url))
    assert results.outcome is not None and set(results.outcome.status.values()) == {"failed"}
    assert all("no reply can have" in f.message for r in results for f in r.failures if f.stage == "explain")
    progress = results.outcome.progress
    assert progress.cost_usd is not None and 0 < progress.cost_usd < 0.05
    assert progress.estimated == progress.requests - 1  # all but the check of the endpoint, which was calm
