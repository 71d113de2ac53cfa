"""The language-model client over the real HTTP stack."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest
from endpoint import KEY, completion, endpoint

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.errors import (
    EndpointRefusedError,
    EndpointUnavailableError,
    InputError,
    LanguageModelError,
    MalformedReplyError,
    RequestRefusedError,
)
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.limited import Limited
from featureinterp.llm.metered import Metered
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.retrying import MAX_WAIT_S, Retrying
from featureinterp.llm.waiting import retry_after_s

ASK = Request((Message("user", "hi"),))


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


def ask(url: str, request: Request = ASK, wrap: Any = lambda m: m, **options: Any) -> Reply:
    async def go() -> Reply:
        model = OpenAIModel(url, "m", **({"api_key_env": "TEST_KEY"} | options))
        try:
            return await wrap(model).complete(request)
        finally:
            await model.aclose()

    return anyio.run(go)


def test_a_request_and_its_reply():
    with endpoint(lambda _: completion("Yes", logprobs={"Yes": -0.25, "No": -1.5})) as server:
        schema = {"type": "object"}
        reply = ask(
            server.url,
            Request(
                (Message("system", "s"), Message("user", "u")),
                7,
                0.5,
                3,
                schema=schema,
                top_logprobs=5,
                stop=("x",),
            ),
        )
    sent = server.ledger[0]
    assert sent["path"] == "/v1/chat/completions" and sent["key"] == f"Bearer {KEY}"
    assert sent["body"]["response_format"]["json_schema"]["schema"] == schema
    assert {
        k: sent["body"][k] for k in ("model", "max_tokens", "temperature", "seed", "top_logprobs", "stop")
    } == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "top_logprobs": 5,
        "stop": ["x"],
    }
    assert (
        reply.text == "Yes"
        and reply.first_token[0] == {"Yes": -0.25, "No": -1.5}
        and reply.truncated == (False,)
    )
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.cost_usd) == (11, 3, None)


@pytest.mark.parametrize(
    ("status", "error", "hint"),
    [
        (401, EndpointRefusedError, "TEST_KEY"),
        (403, EndpointRefusedError, "TEST_KEY"),
        (404, EndpointRefusedError, "--llm-model"),
        (400, RequestRefusedError, "it is purple"),
        (429, EndpointUnavailableError, "--concurrency"),
        (500, EndpointUnavailableError, "HTTP 500"),
        (503, EndpointUnavailableError, "HTTP 503"),
    ],
)
def test_refusals_say_what_to_do_and_never_show_the_key(
    status: int, error: type[LanguageModelError], hint: str
):
    with (
        endpoint(lambda _: (status, {}, {"error": {"message": "it is purple"}})) as server,
        pytest.raises(error, match=hint) as caught,
    ):
        ask(server.url)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value) and len(server.ledger) == 1
    assert caught.value.__cause__ is None and KEY not in repr(
        OpenAIModel(server.url, "m", api_key_env="TEST_KEY")
    )


def test_an_endpoint_that_is_down():
    with endpoint(lambda _: "x") as server:
        url = server.url
    with pytest.raises(EndpointUnavailableError, match="cannot be reached"):
        ask(url)


def test_a_dropped_connection_and_garbage_are_domain_errors():
    with endpoint(lambda _: (0, {}, b"")) as server, pytest.raises(EndpointUnavailableError):
        ask(server.url)
    with (
        endpoint(lambda _: {"object": "nothing"}) as server,
        pytest.raises(MalformedReplyError, match="OpenAI-compatible"),
    ):
        ask(server.url)


def test_wrong_addresses_and_missing_keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(InputError, match="TEST_KEY"):
        OpenAIModel("http://localhost/v1", "m", api_key_env="TEST_KEY")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        OpenAIModel("https://api.openai.com/v1", "m")
    for wrong in ("localhost:8000", "https://key@host/v1"):
        with pytest.raises(InputError):
            OpenAIModel(wrong, "m", api_key_env=None)


def test_a_key_is_sent_to_nobody_it_is_not_meant_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with endpoint(lambda _: "x") as server:
        assert ask(server.url, api_key_env=None).text == "x"
    assert not any(KEY in str(e.key) for e in server.ledger)


def test_retries_wait_as_long_as_the_endpoint_asks_and_then_succeed():
    answers = iter([(429, {"Retry-After": "3"}, {}), (503, {}, {}), completion("fine")])
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with endpoint(lambda _: next(answers)) as server:
        reply = ask(server.url, wrap=lambda m: Retrying(m, sleep=sleep))
    assert reply.text == "fine" and len(server.ledger) == 3
    assert waits[0] == 3 and 0 <= waits[1] <= MAX_WAIT_S


def test_retries_stop_and_keep_the_last_error():
    async def sleep(_: float) -> None:
        pass

    with endpoint(lambda _: (500, {}, {})) as server, pytest.raises(EndpointUnavailableError):
        ask(server.url, wrap=lambda m: Retrying(m, attempts=3, sleep=sleep))
    assert len(server.ledger) == 3
    with endpoint(lambda _: (401, {}, {})) as server, pytest.raises(EndpointRefusedError):
        ask(server.url, wrap=lambda m: Retrying(m, sleep=sleep))
    assert len(server.ledger) == 1


def test_retry_after_in_both_forms():
    assert retry_after_s("2.5") == 2.5
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT", now=1445412470.0) == 10.0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT", now=2e9) == 0.0
    assert retry_after_s(None) is None and retry_after_s("soon") is None


def test_no_more_requests_in_flight_than_allowed():
    async def go(url: str) -> None:
        model = OpenAIModel(url, "m", api_key_env=None)
        limited = Limited(model, 3)
        async with anyio.create_task_group() as group:
            for _ in range(9):
                group.start_soon(limited.complete, ASK)
        await model.aclose()

    with endpoint(latency_s=0.05) as server:
        anyio.run(go, server.url)
    assert server.most_in_flight == 3 and len(server.ledger) == 9


def test_metering_adds_up():
    async def go() -> Metered:
        meter = Metered(FunctionModel(lambda _: "x"))
        await meter.complete(ASK)
        await meter.complete(ASK)
        return meter

    meter = anyio.run(go)
    assert meter.usage.requests == 2 and meter.usage.cost_usd is None and math.isfinite(meter.usage.seconds)
