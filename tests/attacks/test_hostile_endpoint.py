"""An endpoint that wants harm: memory stays bounded, the key lands nowhere, and every answer is a value or one sentence."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from endpoint import KEY, completion, endpoint
from hostile import TOO_MUCH, WITH_KEY, key_forms
from hypothesis import given, settings
from hypothesis import strategies as st

from featureinterp.errors import EndpointRefusedError, InputError, LanguageModelError
from featureinterp.llm.config import Endpoint
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.secrets import HIDDEN, Secrets
from featureinterp.llm.types import Message, Reply, Request

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
"""What all too large answers one after the other may add to a process. One reply of 4 MB takes a few times that once it is read."""


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
print(json.dumps({"grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "found": found}))
"""


def test_no_answer_takes_much_memory(tmp_path: Path):
    names = iter([None, *TOO_MUCH])

    def answer(body: dict[str, Any]) -> Any:
        name = next(names)
        return completion("Yes") if name is None else TOO_MUCH[name](body)

    command = [sys.executable, "-c", CLIENT, f"{HERE} {HERE.parent}", ""]
    with endpoint(answer) as server:
        command[-1] = server.url
        done = subprocess.run(command, input="\n" * len(TOO_MUCH), capture_output=True, text=True, timeout=300)
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
def test_the_key_is_in_nothing_that_comes_back(name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
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
        assert other.url in str(error.value) and "--base-url" in str(error.value) and KEY not in str(error.value)
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
        assert "\x1b" not in str(error.value) and "pw@" not in str(error.value) and len(str(error.value)) < 600


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
