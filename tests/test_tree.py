"""Tree search: what it asks, what steers it, what chooses the answer, and what it never sees."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.score import Agreement, Simulation
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, InputError, MalformedReplyError, RequestRefusedError
from featureinterp.explainers.styles import RulesStyle, SentenceStyle
from featureinterp.explainers.tree import Tree, TreeSettings, _rescaling, worst
from featureinterp.llm.function import FunctionModel
from featureinterp.scorers.correlation import agreement
from featureinterp.simulators.lexical import Lexical

WORDS = [" May", " wind", " tide", " sail", " rope", " mast"]


def window(row: int, fires_on: str | None, words: Sequence[str]) -> Window:
    return Window(
        row,
        row,
        np.arange(len(words)),
        tuple(words),
        np.array([10.0 * (w == fires_on) for w in words], np.float32),
    )


def record(train: str = " May", valid: str = " May", test: str = " May") -> FeatureRecord:
    """A feature that fires on one word per split; its windows hold all words, and those of the test split a
    secret.
    """
    rng = np.random.default_rng(0)

    def windows(start: int, fires_on: str, extra: tuple[str, ...] = ()) -> dict[Any, tuple[Window, ...]]:
        def some(row: int) -> list[str]:
            return [WORDS[i] for i in rng.permutation(len(WORDS))] + list(extra)

        top = tuple(window(start + i, fires_on, some(i)) for i in range(4))
        negative = tuple(
            window(start + 10 + i, None, [w for w in some(i) if w != fires_on]) for i in range(4)
        )
        return {"top": top, "random_negative": negative}

    splits: dict[Any, Any] = {
        "train": windows(100, train),
        "valid": windows(200, valid),
        "test": windows(300, test, (" secret",)),
    }
    return FeatureRecord(FeatureId("s", 7), 10.0, 0.01, 20, splits)


class Watched:
    """The lexical simulator, remembering what it was given."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.texts: list[str] = []

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        self.rows.append([w.row for w in windows])
        self.texts.append(explanation.text)
        return await Lexical().simulate(explanation, windows)


def rules(*words: str, improvement: str | None = None) -> str:
    found: dict[str, Any] = {} if improvement is None else {"improvement": improvement}
    return json.dumps(found | {"rules": [{"activates_on": f'the word "{w}"', "strength": 5} for w in words]})


def improving(request: Request) -> bool:
    return "improvement" in (request.schema or {})["properties"]


def several(request: Request, *texts: str) -> Reply:
    """As many replies as are asked for, the last one again and again."""
    found = (*texts, *(texts[-1:] * request.n))[: request.n]
    return Reply(found, (False,) * len(found), Usage(1, 100, 10 * len(found)))


def search(
    answer: Callable[[Request], Any],
    rec: FeatureRecord | None = None,
    simulator: Any = None,
    style: Any = None,
    **options: Any,
) -> tuple[Explanation, Any, Any]:
    model, watched = FunctionModel(answer), simulator or Watched()
    tree = Tree(model, style or RulesStyle(), watched, agreement, **options)
    return anyio.run(tree.explain, rec or record()), model, watched


def test_a_whole_search():
    numbers = iter(range(1000))

    def answer(request: Request) -> Reply:
        if improving(request):
            return several(
                request,
                *(
                    rules(f"w{next(numbers)}", "tide", improvement=f"too narrow {next(numbers)}")
                    for _ in range(request.n)
                ),
            )
        return several(request, rules("wind"), rules("tide"), rules("sail"))

    found, model, watched = search(answer)
    nodes = found.search
    assert Counter(n.depth for n in nodes) == {0: 3, 1: 6, 2: 6, 3: 6}
    assert [n.number for n in nodes] == list(range(21)) and sum(n.chosen for n in nodes) == 1
    assert all(n.parent is None if n.depth == 0 else nodes[n.parent or 0].kept for n in nodes)
    assert all((n.improvement or "").startswith("too narrow") for n in nodes if n.depth)
    assert all(
        n.train is not None and n.valid is not None and n.test is None and n.failure is None for n in nodes
    )
    assert len(model.requests) == 1 + 9 and [r.n for r in model.requests] == [3] + [2] * 9
    assert {r.temperature for r in model.requests} == {1.0, 1.2} and len({r.seed for r in model.requests}) > 1
    assert found.provenance.method == "tree" and found.provenance.usage.requests == 10
    assert found.provenance.prompt == "explain-rules/v2 + improve/v2"
    chosen = next(n for n in nodes if n.chosen)
    assert chosen.rules == found.rules and chosen.valid == max(n.valid for n in nodes if n.valid is not None)
    assert Explanation.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert len(watched.texts) == len(set(watched.texts)), "the same explanation was simulated twice"


def test_each_level_goes_on_from_the_best_on_the_training_split():
    def answer(request: Request) -> Reply:
        if improving(request):
            return several(request, rules("rope", improvement="x"), rules("mast", improvement="x"))
        return several(request, rules("wind"), rules("May", "wind", "tide"), rules("May", "wind"))

    found, _, _ = search(answer, tree=TreeSettings(width=2, depth=1))
    nodes = found.search
    best = sorted(nodes[:3], key=lambda n: -(n.train or 0))[:2]
    assert [n.rules[0].activates_on for n in best] == ['the word "May"', 'the word "May"']
    assert {n.number for n in nodes if n.kept} == {n.number for n in best} == {n.parent for n in nodes[3:]}
    assert found.rules == nodes[2].rules


def test_a_good_explanation_ends_the_search():
    found, model, _ = search(lambda request: several(request, rules("May")))
    assert len(model.requests) == 1 and len(found.search) == 3 and found.search[0].train == pytest.approx(1.0)
    found, model, _ = search(
        lambda request: several(
            request, rules("May", *([] if improving(request) else ["wind"]), improvement="x")
        ),
        tree=TreeSettings(stop_at=0.99),
    )
    assert len(model.requests) == 1 + 1 and max(n.depth for n in found.search) == 1
    assert [r.activates_on for r in found.rules] == ['the word "May"'], (
        "the three equal roots are one to go on from"
    )


def test_validation_chooses_and_training_does_not():
    """Train and valid windows disagree: what fits the first perfectly is not the answer."""

    def answer(request: Request) -> Reply:
        return several(
            request,
            rules("May", improvement="x"),
            rules("tide", improvement="x"),
            rules("wind", improvement="x"),
        )

    found, _, _ = search(answer, record(train=" May", valid=" tide"), tree=TreeSettings(depth=0))
    by_word = {n.rules[0].activates_on: n for n in found.search}
    assert (
        by_word['the word "May"'].train == pytest.approx(1.0) and (by_word['the word "May"'].valid or 0) < 0.2
    )
    assert found.rules[0].activates_on == 'the word "tide"' and by_word['the word "tide"'].chosen


def test_no_test_window_is_ever_seen():
    plain, _, watched = search(
        lambda request: several(
            request, rules("wind", improvement="secretly"), rules("tide", improvement="x")
        )
    )
    assert watched.rows and not any(300 <= row < 400 for rows in watched.rows for row in rows)
    assert not any(n.test is not None for n in plain.search)
    other, model, _ = search(
        lambda request: several(
            request, rules("wind", improvement="secretly"), rules("tide", improvement="x")
        ),
        record(test=" wind"),
    )
    assert other == plain, "the result depends on the test split"
    assert not any(" secret" in m.content for r in model.requests for m in r.messages)


def test_feedback_shows_the_worst_windows_token_by_token():
    def answer(request: Request) -> Reply:
        return several(
            request, rules("wind", improvement="x") if improving(request) else rules("May", "wind")
        )

    _, model, _ = search(answer, tree=TreeSettings(depth=1, roots=1, branching=1, feedback=2))
    first, second = model.requests
    assert second.messages[: len(first.messages)] == first.messages
    assert json.loads(second.messages[-2].content) == json.loads(rules("May", "wind"))
    text = second.messages[-1].content
    assert (
        re.search(r"^ wind\t(\d\.\d)\t0\.0\t\+\1$", text, re.MULTILINE)
        and "at most 5 rules" in text
        and "(1 is perfect)" in text
    )
    assert (
        "is wrong about:  wind\n" in text
        and '{"improvement": "add rivers, leave out ships", "rules": [{"activates_on"' in text
    )
    assert "{%" not in text and "None" not in text


def test_feedback_puts_predictions_on_the_scale_of_the_truth():
    """A simulator that uses a part of the levels alone is not told that it is too low everywhere."""
    windows = [
        Window(i, i, np.arange(3), ("a", "b", "c"), np.array([0, 10, 5], np.float32)) for i in range(2)
    ]
    rescaled = _rescaling(windows, [Simulation(np.array([0.0, 1.0, 0.5]))] * 2, 10.0)
    np.testing.assert_allclose(rescaled(np.array([0.0, 1.0, 0.5, 2.0])), [0, 5, 2.5, 5])
    for useless in (np.array([1.0, 0.0, 0.5]), np.full(3, 0.7)):
        np.testing.assert_array_equal(_rescaling(windows, [Simulation(useless)] * 2, 10.0)(useless), useless)
    assert _rescaling(windows, [Simulation(None, "cut")] * 2, 10.0)(np.ones(1))[0] == 1


def test_a_sentence_is_improved_in_its_own_form():
    def answer(request: Request) -> Reply:
        text = 'the words "May" and "wind"'
        return several(
            request,
            json.dumps(
                {"improvement": "it is only one", "explanation": 'the word "May"'}
                if improving(request)
                else {"explanation": text}
            ),
        )

    found, model, _ = search(answer, style=SentenceStyle())
    assert found.text == 'the word "May"' and not found.structured
    assert set((model.requests[1].schema or {})["properties"]) == {"improvement", "explanation"}
    assert next(n for n in found.search if n.chosen).improvement == "it is only one"


def test_what_fails_is_a_node_with_its_cause():
    def answer(request: Request) -> Any:
        if improving(request):
            if request.seed is not None and request.seed % 2:
                raise RequestRefusedError("too long")
            return several(request, "no rules", rules("May", improvement="x"))
        return several(request, rules("wind"), "nothing", rules("tide"))

    found, _, _ = search(answer, tree=TreeSettings(depth=1))
    failed = [n for n in found.search if n.failure]
    assert any("too long" in (n.failure or "") for n in failed) and all(not n.rules for n in failed)
    assert found.rules[0].activates_on == 'the word "May"'
    with pytest.raises(MalformedReplyError):
        search(lambda request: several(request, "never"))
    with pytest.raises(EndpointRefusedError):

        def refused(request: Request) -> Any:
            if improving(request):
                raise EndpointRefusedError("no key")
            return several(request, rules("wind"))

        search(refused)


def test_replies_without_any_choice_end_after_three_attempts():
    model = FunctionModel(lambda _: Reply((), (), Usage(1)))
    with pytest.raises(MalformedReplyError, match="no reply at all"):
        anyio.run(Tree(model, RulesStyle(), Watched(), agreement).explain, record())
    assert len(model.requests) == 3


def test_an_endpoint_that_gives_one_reply_at_a_time_is_asked_more_often():
    words = iter(["wind", "tide", "sail"])
    found, model, _ = search(lambda _: rules(next(words)), tree=TreeSettings(depth=0))
    assert (
        len(found.search) == 3
        and [r.n for r in model.requests] == [3, 2, 1]
        and len({r.seed for r in model.requests}) == 3
    )


class Broken:
    """Simulates every other window, or predicts the same everywhere."""

    def __init__(self, constant: bool) -> None:
        self.constant = constant

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        return [
            Simulation(np.ones(len(w.pieces))) if self.constant or i % 2 else Simulation(None, "cut")
            for i, w in enumerate(windows)
        ]


@pytest.mark.parametrize("constant", [True, False])
def test_undefined_scores_end_nothing(constant: bool):
    found, model, _ = search(
        lambda request: several(request, rules("wind", improvement="x")),
        simulator=Broken(constant),
        tree=TreeSettings(depth=1, roots=1),
    )
    assert found.rules and all(n.train is None and n.valid is None for n in found.search)
    assert ("could not be simulated: cut" in (found.search[0].failure or "")) is not constant
    assert (
        "the same everywhere" in model.requests[1].messages[-1].content
        and model.requests[1].messages[-1].content.count("\t") >= 9
    )


def test_what_cannot_be_searched():
    silent = record()
    silent = FeatureRecord(
        silent.feature,
        10.0,
        0.01,
        20,
        {**silent.splits, "valid": {"random_negative": silent.splits["valid"]["random_negative"]}},
    )
    with pytest.raises(InputError, match="no validation window"):
        search(lambda request: several(request, rules("wind")), silent)
    for wrong in ({"width": 0}, {"roots": 0}, {"depth": -1}, {"branching": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            TreeSettings(**wrong)  # type: ignore[arg-type]


def plain_r(x: np.ndarray, y: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(x, y)[0, 1])


@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_agreement_equals_a_plain_loop_over_what_is_left(n: int, seed: int, failing: bool):
    rng = np.random.default_rng(seed)
    windows = [
        Window(i, i, np.arange(5), ("a",) * 5, np.maximum(rng.normal(size=5), 0).astype(np.float32))
        for i in range(n)
    ]
    simulations = [
        Simulation(None, "cut") if failing and not i else Simulation(rng.random(5) * 5) for i in range(n)
    ]
    found = agreement(windows, simulations)
    kept = [i for i in range(n) if simulations[i].expected is not None]

    def r(rows: list[int]) -> float:
        if not rows:
            return float("nan")
        return plain_r(
            np.concatenate([np.asarray(simulations[i].expected) for i in rows]),
            np.concatenate([windows[i].activations.astype(float) for i in rows]),
        )

    whole = r(kept)
    assert found.n_failed == n - len(kept)
    if not np.isfinite(whole):
        assert found.value is None
        return
    assert found.value == pytest.approx(whole, abs=1e-9)
    for i in range(n):
        expected = r([k for k in kept if k != i]) if i in kept else float("nan")
        np.testing.assert_allclose(found.without[i], expected, atol=1e-7, equal_nan=True)


def test_the_worst_windows_are_those_that_hold_the_correlation_down():
    windows = [Window(i, i, np.arange(2), ("a", "b"), np.array([10, 0], np.float32)) for i in range(4)]
    good, bad = Simulation(np.array([5.0, 0.0])), Simulation(np.array([0.0, 5.0]))
    simulations = [good, bad, Simulation(None, "cut"), Simulation(np.array([3.0, 0.0]))]
    assert worst(agreement(windows, simulations), windows, simulations, 10.0, 2) == [1, 3]
    assert worst(Agreement(None, np.full(4, np.nan)), windows, simulations, 10.0, 9) == [1, 3, 0]
