"""Everything around the adapter: limits per minute, the cache, what is learnt from refusals, prices, prompts
that are read, the probe.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from endpoint import KEY, completion, endpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    BudgetReachedError,
    EndpointRefusedError,
    EndpointUnavailableError,
    InputError,
    MalformedReplyError,
    RequestRefusedError,
    StorageError,
    UnknownNameError,
)
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.config import Endpoint, load_config
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.limited import Limited, Limits
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.openai import OpenAIModel
from featureinterp.llm.prices import Price, price_of
from featureinterp.llm.probe import probe, recall
from featureinterp.llm.retrying import Retrying
from featureinterp.llm.stack import open_stack
from featureinterp.llm.tally import Tallied, count, tally
from featureinterp.tasks import each

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def asking(text: str = "hi", **fields: Any) -> Request:
    return Request((Message("user", text),), **fields)


class Clock:
    """A time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await anyio.lowlevel.checkpoint()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 40),
    st.lists(st.floats(0, 30), min_size=1, max_size=40),
)
def test_no_minute_sees_more_requests_than_allowed(
    rpm: int, concurrency: int, n: int, durations: list[float]
):
    clock, sent = Clock(), []

    class Model:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            sent.append(clock.now)
            clock.now += durations[len(sent) % len(durations)]
            return Reply(("x",), (False,), Usage(1, 1, 1))

    limited = Limited(Model(), Limits(concurrency, rpm=rpm, clock=clock, sleep=clock.sleep))
    anyio.run(each, limited.complete, [asking()] * n)
    assert len(sent) == n
    assert all(sum(start <= t < start + 60 for t in sent) <= rpm for start in sent)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 50)), min_size=1, max_size=30),
    st.integers(600, 2000),
)
def test_no_minute_sees_more_tokens_than_allowed(sizes: list[tuple[int, int]], tpm: int):
    clock, sent = Clock(), []

    class Model:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            text = request.messages[0].content
            used = Usage(1, (len(text) + 16) // 4, request.max_tokens // 2)
            sent.append((clock.now, used.prompt_tokens + used.completion_tokens))
            return Reply(("x",), (False,), used)

    limited = Limited(Model(), Limits(3, tpm=tpm, clock=clock, sleep=clock.sleep))
    anyio.run(each, limited.complete, [asking("x" * size, max_tokens=most) for size, most in sizes])
    assert all(sum(n for t, n in sent if start <= t < start + 60) <= tpm for start, _ in sent)


def test_limits_that_make_no_sense():
    for wrong in ({"concurrency": 0}, {"concurrency": 1, "rpm": 0}, {"concurrency": 1, "tpm": -1}):
        with pytest.raises(InputError):
            Limits(**wrong)
    with pytest.raises(InputError, match="--tpm"):
        anyio.run(Limited(FunctionModel(lambda _: "x"), Limits(1, tpm=10)).complete, asking(max_tokens=50))


def test_room_for_thoughts_counts_towards_the_minute():
    """Providers reserve all that a reply may have, whatever it needs in the end."""
    clock, sent = Clock(), []

    class Model:
        name = "m"

        def room(self, request: Request) -> int:
            return request.max_tokens + 500

        async def complete(self, request: Request) -> Reply:
            sent.append(clock.now)
            return Reply(("x",), (False,), Usage(1, 20, 510))

    limited = Limited(Metered(Model()), Limits(8, tpm=1200, clock=clock, sleep=clock.sleep))
    anyio.run(each, limited.complete, [asking(f"question {i}", max_tokens=10) for i in range(6)])
    assert len(sent) == 6 and max(sum(start <= t < start + 60 for t in sent) for start in sent) == 2
    with pytest.raises(InputError, match=r"lower --thinking-tokens"):
        anyio.run(Limited(Metered(Model()), Limits(1, tpm=300)).complete, asking(max_tokens=10))


def test_a_rate_is_used_up_before_anybody_waits():
    clock = Clock()
    limited = Limited(FunctionModel(lambda _: "x"), Limits(4, rpm=10, clock=clock, sleep=clock.sleep))
    anyio.run(each, limited.complete, [asking()] * 10)
    assert clock.now == 0
    anyio.run(each, limited.complete, [asking()] * 10)
    assert 60 <= clock.now <= 62


def cached(model: Any, path: Path, **options: Any) -> Cached:
    return Cached(model, ReplyStore(path), **options)


def test_what_was_answered_is_not_asked_again(tmp_path: Path):
    reply = Reply(
        ("é\n",), (True,), Usage(1, 5, 2, 0.5, 0.25), ({"a": -0.5, "b": -math.inf},), ({"c": -1.0},)
    )
    model = FunctionModel(lambda _: reply)
    assert anyio.run(cached(model, tmp_path / "r.sqlite").complete, asking()) == reply
    assert anyio.run(cached(model, tmp_path / "r.sqlite").complete, asking()) == reply
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 3},
        {"temperature": 0.5},
        {"seed": 1},
        {"n": 2},
        {"schema": SCHEMA},
        {"top_logprobs": 1},
        {"stop": ("x",)},
        {"prompt": (1,)},
        {"read_at": (0,)},
        {"messages": (Message("system", "hi"),)},
    ],
)
def test_everything_that_can_change_an_answer_is_in_the_key(change: dict[str, Any], tmp_path: Path):
    one = cached(FunctionModel(lambda _: "x"), tmp_path / "r.sqlite", identity="a")
    assert one.key(asking()) == one.key(asking(check=len))
    assert one.key(asking()) != one.key(Request(**({"messages": asking().messages} | change)))
    assert one.key(asking()) != cached(FunctionModel(lambda _: "x"), tmp_path / "r.sqlite", identity="b").key(
        asking()
    )
    assert one.key(asking()) != cached(
        FunctionModel(lambda _: "x", "other"), tmp_path / "r.sqlite", identity="a"
    ).key(asking())


def test_equal_requests_at_once_are_one(tmp_path: Path):
    class Slow(FunctionModel):
        async def complete(self, request: Request) -> Reply:
            self.requests.append(request)
            await anyio.sleep(0.02)
            return Reply(("x",), (False,), Usage(1))

    model = Slow(lambda _: "x")
    wrapped = cached(model, tmp_path / "r.sqlite")
    assert len(anyio.run(each, wrapped.complete, [asking()] * 20)) == 20 and len(model.requests) == 1


def test_who_waits_for_a_request_that_is_cancelled_asks_anew(tmp_path: Path):
    class Slow(FunctionModel):
        async def complete(self, request: Request) -> Reply:
            self.requests.append(request)
            if len(self.requests) == 1:
                await anyio.sleep_forever()
            return Reply(("x",), (False,), Usage(1))

    model = Slow(lambda _: "x")

    async def go() -> list[Reply]:
        wrapped, answers, first = cached(model, tmp_path / "r.sqlite"), [], anyio.CancelScope()

        async def ask(scope: anyio.CancelScope) -> None:
            with scope:
                answers.append(await wrapped.complete(asking()))

        async with anyio.create_task_group() as group:
            group.start_soon(ask, first)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(ask, anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
            first.cancel()
        return answers

    assert [r.text for r in anyio.run(go)] == ["x"] and len(model.requests) == 2


def test_a_reply_that_is_no_answer_settles_what_would_be_answered_the_same_and_is_asked_for_again_on_request(
    tmp_path: Path,
):
    def check(reply: Reply) -> None:
        if reply.text != "good":
            raise MalformedReplyError("bad")

    def answers(request: Request, *texts: str, times: int = 3, **options: Any) -> list[str]:
        given = iter(texts)
        wrapped = cached(FunctionModel(lambda _: next(given)), tmp_path / "r.sqlite", **options)
        return [anyio.run(wrapped.complete, request).text for _ in range(times)]

    for request in (asking(check=check), asking(check=check, temperature=0.5, seed=3)):
        assert answers(request, "bad", "good") == ["bad", "bad", "bad"]
        assert answers(request, "unused") == ["bad", "bad", "bad"]
        assert answers(request, "worse", "good", retry_failed=True) == ["worse", "worse", "worse"], (
            "once in a run"
        )
        assert answers(request, "good", "other", retry_failed=True) == ["good", "good", "good"]
        assert answers(request, "unused", retry_failed=True) == ["good", "good", "good"]
    assert answers(asking(check=check, temperature=0.5), "bad", "good") == ["bad", "good", "good"]


def test_an_error_reaches_everybody_who_waited_and_is_not_kept(tmp_path: Path):
    class Down(FunctionModel):
        async def complete(self, request: Request) -> Reply:
            self.requests.append(request)
            await anyio.sleep(0.01)
            raise EndpointUnavailableError("down")

    model = Down(lambda _: "x")
    wrapped = cached(model, tmp_path / "r.sqlite")
    with pytest.raises(EndpointUnavailableError):
        anyio.run(each, wrapped.complete, [asking()] * 5)
    assert len(model.requests) == 1
    with pytest.raises(EndpointUnavailableError):
        anyio.run(wrapped.complete, asking())
    assert len(model.requests) == 2


def test_who_waits_for_what_is_asked_once_more_gets_the_new_reply(tmp_path: Path):
    def check(reply: Reply) -> None:
        if reply.text != "good":
            raise MalformedReplyError("bad")

    class Slow(FunctionModel):
        async def complete(self, request: Request) -> Reply:
            await anyio.lowlevel.checkpoint()
            return await super().complete(request)

    request, path = asking(check=check), tmp_path / "r.sqlite"
    assert anyio.run(cached(FunctionModel(lambda _: "bad"), path).complete, request).text == "bad"
    model = Slow(lambda _: "good")
    found = anyio.run(each, cached(model, path, retry_failed=True).complete, [request] * 5)
    assert [reply.text for reply in found] == ["good"] * 5 and len(model.requests) == 1


def test_a_store_of_replies_that_is_none(tmp_path: Path):
    (tmp_path / "r.sqlite").write_bytes(b"no database" * 200)
    with pytest.raises(StorageError, match="cannot be opened"):
        ReplyStore(tmp_path / "r.sqlite")


def serve(answer: Any, *requests: Request) -> tuple[list[Reply], list[dict[str, Any]], OpenAIModel]:
    async def go(url: str) -> tuple[list[Reply], OpenAIModel]:
        model = OpenAIModel(url, "m", api_key_env=None)
        try:
            return [await model.complete(r) for r in requests], model
        finally:
            await model.aclose()

    with endpoint(answer) as server:
        replies, model = anyio.run(go, server.url)
    return replies, [e.body for e in server.ledger], model


def test_a_form_of_reply_that_is_refused_gives_way_to_a_looser_one_once():
    def answer(body: dict[str, Any]) -> Any:
        if body.get("response_format", {}).get("type") in ("json_schema", "json_object"):
            return 400, {}, {"error": {"message": "Unsupported value", "param": "response_format"}}
        return '{"a": "x"}'

    _, bodies, model = serve(answer, asking(schema=SCHEMA), asking("again", schema=SCHEMA))
    assert [b.get("response_format", {}).get("type") for b in bodies] == [
        "json_schema",
        "json_object",
        None,
        None,
    ]
    assert model.accepts.reply_form == "text"


@pytest.mark.parametrize(
    ("field", "message", "fields"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", {}),
        ("temperature", "'temperature' does not support 0.0 with this model", {}),
        ("seed", "seed is not supported", {"seed": 3}),
        ("logprobs", "logprobs are not available", {"top_logprobs": 4}),
        ("n", "Only n = 1 is supported", {"n": 3}),
    ],
)
def test_a_parameter_that_is_refused_is_left_out_from_then_on(
    field: str, message: str, fields: dict[str, Any]
):
    replies, bodies, _ = serve(
        lambda b: (400, {}, {"error": {"message": message}}) if field in b else "fine",
        asking(**fields),
        asking("more", **fields),
    )
    assert [r.text for r in replies] == ["fine", "fine"] and [field in b for b in bodies] == [
        True,
        False,
        False,
    ]
    assert field != "max_tokens" or bodies[-1]["max_completion_tokens"] == 512


def test_bodies_that_are_no_completion_are_errors_of_ours():
    for body in (
        b"<html>hello</html>",
        b'"text"',
        b"[]",
        b'{"choices": [{"message": 3}]}',
        b'{"choices": 5}',
        b"",
    ):
        with pytest.raises((MalformedReplyError, EndpointUnavailableError, EndpointRefusedError)):
            serve(lambda _, body=body: (200, {}, body), asking())


def test_half_a_character_that_an_endpoint_sends_stops_no_job(tmp_path: Path):
    words = "half \ud83d of one"
    said = completion(words, logprobs={words: -0.1})
    pieces = "".join(
        f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': half}}]})}\n\n"
        for half in ("\ud83d", "\ude00")
    )
    stream = (200, {"content-type": "text/event-stream"}, (pieces + "data: [DONE]\n\n").encode())
    (whole, cut), _, _ = serve(
        lambda body: stream if "stream" in str(body) else said,
        asking("stream"),
        asking("one", top_logprobs=2),
    )
    assert whole.text == "😀" and cut.text == "half \ufffd of one" and cut.first_token[0] == {cut.text: -0.1}
    ReplyStore(tmp_path / "r.sqlite").put("key", "m", cut)
    with pytest.raises(RequestRefusedError, match="half \ufffd of one"):
        serve(lambda _: (400, {}, {"error": {"message": words}}), asking())


def test_a_slow_drip_is_bounded_by_the_timeout():
    async def go(url: str) -> None:
        model = OpenAIModel(url, "m", api_key_env=None, timeout_s=0.3)
        try:
            await model.complete(asking())
        finally:
            await model.aclose()

    with endpoint(faults={"drip": 1.0}) as server, pytest.raises(EndpointUnavailableError, match="0.3 s"):
        anyio.run(go, server.url)


def test_a_key_that_the_endpoint_quotes_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_KEY", KEY)

    async def go(url: str) -> None:
        model = OpenAIModel(url, "m", api_key_env="TEST_KEY")
        try:
            await model.complete(asking())
        finally:
            await model.aclose()

    with (
        endpoint(lambda _: (400, {}, {"error": {"message": f"the key {KEY} may not"}})) as server,
        pytest.raises(Exception, match=r"the key \*\*\*") as e,
    ):
        anyio.run(go, server.url)
    assert KEY not in str(e.value) and KEY not in repr(vars(e.value))


PROMPT = Request(prompt=(5, 6, 7), read_at=(1, 2), top_logprobs=3)


def read_answer(way: str) -> Any:
    def answer(body: dict[str, Any]) -> Any:
        usage = {"prompt_tokens": len(body.get("prompt", ())), "completion_tokens": 1}
        base = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "usage": usage}
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if "messages" in body:
            return completion('{"colour": "red"}', logprobs={"x": -0.1} if body.get("logprobs") else None)
        if way == "prompt_logprobs" and "prompt_logprobs" in body:
            entry = {
                "17": {"logprob": -0.5, "rank": 1, "decoded_token": "3"},
                "18": {"logprob": -1.5, "rank": 2, "decoded_token": "4"},
            }
            choice["prompt_logprobs"] = [None] + [entry] * (len(body["prompt"]) - 1)
        if way == "echo" and body.get("echo"):
            n = len(body["prompt"])
            choice["logprobs"] = {
                "tokens": ["t"] * n,
                "token_logprobs": [None] + [-1.0] * (n - 1),
                "text_offset": list(range(n)),
            }
            choice["logprobs"]["top_logprobs"] = [None] + [{"3": -0.5, "4": -1.5}] * (n - 1)
        elif "echo" in body or way == "none":
            return 400, {}, {"error": {"message": "echo is not supported"}}
        return base | {"choices": [choice]}

    return answer


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_a_prompt_is_read_in_either_way(way: str):
    replies, bodies, model = serve(read_answer(way), PROMPT, PROMPT)
    assert all(r.read == ({"3": -0.5, "4": -1.5},) * 2 and r.usage.prompt_tokens == 3 for r in replies)
    assert model.accepts.prompt_logprobs == way and len(bodies) == (2 if way == "prompt_logprobs" else 3)
    assert all(b["prompt"] == [5, 6, 7] and b["max_tokens"] == 1 for b in bodies)


def test_an_endpoint_that_cannot_read_prompts_says_which_can():
    with pytest.raises(EndpointRefusedError, match=r"vLLM.*rated"):
        serve(read_answer("none"), PROMPT)


def test_the_probe_finds_what_an_endpoint_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    with endpoint(read_answer("echo")) as server:
        there = Endpoint(server.url, "m", None)
        found = anyio.run(probe, there, Price(1, 10))
    assert (found.reply_form, found.follows, found.logprobs, found.choices) == (
        "json_schema",
        True,
        True,
        False,
    )
    assert found.prompt_logprobs == "echo" and found.order_matters is False
    assert found.usage.cost_usd == pytest.approx(
        (found.usage.prompt_tokens + 10 * found.usage.completion_tokens) / 1e6
    )
    assert recall(there) == found and recall(Endpoint(server.url, "other", None)) is None
    assert dict(found.lines())["prompt logprobs"] == "yes (echo)"


def test_metering_prices_and_stops_what_was_refused():
    calls = 0

    class Model:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise EndpointRefusedError("wrong key")
            return Reply(("x",), (False,), Usage(1, 1000, 100, 0.0, None))

    meter = Meter()
    metered = Metered(Model(), meter, price=Price(2.0, 10.0))
    reply = anyio.run(metered.complete, asking())
    assert reply.usage.cost_usd == pytest.approx(0.003) and meter.usage == reply.usage
    with pytest.raises(EndpointRefusedError):
        anyio.run(each, metered.complete, [asking()] * 9)
    assert calls == 3 and meter.in_flight == 0


def test_prices():
    assert (
        price_of("openai/gpt-4o-mini") == price_of("gpt-4o-mini") == Price(0.15, 0.6, 0.075)
        and price_of("mine") is None
    )


def test_a_backoff_holds_no_slot():
    order: list[str] = []

    async def sleep(_: float) -> None:
        order.append("backoff")
        await done.wait()

    class Model:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            text = request.messages[0].content
            order.append(text)
            if text == "first" and order.count("first") == 1:
                raise EndpointUnavailableError("busy")
            return Reply((text,), (False,), Usage(1))

    async def go() -> None:
        nonlocal done
        done = anyio.Event()
        model = Retrying(Limited(Model(), 1), sleep=sleep)
        async with anyio.create_task_group() as group:
            group.start_soon(model.complete, asking("first"))
            await anyio.wait_all_tasks_blocked()
            await model.complete(asking("second"))
            done.set()

    done: anyio.Event
    anyio.run(go)
    assert order == ["first", "backoff", "second", "first"]


def test_budgets():
    used, now = Usage(), [0.0]
    guard = Guard(Budget(1.0, 100, 2.0), lambda: used, clock=lambda: now[0])
    guard.before()
    used = Usage(1, 50, 49, 0.0, 0.99)
    guard.before()
    for spent, later, word in (
        (Usage(1, 0, 0, 0.0, 1.0), 0.0, "\\$1"),
        (Usage(1, 60, 40), 0.0, "100 tokens"),
        (Usage(), 120.0, "2 minutes"),
    ):
        used, now[0] = spent, later
        with pytest.raises(BudgetReachedError, match=word):
            guard.before()
    with pytest.raises(InputError):
        Budget(usd=0)


def test_the_tally_counts_what_the_tasks_of_a_block_asked():
    model = Tallied(FunctionModel(lambda _: Reply(("x",), (False,), Usage(1, 2, 3))))

    async def go() -> list[int]:
        async def one(n: int) -> int:
            with tally() as spent:
                await each(model.complete, [asking()] * n)
            return spent.usage.requests

        await model.complete(asking())
        with tally() as outer:
            found = await each(one, [1, 5, 3])
            count(Usage(2))
        return [*found, outer.usage.requests]

    assert anyio.run(go) == [1, 5, 3, 11]


def test_the_whole_stack_over_http(tmp_path: Path):
    async def go(url: str) -> tuple[Meter, Reply, Reply]:
        meter = Meter()
        async with open_stack(Endpoint(url, "m", None, concurrency=4), meter, price=Price(1, 1)) as stack:
            await stack.check()
            model = stack.model(ReplyStore(tmp_path / "r.sqlite"))
            return (
                meter,
                await model.complete(asking(schema=SCHEMA)),
                await model.complete(asking(schema=SCHEMA)),
            )

    with endpoint() as server:
        meter, one, two = anyio.run(go, server.url)
    assert one == two and json.loads(one.text)["a"] and len(server.ledger) == 2 and meter.usage.requests == 2


CONFIG = """
[endpoints.fast]
base_url = "http://localhost:1/v1"
model = "a/b"
[endpoints.dear]
base_url = "https://x/v1"
model = "c"
price = { input = 3, output = 4 }
[prices."a/b"]
input = 1
output = 2
"""


def test_the_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.toml"
    monkeypatch.setenv("FEATUREINTERP_CONFIG", str(path))
    assert load_config().endpoints == {}
    with pytest.raises(UnknownNameError, match=r"endpoints\.fast"):
        load_config().endpoint("fast")
    path.write_text(CONFIG)
    config = load_config()
    assert config.price(config.endpoint("fast")) == Price(1, 2) and config.price(
        config.endpoint("dear")
    ) == Price(3, 4)
    assert (
        config.price(Endpoint()) == Price(0, 0)
        and config.price(Endpoint("http://x/v1", "unheard-of")) is None
    )
    for text, words in (
        ("[endpoints.a]\nbase_ur = 1", "base_ur"),
        ("x", "cannot be read"),
        ("[endpoints.a]\nconcurrency = 'x'", "concurrency"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            load_config()
