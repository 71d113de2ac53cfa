"""What replies cost, as providers say it or as it must be at least; and budgets that stop in time whatever an
endpoint reports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from endpoint import completion, endpoint, play
from hypothesis import given, settings
from hypothesis import strategies as st

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.usage import Usage, cost_in_words
from featureinterp.errors import (
    BudgetReachedError,
    EndpointUnavailableError,
    InputError,
    LanguageModelError,
    MalformedReplyError,
)
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.llm.config import Endpoint, load_config
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.limited import Limited
from featureinterp.llm.metered import LEARNT_AFTER, Meter, Metered
from featureinterp.llm.prices import PRICES, Price
from featureinterp.llm.stack import open_stack
from featureinterp.llm.tally import Tallied, tally
from featureinterp.llm.usage import MAX_TOKENS, checked_usage, reported_usage

SENTENCE = (
    "The feature fires on names of rivers in the north of the country, above all in old travel reports. "
)
"""99 bytes, which are 19 to 21 tokens for the usual tokenizers."""


def reading(usage: Any, seconds: float = 1.0) -> Usage:
    return reported_usage({"choices": [], "usage": usage}, seconds)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, (0, 0, None, 0)),
        ({}, (0, 0, None, 0)),
        ({"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}, (11, 3, None, 0)),
        ({"prompt_tokens": 11.0, "completion_tokens": 3}, (11, 3, None, 0)),
        # Gemini: thoughts are in the total alone; and where a gateway says only how many they were
        ({"prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623}, (20, 603, None, 0)),
        ({"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81}, (21, 60, None, 0)),
        (
            {
                "prompt_tokens": 21,
                "completion_tokens": 4,
                "completion_tokens_details": {"reasoning_tokens": 60},
            },
            (21, 64, None, 0),
        ),
        # OpenAI: thoughts are part of the reply
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 70,
                "total_tokens": 79,
                "completion_tokens_details": {"reasoning_tokens": 64},
            },
            (9, 70, None, 0),
        ),
        ({"completion_tokens": 5, "total_tokens": 25}, (20, 5, None, 0)),
        ({"total_tokens": 25}, (25, 0, None, 0)),
        ({"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 0}, (11, 3, None, 0)),
        # cached tokens: OpenAI, DeepSeek, Moonshot
        (
            {"prompt_tokens": 2000, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1920}},
            (2000, 3, None, 1920),
        ),
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 3,
                "prompt_cache_hit_tokens": 64,
                "prompt_cache_miss_tokens": 36,
            },
            (100, 3, None, 64),
        ),
        ({"prompt_tokens": 100, "completion_tokens": 3, "cached_tokens": 50}, (100, 3, None, 50)),
        (
            {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5000}},
            (10, 3, None, 10),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": None}, (10, 3, None, 0)),
        # a bill of the provider's own: OpenRouter, with a key of the user's at another provider; Perplexity;
        # DeepInfra; xAI
        (
            {
                "prompt_tokens": 194,
                "completion_tokens": 2,
                "cost": 0.95,
                "cost_details": {"upstream_inference_cost": 19},
            },
            (194, 2, 0.95, 0),
        ),
        (
            {
                "prompt_tokens": 194,
                "completion_tokens": 2,
                "cost": 0.05,
                "is_byok": True,
                "cost_details": {"upstream_inference_cost": 1},
            },
            (194, 2, 1.05, 0),
        ),
        (
            {
                "prompt_tokens": 8,
                "completion_tokens": 2,
                "cost": {"input_tokens_cost": 0.1, "total_cost": 0.25},
            },
            (8, 2, 0.25, 0),
        ),
        ({"prompt_tokens": 8, "completion_tokens": 2, "estimated_cost": 2.5e-05}, (8, 2, 2.5e-05, 0)),
        ({"prompt_tokens": 8, "completion_tokens": 2, "cost_in_usd_ticks": 37756000}, (8, 2, 0.0037756, 0)),
        ({"prompt_tokens": 8, "completion_tokens": 2, "cost": 0}, (8, 2, 0.0, 0)),
        ({"prompt_tokens": 8, "completion_tokens": 2, "cost": None}, (8, 2, None, 0)),
    ],
)
def test_what_providers_report(usage: Any, expected: tuple[Any, ...]):
    found = reading(usage)
    assert (
        found.prompt_tokens,
        found.completion_tokens,
        found.cost_usd,
        found.cached_tokens,
    ) == pytest.approx(expected)
    assert found.requests == 1 and found.seconds == 1.0 and found.estimated == 0


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "prompt_tokens",
                "completion_tokens",
                "total_tokens",
                "cost",
                "cost_in_usd_ticks",
                "cached_tokens",
                "x",
            ]
        ),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=3),
            st.lists(st.integers(), max_size=2),
        ),
    )
)
def test_counts_are_possible_or_the_reply_is_malformed(usage: dict[str, Any]):
    try:
        found = reading(usage)
    except MalformedReplyError as error:
        assert "\n" not in str(error) and len(str(error)) < 250
        return
    assert 0 <= found.prompt_tokens <= MAX_TOKENS and 0 <= found.completion_tokens <= MAX_TOKENS
    assert 0 <= found.cached_tokens <= found.prompt_tokens
    assert found.cost_usd is None or 0 <= found.cost_usd <= 1000


def test_cached_tokens_have_their_price():
    usage = Usage(1, 1_000_000, 100_000, 0.0, None, 400_000)
    assert Price(2.0, 8.0, 0.5).of(usage) == pytest.approx(0.6 * 2.0 + 0.4 * 0.5 + 0.8)
    assert Price(2.0, 8.0).of(usage) == pytest.approx(2.8)
    assert all(p.cached_input is not None and p.cached_input < p.input < p.output for p in PRICES.values())
    for wrong in (
        {"input": -1, "output": 1},
        {"input": 1, "output": math.nan},
        {"input": 1, "output": 1, "cached_input": math.inf},
    ):
        with pytest.raises(InputError, match="USD per million"):
            Price(**wrong)


def test_prices_of_the_configuration(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.toml"
    monkeypatch.setenv("FEATUREINTERP_CONFIG", str(path))
    path.write_text('[prices."m"]\ninput = 1\noutput = 2\ncached_input = 0.1\n')
    assert load_config().price(Endpoint("http://x/v1", "m")) == Price(1, 2, 0.1)
    for wrong in ("cached = 1", "output = -2", "cached_input = 'free'"):
        path.write_text(
            f'[prices."m"]\ninput = 1\n{"" if wrong.startswith("output") else "output = 2"}\n{wrong}\n'
        )
        with pytest.raises(InputError, match=r"prices|USD per million"):
            load_config()


def asking(text: str = SENTENCE * 10, **fields: Any) -> Request:
    return Request((Message("user", text),), **fields)


def told(text: str, usage: Usage, *, cut: bool = False) -> Reply:
    return Reply((text,), (cut,), usage)


def test_counts_that_can_be_true_are_taken_as_they_are():
    for usage in (Usage(1, 200, 20), Usage(1, 90, 6), Usage(1, 5_000, 20), Usage(1, 200, 5_000)):
        assert checked_usage(asking(), told(SENTENCE, usage)) == usage
    assert checked_usage(Request(prompt=(1,) * 50, read_at=(3,)), told("", Usage(1, 50, 1))).estimated == 0


@pytest.mark.parametrize("usage", [Usage(1), Usage(1, 1, 1), Usage(1, 0, 3), Usage(1, 30, 0)])
def test_counts_that_are_missing_or_too_low_are_estimated_and_said_to_be(usage: Usage):
    found = checked_usage(asking(), told(SENTENCE, usage))
    assert found.estimated == 1 and found.requests == 1
    assert 200 <= found.prompt_tokens <= 350 and 19 <= found.completion_tokens <= 40


def test_estimates_of_other_kinds():
    counted = checked_usage(asking(), told(SENTENCE, Usage(1)), lambda text: len(text.split()))
    assert (counted.prompt_tokens, counted.completion_tokens) == (194, 19)
    assert checked_usage(asking(max_tokens=300), told("cut", Usage(1), cut=True)).completion_tokens == 300
    assert checked_usage(Request(prompt=(1,) * 50, read_at=(3,)), told("", Usage(1))).prompt_tokens == 50
    assert checked_usage(asking("語" * 300), told("語" * 30, Usage(1))).prompt_tokens >= 300


def test_the_bill_of_the_provider_counts_unless_it_is_next_to_nothing():
    def cost(own: float | None, price: Price | None = Price(1.0, 1.0)) -> float | None:
        model = FunctionModel(lambda _: told(SENTENCE, Usage(1, 200, 20, 0.0, own)))
        return anyio.run(Metered(model, price=price).complete, asking()).usage.cost_usd

    assert cost(None) == pytest.approx(220e-6) and cost(500e-6) == 500e-6 and cost(50e-6) == 50e-6
    assert cost(0.0) == pytest.approx(220e-6) and cost(1e-9) == pytest.approx(220e-6)
    assert cost(None, None) is None and cost(0.25, None) == 0.25


def test_without_a_price_the_dearest_bill_so_far_is_the_measure_of_what_comes_without_one():
    """Bills of 1 and 3 millionths a token, then a reply without a bill, then one that cannot be read."""
    replies = iter(
        [
            told(SENTENCE, Usage(1, 200, 20, 0.0, 220e-6)),
            told(SENTENCE, Usage(1, 200, 20, 0.0, 660e-6)),
            told(SENTENCE, Usage(1, 200, 20, 0.0, None)),
        ]
    )

    async def go() -> list[Usage]:
        meter = Meter()
        model = Metered(FunctionModel(lambda _: next(replies)), meter)
        assert model.expected(asking(max_tokens=100)).cost_usd is None
        used = [(await model.complete(asking(max_tokens=100))).usage for _ in range(3)]
        expected = model.expected(asking(max_tokens=100))
        assert expected.cost_usd == pytest.approx(3e-6 * expected.tokens)
        return [*used, meter.usage]

    *each, total = anyio.run(go)
    assert [u.cost_usd for u in each] == pytest.approx([220e-6, 660e-6, 660e-6]) and [
        u.estimated for u in each
    ] == [0, 0, 1]
    assert total.cost_usd == pytest.approx(1540e-6) and total.estimated == 1


def test_the_check_of_an_endpoint_is_on_the_bill():
    async def go(url: str) -> Usage:
        meter = Meter()
        async with open_stack(Endpoint(url, "m"), meter, price=Price(1.0, 1.0)) as stack:
            assert (await stack.check()) is not None
        return meter.usage

    with endpoint(play) as server:
        used = anyio.run(go, server.url)
    assert (
        used.requests == len(server.ledger) == 1
        and used.tokens == server.ledger[0].tokens
        and used.cost_usd == pytest.approx(used.tokens * 1e-6)
    )


def test_a_reply_that_cannot_be_read_counts_all_the_same():
    errors: list[LanguageModelError] = []

    class Model:
        name = "m"

        async def complete(self, request: Request) -> Reply:
            raise errors[-1]

    async def spent() -> tuple[Usage, Usage]:
        meter = Meter()
        with tally() as counted, pytest.raises(LanguageModelError):
            await Tallied(Metered(Model(), meter, price=Price(1.0, 2.0))).complete(asking(max_tokens=100))
        assert meter.in_flight == 0 and meter.reserved == Usage()
        return meter.usage, counted.usage

    errors.append(EndpointUnavailableError("down"))
    assert anyio.run(spent) == (Usage(), Usage())
    errors.append(MalformedReplyError("nonsense"))
    meter, counted = anyio.run(spent)
    assert meter == counted and meter.estimated == 1 and meter.completion_tokens == 100
    assert meter.cost_usd == pytest.approx((meter.prompt_tokens + 200) * 1e-6)
    errors[-1].usage = Usage(1, 30, 5, 0.0, None)
    meter, counted = anyio.run(spent)
    assert meter == counted == Usage(1, 30, 5, 0.0, pytest.approx(40e-6))


def test_a_request_that_ran_out_of_time_counts_as_it_was_expected_to():
    async def go(url: str) -> Usage:
        meter = Meter()
        async with open_stack(
            Endpoint(url, "m", timeout_s=0.2, max_attempts=1), meter, price=Price(1.0, 1.0)
        ) as stack:
            with pytest.raises(EndpointUnavailableError, match="--timeout-s"):
                await stack.limited.complete(asking(max_tokens=100))
        return meter.usage

    with endpoint(latency_s=1.0) as server:
        used = anyio.run(go, server.url)
    assert (
        used.requests == used.estimated == 1
        and used.completion_tokens == 100
        and 200 <= used.prompt_tokens <= 350
    )


def test_tokens_are_counted_by_the_tokenizer_that_the_endpoint_names():
    class Words:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[str]:
            assert not add_special_tokens
            return text.split()

    def answer(body: dict[str, Any]) -> Any:
        return {k: v for k, v in completion("three words here").items() if k != "usage"}

    async def go(url: str, named: str | None) -> Usage:
        meter = Meter()
        async with open_stack(
            Endpoint(url, "m", tokenizer=named), meter, price=Price(1.0, 1.0), tokenizer=lambda _: Words()
        ) as stack:
            await stack.limited.complete(asking("one two"))
        return meter.usage

    with endpoint(answer) as server:
        counted, guessed = anyio.run(go, server.url, "words"), anyio.run(go, server.url, None)
    assert (counted.prompt_tokens, counted.completion_tokens, counted.estimated) == (4 + 2, 3, 1)
    assert (guessed.prompt_tokens, guessed.completion_tokens, guessed.estimated) == (4 + 3, 6, 1)


class Slow:
    """A model whose replies all come at once when nobody has anything else to do; ``size`` says how many
    tokens each has.
    """

    name = "m"

    def __init__(self, size: Callable[[int], int]) -> None:
        self.size, self.sent, self.most = size, 0, 0
        self.spent: list[int] = []
        self._now = 0

    async def complete(self, request: Request) -> Reply:
        self.sent, self._now = self.sent + 1, self._now + 1
        self.most = max(self.most, self._now)
        number = self.sent
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        self._now -= 1
        usage = Usage(1, 100, self.size(number))
        self.spent.append(usage.tokens)
        return Reply(("x",), (False,), usage)


async def run_out(model: Any, budget: Budget, concurrency: int, n: int, **fields: Any) -> tuple[Meter, int]:
    """Sends ``n`` requests within a budget; says what was metered and how many were not sent."""
    meter = Meter()
    guard = Guard(budget, lambda: meter.usage)
    meter.before, meter.fits = guard.before, guard.fits
    limited = Limited(Metered(model, meter, price=Price(1.0, 1.0)), concurrency)
    stopped = 0

    async def one() -> None:
        nonlocal stopped
        try:
            await limited.complete(asking("x" * 300, **fields))
        except BudgetReachedError:
            stopped += 1

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for _ in range(n):
                group.start_soon(one)
    return meter, stopped


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(300, 8_000), st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_what_is_in_flight_is_reserved(concurrency: int, tokens: int, sizes: list[int]):
    model = Slow(lambda i: sizes[i % len(sizes)])
    meter, stopped = anyio.run(
        lambda: run_out(model, Budget(tokens=tokens), concurrency, 100, max_tokens=200)
    )
    spent = sum(model.spent)
    assert meter.usage.tokens == spent and meter.in_flight == 0 and meter.reserved == Usage()
    assert stopped + model.sent == 100
    if stopped:
        assert tokens <= spent < tokens + 300 * min(concurrency, model.most)
        if len(set(sizes)) == 1 or max(sizes) == 200 or model.sent < LEARNT_AFTER:
            assert spent <= tokens + 300


def test_reserving_lets_as_many_run_as_the_budget_holds():
    model = Slow(lambda _: 100)
    anyio.run(lambda: run_out(model, Budget(tokens=10**9), 16, 64, max_tokens=200))
    assert model.most == 16
    model = Slow(lambda _: 100)
    meter, stopped = anyio.run(lambda: run_out(model, Budget(usd=0.05), 256, 500, max_tokens=512))
    assert stopped > 0 and 0.05 <= meter.usage.cost_usd <= 0.05 + 200e-6  # each reply costs 200 millionths


def test_a_budget_in_usd_needs_a_cost():
    guard = Guard(Budget(usd=1.0), lambda: Usage(1, 5, 5, 0.0, None))
    with pytest.raises(BudgetReachedError, match="not known"):
        guard.before()


def test_what_something_cost_in_words():
    assert cost_in_words(None) == cost_in_words(None, 2, about=True) == "at a price that is not known"
    assert (
        cost_in_words(0.1236) == "for $0.1236"
        and cost_in_words(1.5, 2, about=True) == "for about $1.50"
        and cost_in_words(0.0, 6) == "for $0.000000"
    )


def test_a_sum_with_estimates_says_so():
    for budget in (Budget(usd=1.0), Budget(tokens=10)):
        with pytest.raises(BudgetReachedError, match="an estimate: 2 of 3 requests"):
            Guard(budget, lambda: Usage(3, 50, 50, 0.0, 1.5, 0, 2)).before()
        with pytest.raises(BudgetReachedError) as error:
            Guard(budget, lambda: Usage(3, 50, 50, 0.0, 1.5)).before()
        assert "estimate" not in str(error.value)


def dialect(name: str, billed: list[int]) -> Callable[[dict[str, Any]], Any]:
    """An endpoint that bills each reply as the usual one, and reports it as ``name`` says."""

    def answer(body: dict[str, Any]) -> Any:
        whole = completion(
            SENTENCE * 2, prompt_tokens=len(json.dumps(body["messages"])) // 4, completion_tokens=40
        )
        true = whole["usage"]
        billed.append(true["total_tokens"])
        if name == "absent":
            del whole["usage"]
        elif name == "null":
            whole["usage"] = {"prompt_tokens": None, "completion_tokens": None}
        elif name == "zeros":
            whole["usage"] = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        elif name == "too low":
            whole["usage"] = {"prompt_tokens": 1, "completion_tokens": 1}
        elif name == "half" and len(billed) % 2:
            del whole["usage"]
        elif name == "only the prompt":
            whole["usage"] = {"prompt_tokens": true["prompt_tokens"]}
        elif name == "only the total":
            whole["usage"] = {"total_tokens": true["total_tokens"]}
        elif name == "thoughts":
            whole["usage"] = {**true, "total_tokens": true["total_tokens"] + 360}
            billed[-1] += 360
        elif name == "impossible":
            whole["usage"] = {"prompt_tokens": -(2**63), "completion_tokens": 5}
        elif name == "no choice":
            whole["choices"] = []
        return whole

    return answer


NAMES = (
    "true",
    "absent",
    "null",
    "zeros",
    "too low",
    "half",
    "only the prompt",
    "only the total",
    "thoughts",
    "impossible",
    "no choice",
    "late",
)


@pytest.mark.parametrize("name", NAMES)
def test_spending_stops_in_time_whatever_is_reported(name: str):
    billed: list[int] = []
    slots, limit = 8, 0.0065

    async def go(url: str) -> tuple[Meter, int]:
        meter = Meter()
        guard = Guard(Budget(usd=limit), lambda: meter.usage)
        meter.before, meter.fits = guard.before, guard.fits
        async with open_stack(
            Endpoint(url, "m", concurrency=slots, max_attempts=1), meter, price=Price(1.0, 1.0)
        ) as stack:
            stopped = 0

            async def one(number: int) -> None:
                nonlocal stopped
                try:
                    await stack.limited.complete(asking(f"{number} {SENTENCE * 5}", max_tokens=400))
                except BudgetReachedError:
                    stopped += 1
                except LanguageModelError:
                    pass

            async with anyio.create_task_group() as group:
                for number in range(120):
                    group.start_soon(one, number)
            return meter, stopped

    with endpoint(dialect(name, billed), latency_s=0.2 if name == "late" else 0.0) as server:
        meter, stopped = anyio.run(go, server.url)
    spent = sum(billed) / 1e6
    assert stopped > 0
    assert spent <= limit + slots * max(billed) / 1e6
    if name in ("true", "late", "thoughts", "no choice"):
        assert spent >= limit and meter.usage.cost_usd == pytest.approx(spent) and not meter.usage.estimated
    else:
        assert meter.usage.estimated and meter.usage.cost_usd >= limit and spent > limit / 8


def test_the_played_endpoint_is_metered_as_it_bills():
    async def go(url: str) -> Usage:
        meter = Meter()
        async with open_stack(Endpoint(url, "m"), meter, price=Price(1.0, 1.0)) as stack:
            await stack.limited.complete(asking())
        return meter.usage

    with endpoint(play) as server:
        used = anyio.run(go, server.url)
    assert used.tokens == server.ledger[0].tokens and used.estimated == 0
