"""What the client makes of every refusal that an endpoint is known to give: put otherwise, waited for, or
said in one sentence.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import anyio
import pytest
from dialects import (
    FINAL,
    LEARNABLE,
    STREAM,
    WAITS,
    at_path,
    azure,
    events,
    first_of,
    openai,
    streamed,
    thinking,
)
from endpoint import KEY, Entry, endpoint, play
from hypothesis import given, settings
from hypothesis import strategies as st

import featureinterp.errors as errors
from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.errors import (
    ContentRefusedError,
    EmptyReplyError,
    EndpointBusyError,
    EndpointRefusedError,
    EndpointUnavailableError,
    LanguageModelError,
)
from featureinterp.llm.accepts import Accepts, Options, schema_of, without_system
from featureinterp.llm.finish_reasons import REASONS
from featureinterp.llm.limited import Limited, Limits
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.refusal_tables import CASES, PARAMETERS
from featureinterp.llm.refusals import read_refusal
from featureinterp.llm.retrying import Retrying
from featureinterp.llm.waiting import duration_s, wait_s
from featureinterp.tasks import each

LEVEL = {"type": "integer", "minimum": 0, "maximum": 5}
TEXTS = [{"type": "array", "items": LEVEL, "minItems": n, "maxItems": n} for n in (2, 3)]
SCHEMA = {
    "type": "object",
    "properties": {
        "levels": {"type": "array", "prefixItems": TEXTS, "minItems": 2, "maxItems": 2},
        "name": {"type": "string"},
    },
    "required": ["levels", "name"],
    "additionalProperties": False,
}
CHAT = (
    Message("system", "Say what you see."),
    Message("user", "A window."),
    Message("assistant", "x"),
    Message("user", "Another."),
)
EXPLAIN = Request(CHAT, 300, 0.7, 3, 2, SCHEMA)
VERDICT = Request(CHAT, 4, 0.0, top_logprobs=10, stop=("\n",))


STEPS = {"object-wants-the-word": 2, "schema-and-object": 2}
"""Refusals of the looser form, too."""


def numbered(request: Request, number: int) -> Request:
    """The same kind of request with another question."""
    return replace(request, messages=(*request.messages[:-1], Message("user", f"Question {number}")))


def ask(
    url: str, *requests: Request, wrap: Any = lambda m: m, **options: Any
) -> tuple[list[Reply], OpenAIModel]:
    """The replies to requests that are sent at once."""

    async def go() -> tuple[list[Reply], OpenAIModel]:
        model = OpenAIModel(url, "m", **options)
        try:
            return await each(wrap(model).complete, requests), model
        finally:
            await model.aclose()

    return anyio.run(go)


def turned_down(entry: Entry) -> bool:
    """Whether a request got no completion."""
    return entry.status != 200 or entry.free


def refused_by(name: str) -> Request:
    """The kind of request that a refusal is about."""
    sent = Accepts().body("m", VERDICT, Options())
    return (
        VERDICT
        if LEARNABLE[name].when(sent) and name not in ("stream-dashscope", "stream-thinking")
        else EXPLAIN
    )


@pytest.mark.parametrize("name", LEARNABLE)
def test_eight_at_once_get_through_a_refusal_that_can_be_put_otherwise(name: str):
    refusal, request = LEARNABLE[name], refused_by(name)
    wanted = [numbered(request, i) for i in range(8)]
    with endpoint(dialect=first_of(refusal, streamed), latency_s=0.03) as server:
        replies, model = ask(server.url, *wanted)
        said = len([e for e in server.ledger if turned_down(e)])
        more, _ = ask(server.url, *(numbered(request, i) for i in range(8, 12)), accepts=model.accepts)
    answered = [e.body for e in server.ledger if not turned_down(e)]
    assert len(replies) == 8 and len(more) == 4 and all(r.texts[0] and r.usage.requests == 1 for r in replies)
    assert 1 <= said <= 8 * STEPS.get(name, 1)
    assert len([e for e in server.ledger if turned_down(e)]) == said, "what was learnt is not asked again"
    assert (
        len(answered) == 12 and not any(refusal.when(body) for body in answered) and not server.paid_twice()
    )


def test_a_shared_form_is_loosened_once_for_all_who_are_refused_together():
    with endpoint(dialect=LEARNABLE["schema-openai-bounds"], latency_s=0.05) as server:
        _, model = ask(server.url, *(numbered(EXPLAIN, i) for i in range(16)))
    assert model.accepts.reply_form == "plain_schema"
    assert {e.body["response_format"]["json_schema"]["strict"] for e in server.ledger} == {True}


def test_each_learns_only_what_it_must():
    learnt = {}
    for name in LEARNABLE:
        with endpoint(dialect=first_of(LEARNABLE[name], streamed)) as server:
            _, model = ask(server.url, refused_by(name))
        learnt[name] = {
            f: v for f in Accepts.__slots__ if (v := getattr(model.accepts, f)) != getattr(Accepts(), f)
        }
    assert learnt["openai-max-completion-tokens"] == {"length_field": "max_completion_tokens"}
    assert learnt["azure-minimum-through-openrouter"] == learnt["minimum-in-words"] == {"least_tokens": 16}
    assert learnt["most-tokens"] == {"most_tokens": 256}
    assert learnt["few-logprobs-vllm"] == {"most_logprobs": 5} and learnt["few-logprobs-together"] == {
        "most_logprobs": 1
    }
    assert (
        learnt["schema-gemini-additional"]
        == learnt["schema-gemini-through-openrouter"]
        == {"reply_form": "bare_schema"}
    )
    assert learnt["schema-deepseek"] == {"reply_form": "json_object"} and learnt["schema-and-object"] == {
        "reply_form": "text"
    }
    for beginning, field in (
        ("seed", "seed"),
        ("logprobs", "logprobs"),
        ("n-", "several"),
        ("system", "system"),
    ):
        assert all(found == {field: False} for name, found in learnt.items() if name.startswith(beginning)), (
            beginning
        )
    assert all(len(found) == 1 for name, found in learnt.items())


@pytest.mark.parametrize("name", FINAL)
def test_a_refusal_that_nothing_helps_is_one_sentence_with_the_endpoints_own_words(name: str):
    case = FINAL[name]
    with (
        endpoint(lambda _: (case.status, {}, case.body)) as server,
        pytest.raises(LanguageModelError) as caught,
    ):
        ask(server.url, EXPLAIN)
    said = str(caught.value)
    assert (
        type(caught.value) is getattr(errors, case.error)
        and case.says in said
        and "\n" not in said
        and ".;" not in said
        and len(said) < 700
    )
    assert len(server.ledger) == 1 and (case.status == 200 or f"HTTP {case.status}" in said)


def test_what_a_refusal_quotes_of_the_request_teaches_nothing():
    """The words of a prompt, in a filter's answer or in a validator's, are no parameters."""
    inputs = {"seed": 3, "temperature": 0.7, "n": 2, "response_format": {}, "logprobs": True}
    body = {
        "detail": [
            {"loc": ["body", "messages", 0, "content"], "msg": "value is not a valid text", "input": inputs}
        ]
    }
    with (
        endpoint(lambda _: (422, {}, body)) as server,
        pytest.raises(errors.RequestRefusedError, match="not a valid text"),
    ):
        ask(server.url, EXPLAIN)
    assert len(server.ledger) == 1


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_read_wherever_it_stands_and_outlived(name: str):
    case = WAITS[name]
    answers = iter([(case.status, case.headers, case.body)] * 9)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with endpoint(lambda body: next(answers, None) or play(body)) as server:
        if case.seconds * 9 <= 300:
            ask(server.url, VERDICT, wrap=lambda m: Retrying(m, attempts=3, sleep=sleep))
            assert waits == pytest.approx([case.seconds] * 9)
        else:
            with pytest.raises(EndpointBusyError):
                ask(server.url, VERDICT, wrap=lambda m: Retrying(m, attempts=3, sleep=sleep))
            assert waits == pytest.approx([case.seconds] * int(300 // case.seconds))


def test_a_limit_per_minute_that_says_nothing_is_outlived_and_other_failures_are_not_tried_for_ever():
    time = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal time
        time += seconds

    class Limit:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            if time < 61:
                raise EndpointBusyError("rate limit")
            return Reply(("x",), (False,), completion_usage())

    def completion_usage() -> Any:
        from featureinterp.domain.usage import Usage

        return Usage(1)

    for _ in range(50):
        time = 0.0
        model = Retrying(Limit(), attempts=6, sleep=sleep, clock=lambda: time)  # noqa: B023
        assert anyio.run(model.complete, VERDICT).text == "x"
        assert time < 130
    time = -1e9
    with pytest.raises(EndpointBusyError):
        anyio.run(
            Retrying(Limit(), attempts=6, max_seconds=300, sleep=sleep, clock=lambda: time + 1e9).complete,
            VERDICT,
        )
    assert -1e9 + 200 < time <= -1e9 + 300


def test_while_one_request_is_told_to_wait_no_other_is_sent():
    now, slept, sent = 0.0, [], []

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    class Model:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            sent.append(now)
            if len(sent) == 1:
                raise EndpointBusyError("slow down", 20.0)
            return Reply(("x",), (False,), None)  # type: ignore[arg-type]

    class Unsettled(Limits):
        def settle(self, *_: Any) -> None: ...

    async def go() -> None:
        limited = Limited(Model(), Unsettled(4, clock=lambda: now, sleep=sleep))
        with pytest.raises(EndpointBusyError):
            await limited.complete(VERDICT)
        await limited.complete(VERDICT)

    anyio.run(go)
    assert sent == [0.0, 20.0] and slept == [20.0]


def test_waits_are_read_from_headers_of_every_provider():
    now = 1_700_000_000.0
    assert wait_s({"Retry-After": "3"}, now=now) == 3 and wait_s({"retry-after-ms": "250"}, now=now) == 0.25
    assert (
        wait_s({"x-ratelimit-reset": "1700000012500"}, now=now) == 12.5
        and wait_s({"x-ratelimit-reset": "1700000009"}, now=now) == 9
    )
    assert (
        wait_s(
            {},
            {
                "error": {
                    "metadata": {
                        "headers": {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1700000030000"}
                    }
                }
            },
            now=now,
        )
        == 30
    )
    assert (
        wait_s(
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:25Z",
            },
            now=now,
        )
        == 5
    )
    assert (
        wait_s({"x-ratelimit-remaining-tokens": "5000", "x-ratelimit-reset-tokens": "6m0s"}, now=now) is None
    )
    assert wait_s({"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"}, now=now) == 0
    assert wait_s({"Retry-After": "-3"}, now=now) is None and wait_s({"Retry-After": "nan"}, now=now) is None
    assert (
        duration_s("1h2m3s"),
        duration_s("6m0s"),
        duration_s("20ms"),
        duration_s("2"),
        duration_s("soon"),
    ) == (3723, 360, 0.02, None, None)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.text()
                | st.sampled_from(
                    [
                        "error",
                        "message",
                        "detail",
                        "loc",
                        "msg",
                        "metadata",
                        "raw",
                        "code",
                        "choices",
                        "param",
                        "details",
                        "retryDelay",
                    ]
                ),
                x,
            )
        ),
        max_leaves=12,
    ),
    st.integers(100, 599),
)
@settings(max_examples=200, deadline=None)
def test_no_body_breaks_the_reading_of_refusals(value: Any, status: int):
    for body in (
        json.dumps(value).encode(),
        json.dumps({"error": value}).encode(),
        json.dumps({"error": {"message": json.dumps(value)}}).encode()[:-1],
    ):
        found = read_refusal(status, {}, body)
        assert len(found.words) <= 300 and "\n" not in found.words and found.words
        assert found.kind and (found.wait is None or found.wait >= 0)


SOURCE = re.compile(r"\b[\w-]+(\.[\w-]+)+/[\w./-]{3,}|\b[\w.-]+/[\w.-]+#\d+|\bRFC \d{4}|\bwords seen at \w+")
"""A page, a report on GitHub, an RFC; or that there is none of them."""


def test_every_case_of_the_table_has_a_source_that_can_be_looked_up():
    cited = [s for row in (*CASES, *PARAMETERS) for s in row.sources] + [row.source for row in REASONS]
    assert all(row.sources for row in (*CASES, *PARAMETERS))
    assert [s for s in cited if not SOURCE.search(s)] == []
    assert {p.field for p in PARAMETERS} <= set(Accepts.__slots__)


def test_schemas_in_looser_forms_lose_bounds_and_nothing_else():
    plain, bare = schema_of(SCHEMA, "plain_schema"), schema_of(SCHEMA, "bare_schema")
    assert schema_of(SCHEMA, "json_schema") == SCHEMA
    levels = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
    assert plain == {
        "type": "object",
        "properties": {"levels": levels, "name": {"type": "string"}},
        "required": ["levels", "name"],
        "additionalProperties": False,
    }
    assert bare == {k: v for k, v in plain.items() if k != "additionalProperties"}


def test_a_field_of_the_users_schema_may_have_the_name_of_a_bound():
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string", "minLength": 1}, "format": {"type": "integer"}},
        "required": ["title", "format"],
    }
    assert schema_of(schema, "bare_schema") == {
        "type": "object",
        "properties": {"title": {"type": "string"}, "format": {"type": "integer"}},
        "required": ["title", "format"],
    }


def test_what_a_system_message_says_is_kept_for_templates_without_one():
    assert without_system(CHAT)[0] == Message("user", "Say what you see.\n\nA window.") and [
        m.role for m in without_system(CHAT)
    ] == [
        "user",
        "assistant",
        "user",
    ]
    assert without_system((Message("system", "a"), Message("system", "b"))) == (Message("user", "a\n\nb"),)


def test_a_model_that_thinks_gets_room_and_both_replies_are_counted():
    with endpoint(dialect=thinking) as server:
        (reply, again), model = ask(server.url, VERDICT, numbered(VERDICT, 1))
        lengths = [e.body["max_tokens"] for e in server.ledger]
    assert model.accepts.thinks and reply.text in ("Yes", "No") and again.text in ("Yes", "No")
    assert sorted(lengths) == [4, 4, 4100, 4100] and reply.usage.requests == 2
    assert reply.usage.completion_tokens == 4 + 1 and reply.room == 4100 and reply.truncated == (False,)


def test_room_for_thoughts_that_the_user_gives_is_all_that_is_spent():
    with endpoint(dialect=thinking) as server:
        (reply,), _ = ask(server.url, VERDICT, thinking_tokens=50)
    assert (
        [e.body["max_tokens"] for e in server.ledger] == [54]
        and reply.truncated == (True,)
        and reply.room == 54
    )
    with endpoint(dialect=thinking) as server:
        (reply,), _ = ask(server.url, VERDICT, thinking_tokens=300, effort="low", reply_tokens=20)
    assert [(e.body["max_tokens"], e.body["reasoning_effort"]) for e in server.ledger] == [
        (320, "low")
    ] and reply.text in ("Yes", "No")


def stream(body: dict[str, Any], **_: Any) -> Any:
    return 200, STREAM, events(play(body))


def test_a_stream_says_the_same_as_a_whole_reply():
    with endpoint() as server:
        whole, _ = ask(server.url, EXPLAIN, VERDICT)
    with endpoint(stream) as server:
        pieces, _ = ask(server.url, EXPLAIN, VERDICT)
    assert [
        (r.texts, r.truncated, r.first_token, r.usage.prompt_tokens, r.usage.completion_tokens) for r in whole
    ] == [
        (r.texts, r.truncated, r.first_token, r.usage.prompt_tokens, r.usage.completion_tokens)
        for r in pieces
    ]


def test_a_stream_that_breaks_off_is_no_reply_and_an_error_in_one_is_an_error():
    def broken(body: dict[str, Any]) -> Any:
        return 200, STREAM, events(play(body), done=False)[:120]

    with endpoint(broken) as server, pytest.raises(EndpointUnavailableError, match="broke off"):
        ask(server.url, VERDICT)
    late = (
        b'data: {"choices": [{"index": 0, "delta": {"content": "Y"}}]}\n\ndata: {"error": {"message": '
        b'"Overloaded", "code": 529}}\n\n'
    )
    with (
        endpoint(lambda _: (200, STREAM, late)) as server,
        pytest.raises(EndpointBusyError, match="Overloaded"),
    ):
        ask(server.url, VERDICT)


@pytest.mark.parametrize(
    "form", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions", "/chat/completions", " /v1 "]
)
def test_an_address_in_any_form_reaches_the_same_place(form: str):
    with endpoint() as server:
        base = server.url.removesuffix("/v1")
        ask(f" {base}/v1 " if form == " /v1 " else base + form, VERDICT)
        assert [e.path for e in server.ledger] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("form", "served"),
    [
        ("", "/chat/completions"),
        ("/api", "/api/v1/chat/completions"),
        ("/api/v1", "/api/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
    ],
)
def test_where_the_path_is_another_it_is_found_by_eight_at_once(form: str, served: str):
    with endpoint(dialect=at_path(served)) as server:
        replies, model = ask(server.url.removesuffix("/v1") + form, *(numbered(VERDICT, i) for i in range(8)))
        n = len(server.ledger)
        ask(server.url.removesuffix("/v1") + form, VERDICT, accepts=model.accepts)
    assert len(replies) == 8 and n <= 16 and len(server.ledger) == n + 1 and not server.paid_twice()


def test_azure_gets_its_version_and_its_own_header(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with endpoint(dialect=azure) as server:
        base = server.url.removesuffix("/v1")
        for form in ("/openai/deployments/d", "/openai/deployments/d/chat/completions"):
            ask(f"{base}{form}?api-version=2024-10-21", VERDICT, api_key_env="TEST_KEY")
    assert {e.path for e in server.ledger} == {
        "/openai/deployments/d/chat/completions?api-version=2024-10-21"
    }
    assert {e.headers["api-key"] for e in server.ledger} == {KEY} and {e.key for e in server.ledger} == {None}


def test_a_whole_page_of_a_refusal_is_shown_by_its_title():
    page = (
        b"<!DOCTYPE html><html><head><title>413 Request Entity\nToo Large</title></head><body>"
        + b"x" * 100_000
    )
    with (
        endpoint(lambda _: (413, {}, page)) as server,
        pytest.raises(LanguageModelError, match="413 Request Entity Too Large") as caught,
    ):
        ask(server.url, VERDICT)
    assert "<" not in str(caught.value)


def test_a_content_filter_is_not_the_key(monkeypatch: pytest.MonkeyPatch):
    """One prompt that is moderated is its own failure: the next one is answered."""

    def dialect(entry: Entry, body: dict[str, Any]) -> Any:
        return (403, {}, FINAL["content-openrouter"].body) if "Question 1" in json.dumps(body) else None

    async def go(url: str) -> list[Any]:
        model, found = OpenAIModel(url, "m"), []
        for i in range(3):
            try:
                found.append((await model.complete(numbered(VERDICT, i))).text)
            except ContentRefusedError as error:
                found.append(error)
        await model.aclose()
        return found

    with endpoint(dialect=dialect) as server:
        found = anyio.run(go, server.url)
    assert [isinstance(f, ContentRefusedError) for f in found] == [False, True, False] and len(
        server.ledger
    ) == 3


def test_refused_in_every_form_it_ends():
    said = openai(
        "Unsupported parameter: response_format, n, seed, temperature, logprobs, system role not supported"
    )
    with endpoint(lambda _: (400, {}, said)) as server, pytest.raises(LanguageModelError):
        ask(server.url, EXPLAIN)
    assert len(server.ledger) < 15


def test_an_answer_without_choices_is_asked_for_once_more():
    def answers(n: int) -> Any:
        left = iter([{"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 0}}] * n)
        return lambda body: next(left, None) or play(body)

    with endpoint(answers(1)) as server:
        (reply,), _ = ask(server.url, VERDICT, wrap=Retrying)
    assert reply.text in ("Yes", "No") and len(server.ledger) == 2
    with endpoint(answers(9)) as server, pytest.raises(EmptyReplyError, match="without any choice") as caught:
        ask(server.url, VERDICT, wrap=Retrying)
    assert len(server.ledger) == 2 and caught.value.usage.prompt_tokens == 11


def test_an_endpoint_that_is_refused_for_good_is_not_learnt_from():
    kept: list[Accepts] = []
    with (
        endpoint(dialect=first_of(LEARNABLE["seed-fastapi"], lambda e, b: (401, {}, {}))) as server,
        pytest.raises(EndpointRefusedError),
    ):
        ask(server.url, EXPLAIN, remember=kept.append)
    assert not kept


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (
            {"effort": "low"},
            openai(
                "Unsupported parameter: 'reasoning_effort' is not supported with this model.",
                "reasoning_effort",
            ),
        ),
        (
            {"effort": "low"},
            openai("Unsupported parameter: 'reasoning_effort' is not supported with this model."),
        ),
        (
            {"extra_body": {"top_k": 3}},
            {"detail": [{"loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]},
        ),
        ({"extra_body": {"seed": 3}}, openai("seed is not supported", "seed")),
    ],
)
def test_what_the_user_asked_for_is_not_left_out_in_silence(options: dict[str, Any], body: Any):
    field = next(iter(options.get("extra_body", {"reasoning_effort": 1})))
    with (
        endpoint(lambda b: (400, {}, body) if field in b else play(b)) as server,
        pytest.raises(errors.RequestRefusedError, match=field),
    ):
        ask(server.url, replace(EXPLAIN, seed=None), **options)
    assert len(server.ledger) == 1


def test_a_limit_of_the_users_own_is_the_room_of_a_reply():
    with endpoint() as server:
        (reply,), model = ask(server.url, EXPLAIN, extra_body={"max_tokens": 77})
    assert server.ledger[0].body["max_tokens"] == reply.room == model.room(EXPLAIN) == 77
