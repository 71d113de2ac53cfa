"""Reaching an endpoint: keys, certificates, proxies, the environment, addresses; and the test of an endpoint,
which always ends with its table.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest
from dialects import FINAL, PROVIDERS, REFUSED_AT_FIRST, thinking
from endpoint import KEY, completion, endpoint
from test_cli import cli, refused

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.errors import (
    EndpointRefusedError,
    EndpointUnavailableError,
    InputError,
    LanguageModelError,
)
from featureinterp.llm.address import check_key, is_loopback, read_address
from featureinterp.llm.config import Endpoint
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.probe import probe

ASK = Request((Message("user", "hi"),), 5)


def ask(url: str, **options: Any) -> Reply:
    async def go() -> Reply:
        model = OpenAIModel(url, "m", **options)
        try:
            return await model.complete(ASK)
        finally:
            await model.aclose()

    return anyio.run(go)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{KEY}\n", "line break"),
        (f"{KEY}\r\nX-Other: 1", "line break"),
        (f'"{KEY}"', "quotes"),
        (f"'{KEY}'", "quotes"),
        (f"\u201c{KEY}\u201d", "quotes"),
        (f" {KEY}", "space"),
        (f"{KEY} ", "space"),
        (f"Bearer {KEY}", "Bearer"),
        (f"{KEY}\u2026", "character"),
        (f"{KEY}\x00", "character"),
    ],
)
def test_a_key_that_cannot_be_one_is_said_and_never_sent(
    key: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError) as caught:
        check_key(key, "the environment variable TEST_KEY")
    assert words in str(caught.value) and KEY not in str(caught.value) and "TEST_KEY" in str(caught.value)
    if "\x00" in key:
        return
    monkeypatch.setenv("TEST_KEY", key)
    with endpoint() as server, pytest.raises(InputError, match="TEST_KEY"):
        ask(server.url, api_key_env="TEST_KEY")
    assert not server.ledger


def test_nothing_of_another_providers_environment_is_sent(monkeypatch: pytest.MonkeyPatch):
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "OPENAI_ORGANIZATION",
        "OPENAI_ADMIN_KEY",
        "ANTHROPIC_API_KEY",
    ):
        monkeypatch.setenv(name, f"secret-of-{name.lower()}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Other: secret-of-other")
    with endpoint() as server:
        ask(server.url)
        ask(server.url, extra_headers={"X-Title": "features"})
    assert all("secret" not in json.dumps(e.headers) and e.key is None for e in server.ledger)
    assert set(server.ledger[0].headers) <= {
        "host",
        "accept",
        "accept-encoding",
        "connection",
        "user-agent",
        "content-length",
        "content-type",
    }
    assert server.ledger[1].headers["x-title"] == "features"


def test_extra_headers_take_their_keys_from_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTHER_KEY", "another-secret-value-1")
    with (
        endpoint(lambda _: (400, {}, {"error": {"message": "no another-secret-value-1 here"}})) as server,
        pytest.raises(LanguageModelError) as caught,
    ):
        ask(server.url, extra_headers={"X-Api-Key": "env:OTHER_KEY"})
    assert server.ledger[0].headers["x-api-key"] == "another-secret-value-1" and "another-secret" not in str(
        caught.value
    )
    for headers, words in (
        ({"X-Api-Key": "written-out"}, "env:VARIABLE"),
        ({"Authorization": "Bearer x"}, "env:VARIABLE"),
        ({"X-A": "env:NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL"),
        ({"X-A": "a\nb"}, "line break"),
        ({"X A": "b"}, "extra header"),
        ({"Host": "other"}, "extra header"),
    ):
        with pytest.raises(InputError, match=words):
            ask("http://127.0.0.1:1/v1", extra_headers=headers)
    with pytest.raises(InputError, match="env:VARIABLE"):
        Endpoint("http://127.0.0.1:1/v1", "m", extra_headers={"api-key": "x"})


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_this_machine_is_reached_round_a_proxy(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with endpoint() as server:
        assert ask(server.url).text and ask(server.url.replace("127.0.0.1", "localhost")).text
    assert [
        is_loopback(h)
        for h in ("localhost", "127.3.2.1", "::1", "a.localhost", "127.0.0.1.example", "10.0.0.1")
    ] == [True] * 4 + [False] * 2


def test_others_are_reached_through_the_proxy_and_one_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch):
    with endpoint(lambda _: completion("through")) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        assert (
            ask("http://models.invalid/v1").text == "through"
            and server.ledger[0].path == "http://models.invalid/v1/chat/completions"
        )
        host = server.ledger[0].headers["host"]
    assert host == "models.invalid"
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(EndpointUnavailableError, match=r"proxy|cannot be reached"):
        ask("http://models.invalid/v1")
    monkeypatch.setenv("HTTP_PROXY", "ftp://127.0.0.1:9")
    with pytest.raises(InputError, match="HTTP_PROXY"):
        ask("http://models.invalid/v1")


@contextmanager
def encrypted(folder: Path) -> Iterator[tuple[str, Path]]:
    """An endpoint with a certificate that nobody has signed but itself, and the file with it."""
    file = folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
        "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps(completion("safe")).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}/v1", file
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def plain_server() -> Iterator[int]:
    """A server without encryption, which answers a TLS greeting with an error in plain text."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[assignment]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with encrypted(tmp_path) as (url, file):
        with pytest.raises(
            EndpointRefusedError, match=r"certificate is not trusted.*SSL_CERT_FILE"
        ) as caught:
            ask(url)
        assert "\n" not in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert ask(url).text == "safe"
        (tmp_path / "empty.pem").write_text("nothing")
        for wrong, words in ((tmp_path / "none.pem", "no file"), (tmp_path / "empty.pem", "no certificates")):
            monkeypatch.setenv("SSL_CERT_FILE", str(wrong))
            with pytest.raises(InputError, match=f"SSL_CERT_FILE.*{words}"):
                ask(url)
            with endpoint() as plain:  # without encryption no certificate is looked at
                assert ask(plain.url).text
    monkeypatch.delenv("SSL_CERT_FILE")
    with plain_server() as port, pytest.raises(EndpointRefusedError, match="encryption failed"):
        ask(f"https://127.0.0.1:{port}/v1")


def test_a_wrong_certificate_file_is_one_sentence_of_the_program(tmp_path: Path):
    (tmp_path / "c.toml").write_text('[endpoints.a]\nbase_url = "https://127.0.0.1:9/v1"\nmodel = "m"\n')
    env = {
        "FEATUREINTERP_CONFIG": str(tmp_path / "c.toml"),
        "FEATUREINTERP_CACHE": str(tmp_path),
        "SSL_CERT_FILE": str(tmp_path / "none.pem"),
    }
    refused(cli("llm", "test", "a", **env), "SSL_CERT_FILE", "no file")


@pytest.mark.parametrize(
    ("text", "call", "header"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions", "authorization"),
        ("https://api.openai.com", "https://api.openai.com/v1/chat/completions", "authorization"),
        (
            "https://openrouter.ai/api/v1/chat/completions/",
            "https://openrouter.ai/api/v1/chat/completions",
            "authorization",
        ),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
            "authorization",
        ),
        (
            "https://api.groq.com/openai/v1",
            "https://api.groq.com/openai/v1/chat/completions",
            "authorization",
        ),
        ("https://r.openai.azure.com", "https://r.openai.azure.com/openai/v1/chat/completions", "api-key"),
        (
            "https://r.openai.azure.com/openai/v1/",
            "https://r.openai.azure.com/openai/v1/chat/completions",
            "api-key",
        ),
        (
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21",
            "api-key",
        ),
        ("http://localhost:11434", "http://localhost:11434/v1/chat/completions", "authorization"),
        ("http://[::1]:8080/v1", "http://[::1]:8080/v1/chat/completions", "authorization"),
    ],
)
def test_addresses_in_the_forms_in_which_people_have_them(text: str, call: str, header: str):
    found = read_address(text)
    assert found.call("chat/completions", found.paths[0]) == call and found.key_header == header


def test_what_is_no_address():
    for wrong in (
        "localhost:8000",
        "https://",
        "http://host:port/v1",
        "http://a b/v1",
        "https://key@host/v1",
        "ftp://host/v1",
        "http://[::1/v1",
    ):
        with pytest.raises(InputError):
            read_address(wrong)


@pytest.mark.parametrize("name", [*FINAL, "down", *PROVIDERS])
def test_the_test_of_an_endpoint_always_ends_with_its_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    dialect = PROVIDERS.get(name)
    if name in FINAL:
        case = FINAL[name]
        dialect = lambda entry, body: (case.status, {}, case.body)  # noqa: E731
    with endpoint(dialect=dialect) as server:
        there = Endpoint(server.url, "m")
    if name != "down":
        with endpoint(dialect=dialect) as server:
            found = anyio.run(probe, Endpoint(address(server.url, name), "m", **key_for(name, monkeypatch)))
    else:
        found = anyio.run(probe, there)
    lines = dict(found.lines())
    if name in PROVIDERS:
        assert (
            found.problem is None
            and lines["answers"] == "yes"
            and found.reply_form is not None
            and found.follows
        )
        assert found.usage.requests >= 3 and "not tested" not in lines.values()
    else:
        assert found.problem and lines["answers"].startswith("no: ") and found.problem in lines["answers"]
        assert name == "down" or FINAL[name].says in found.problem
        assert lines["structured replies"] == "not tested"
    assert set(lines) >= {"answers", "structured replies", "logprobs", "several choices", "this test"}
    assert found.from_json(json.loads(json.dumps(found.to_json()))) == found


def address(url: str, name: str) -> str:
    """As a user of that provider has it."""
    base = url.removesuffix("/v1")
    return {
        "azure": f"{base}/openai/deployments/m?api-version=2024-10-21",
        "lm-studio": base,
        "ollama": base,
    }.get(name, url)


def key_for(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TEST_KEY", KEY)
    return {"api_key_env": "TEST_KEY"} if name == "azure" else {}


def test_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    with endpoint(dialect=PROVIDERS["openai"]) as server:
        found = anyio.run(probe, Endpoint(server.url, "m"))
    lines = dict(found.lines())
    assert lines["sent otherwise"] == "max_completion_tokens, no logprobs, no temperature" and lines[
        "thinks"
    ].startswith("yes")
    assert lines["logprobs"].startswith("no") and lines["structured replies"] == "JSON schema"
    with endpoint(dialect=thinking) as server:
        found = anyio.run(probe, Endpoint(server.url, "m", thinking_tokens=10))
    assert found.problem is None and found.thinks and not found.follows


def test_the_program_shows_the_table_of_an_endpoint_that_fails(tmp_path: Path):
    with endpoint(dialect=REFUSED_AT_FIRST) as server:
        (tmp_path / "c.toml").write_text(f'[endpoints.a]\nbase_url = "{server.url}"\nmodel = "m"\n')
        env = {
            "FEATUREINTERP_CONFIG": str(tmp_path / "c.toml"),
            "FEATUREINTERP_CACHE": str(tmp_path / "cache"),
        }
        shown = cli("llm", "test", "a", **env)
    assert (
        shown.returncode == 1
        and "no credit left" in shown.stdout
        and "this test" in shown.stdout
        and "Traceback" not in shown.stderr + shown.stdout
    )
    assert sys.executable
