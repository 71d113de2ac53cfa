"""What completions mean: their content in any form, every way in which they end, what they cost, and what a
second run asks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from dialects import events, first_of, thinking
from endpoint import Entry, completion, endpoint, play

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.errors import (
    ContentRefusedError,
    EndpointUnavailableError,
    LanguageModelError,
    MalformedReplyError,
    TruncatedReplyError,
)
from featureinterp.explainers.asking import ask as ask_for
from featureinterp.llm.answers import collect, text_of
from featureinterp.llm.cached import ReplyStore
from featureinterp.llm.config import Endpoint
from featureinterp.llm.finish_reasons import REASONS, end_of
from featureinterp.llm.metered import Meter
from featureinterp.llm.prices import Price
from featureinterp.llm.stack import open_stack

ASK = Request((Message("user", "hi"),), 300, seed=0)


def asked(
    server: Any, store: Path | None = None, request: Request = ASK, work: Any = None, **options: Any
) -> tuple[Any, Meter]:
    """What comes of a request through the whole stack, an error as itself, and what was spent."""

    async def go() -> tuple[Any, Meter]:
        meter = Meter()
        options.setdefault("max_attempts", 1)
        async with open_stack(Endpoint(server.url, "m", **options), meter, price=Price(1, 1)) as stack:
            model = stack.model(ReplyStore(store))
            try:
                return await (model.complete(request) if work is None else work(model)), meter
            except LanguageModelError as error:
                return error, meter

    return anyio.run(go)


def one(text: Any = "Yes", reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A completion with one choice."""
    whole = completion("x", finish=reason or "")
    whole["choices"][0] |= {
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": reason,
    }
    return whole


CONTENTS: dict[str, tuple[dict[str, Any], str]] = {
    "text": (one("Yes"), "Yes"),
    "parts": (one([{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]), "Yes"),
    "parts-mistral-magistral": (
        one(
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "No?"}]},
                {"type": "text", "text": "Yes"},
            ]
        ),
        "Yes",
    ),
    "parts-output-text": (one([{"type": "output_text", "text": "Yes", "annotations": []}]), "Yes"),
    "parts-plain": (one(["Y", "es"]), "Yes"),
    "parts-value": (one([{"type": "text", "text": {"value": "Yes"}}]), "Yes"),
    "one-part": (one({"type": "text", "text": "Yes"}), "Yes"),
    "reasoning-beside-it": (one("Yes", reasoning_content="No, or"), "Yes"),
    "old-completion": (
        {
            "choices": [{"text": "Yes", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        },
        "Yes",
    ),
    "no-reason": (one("Yes", None), "Yes"),
    "unknown-reason": (one("Yes", "because"), "Yes"),
    "end-turn": (one("Yes", "end_turn"), "Yes"),
    "eos-token": (one("Yes", "eos_token"), "Yes"),
    "gemini-stop": (one("Yes", "STOP"), "Yes"),
    "refusal-null": (one("Yes", refusal=None), "Yes"),
    "tool-calls-null": (one("Yes", tool_calls=None), "Yes"),
    "error-null": (one("Yes") | {"error": None}, "Yes"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_is_read_in_every_form(name: str):
    body, text = CONTENTS[name]
    with endpoint(lambda _: body) as server:
        reply, meter = asked(server)
    assert (
        reply.texts == (text,)
        and reply.truncated == (False,)
        and len(server.ledger) == 1
        and meter.usage.requests == 1
    )


@pytest.mark.parametrize(
    "reason", ["length", "max_tokens", "MAX_TOKENS", "model_length", "model_context_window_exceeded"]
)
def test_a_reply_that_was_cut_is_asked_again_only_with_more_room(reason: str, tmp_path: Path):
    """Not in the same run, not in the next one; and what is whole stays known when there is more room."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return one('{"a": "cut', reason) if body["max_tokens"] < 500 else one('{"a": "whole"}')

    async def work(model: Any) -> list[str]:
        found = await ask_for(model, ASK, lambda text: text)
        if found.error is not None:
            raise found.error
        return [text for text, _ in found.found]

    with endpoint(answer) as server:
        for _ in range(2):
            error, _ = asked(server, tmp_path / "r.sqlite", work=work)
            assert (
                isinstance(error, TruncatedReplyError)
                and "after 300 tokens" in str(error)
                and "--reply-tokens" in str(error)
            )
            assert len(server.ledger) == 1
        for _ in range(2):
            texts, _ = asked(server, tmp_path / "r.sqlite", work=work, reply_tokens=500)
            assert texts == ['{"a": "whole"}'] and len(server.ledger) == 2
        texts, _ = asked(server, tmp_path / "r.sqlite", work=work)
        assert texts == ['{"a": "whole"}'] and len(server.ledger) == 2


def test_a_verdict_that_was_cut_after_its_word_is_an_answer_and_stays_one(tmp_path: Path):
    def check(reply: Reply) -> None:
        if not reply.text.startswith("Yes"):
            raise MalformedReplyError("no verdict")

    request = Request((Message("user", "hi"),), 4, check=check)
    with endpoint(lambda _: one("Yes, because", "length")) as server:
        for room in (None, 500):
            reply, _ = asked(server, tmp_path / "r.sqlite", request, reply_tokens=room)
            assert reply.text == "Yes, because" and len(server.ledger) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "refusal": (one(None, refusal="I can't help with that."), "I can't help with that"),
    "refusal-beside-text": (one("", refusal="I am sorry."), "I am sorry"),
    "content-filter": (one(None, "content_filter"), "content_filter"),
    "content-filter-partial": (one("Yes and", "content_filter"), "content_filter"),
    "gemini-safety": (one("", "SAFETY"), "SAFETY"),
    "gemini-recitation": (one(None, "RECITATION"), "RECITATION"),
    "gemini-prohibited": (one(None, "PROHIBITED_CONTENT"), "PROHIBITED_CONTENT"),
    "anthropic-refusal": (one("", "refusal"), "refusal"),
    "bedrock-guardrail": (one("", "guardrail_intervened"), "guardrail_intervened"),
    "zhipu-sensitive": (one("", "sensitive"), "sensitive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_or_a_filter_is_named_asked_once_and_paid_once(name: str, tmp_path: Path):
    body, words = REFUSED[name]

    async def work(model: Any) -> Any:
        return await ask_for(model, ASK, lambda text: text)

    with endpoint(lambda _: body) as server:
        for run in range(2):
            error, meter = asked(server, tmp_path / "r.sqlite", work=work)
            assert type(error) is ContentRefusedError and words in str(error)
            assert meter.usage.requests == (1 if run == 0 else 0) and len(server.ledger) == 1
            assert run or (meter.usage.completion_tokens == 3 and meter.usage.prompt_tokens == 11)


def test_of_several_choices_those_that_were_not_filtered_are_used():
    whole = one("Yes")
    whole["choices"].append(one("", "content_filter")["choices"][0] | {"index": 1})
    with endpoint(lambda _: whole) as server:
        reply, _ = asked(server)
    assert reply.texts == ("Yes",) and reply.refused is None


@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource", "abort", "network_error"])
def test_a_reply_that_broke_off_is_asked_for_again(reason: str):
    left = iter([one("Ye", reason)])
    with endpoint(lambda _: next(left, None) or one("Yes")) as server:
        reply, meter = asked(server, max_attempts=2)
    assert reply.text == "Yes" and len(server.ledger) == 2 and meter.usage.completion_tokens == 6
    with endpoint(lambda _: one("Ye", reason)) as server:
        error, _ = asked(server)
    assert type(error) is EndpointUnavailableError and reason in str(error)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (one(None, reasoning_content="The answer is Yes"), "--thinking-tokens"),
        (one("", reasoning="The answer is Yes"), "--thinking-tokens"),
        (one([{"type": "thinking", "thinking": "Yes"}]), "--thinking-tokens"),
        (one(None, "tool_calls", tool_calls=[{"function": {"name": "f"}}]), "calls a tool"),
    ],
)
def test_a_reply_without_an_answer_says_what_it_has_instead(body: dict[str, Any], words: str):
    with endpoint(lambda _: body) as server:
        error, meter = asked(server)
    assert (
        type(error) is MalformedReplyError
        and words in str(error)
        and len(server.ledger) == 1
        and meter.usage.completion_tokens == 3
    )


def test_thoughts_that_only_the_usage_shows_are_room_that_is_missing():
    """OpenAI's reasoning models: nothing in the message, the tokens in the usage."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if body["max_tokens"] > 1000:
            return one("Yes")
        spent = {
            "prompt_tokens": 11,
            "completion_tokens": 300,
            "completion_tokens_details": {"reasoning_tokens": 300},
        }
        return one("", "length") | {"usage": spent}

    with endpoint(answer) as server:
        reply, meter = asked(server)
    assert reply.text == "Yes" and [e.body["max_tokens"] for e in server.ledger] == [300, 4396]
    assert (
        meter.usage.completion_tokens == 303
        and meter.usage.requests == 2
        and reply.usage.completion_tokens == 303
    )


def test_what_was_learnt_is_kept_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_LEARNT", str(tmp_path / "learnt"))

    def dialect(entry: Entry, body: dict[str, Any]) -> Any:
        return (400, {}, {"error": {"message": "seed is not supported"}}) if "seed" in body else None

    with endpoint(dialect=first_of(dialect, thinking)) as server:
        asked(server)
        n = len(server.ledger)
        reply, _ = asked(server, request=Request((Message("user", "other"),), 300, seed=0))
        assert len(server.ledger) == n + 1 == 3 and isinstance(reply, Reply)
        other, _ = asked(
            server, store=None, request=Request((Message("user", "third"),), 4, seed=0, top_logprobs=5)
        )
        assert isinstance(other, Reply)
        for file in (tmp_path / "learnt").iterdir():
            file.write_text(file.read_text().replace('"seed": false', '"seed": "perhaps"'))
        n = len(server.ledger)
        asked(server, request=Request((Message("user", "fourth"),), 300, seed=0))
        assert len(server.ledger) == n + 2, "a file that makes no sense is no knowledge"


def test_what_was_learnt_is_forgotten_after_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from featureinterp.llm.accepts import Accepts
    from featureinterp.llm.learnt import forget, recall, remember

    monkeypatch.setenv("FEATUREINTERP_LEARNT", str(tmp_path))
    remember("http://x/v1", "m", Accepts(seed=False, prompt_logprobs=None), now=1e9)
    assert recall("http://x/v1", "m", now=1e9 + 6 * 86400) == Accepts(seed=False)
    assert (
        recall("http://x/v1", "m", now=1e9 + 8 * 86400) is None
        and recall("http://x/v1", "n", now=1e9) is None
    )
    forget("http://x/v1", "m")
    assert recall("http://x/v1", "m", now=1e9) is None
    monkeypatch.setenv("FEATUREINTERP_LEARNT", "")
    remember("http://x/v1", "m", Accepts(seed=False))
    assert recall("http://x/v1", "m") is None


def test_every_reason_has_a_meaning():
    assert {end_of(r) for r in ("stop", "STOP", None, "", "eos_token", "whatever")} == {"whole"}
    assert {end_of(r) for r in ("length", "MAX_TOKENS", "model_length")} == {"cut"}
    assert {end_of(r) for r in ("content_filter", "SAFETY", "refusal")} == {"filtered"}
    assert {end_of(r) for r in ("error", "abort", "insufficient_system_resource")} == {"broken"}
    stated = [r for row in REASONS for r in row.reasons]
    assert len(stated) == len(set(stated)) and all(
        r == r.lower() and row.source for row in REASONS for r in row.reasons
    )


def test_texts_of_contents_and_streams():
    assert (
        text_of(None) == ""
        and text_of([{"type": "image_url"}, {"type": "text", "text": None}, 3]) == ""
        and text_of(7) == "7"
    )
    body = play({"messages": [{"content": "x" * 40}], "logprobs": True})
    assert (
        collect(events(body))["choices"][0]["message"]["content"] == body["choices"][0]["message"]["content"]
    )
    assert collect(events(body))["usage"] == body["usage"]
    made: Callable[[str], bytes] = lambda text: f"data: {text}\n\n".encode()  # noqa: E731
    two = made(
        '{"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {"content": "a", '
        '"reasoning_content": "h"}}]}'
    )
    end = made(
        '{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}, {"index": 1, "delta": {}, '
        '"finish_reason": "length"}]}'
    )
    choices = collect(two + end)["choices"]
    assert [(c["message"]["content"], c["finish_reason"]) for c in choices] == [
        ("a", "stop"),
        ("b", "length"),
    ]
    for broken in (two, two + b"data: {", b""):
        with pytest.raises(ValueError, match="broke off") if broken else pytest.raises(ValueError):
            if not collect(broken)["choices"]:
                raise ValueError("nothing")
