"""Short answers: which texts are a yes, a no or a level, and which probabilities count, over the real HTTP
stack.
"""

from __future__ import annotations

import math
from typing import Any

import anyio
import numpy as np
import pytest
from endpoint import completion, endpoint
from hypothesis import given
from hypothesis import strategies as st
from replies_of import RATINGS, YES_NO, logged

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.record import Window
from featureinterp.domain.usage import Usage
from featureinterp.errors import MalformedReplyError, TruncatedReplyError
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.openai import OpenAIModel
from featureinterp.scorers.answers import MIN_SHARE, read_level, read_yes
from featureinterp.scorers.complexity import Complexity
from featureinterp.scorers.detection import Detection
from featureinterp.scorers.verdicts import Verdict, judge

SAID = Explanation.sentence("months", Provenance("test"))


def reply(text: str, first: dict[str, float] | None = None) -> Reply:
    return Reply((text,), (False,), Usage(), ({t: math.log(p) for t, p in (first or {}).items()},))


@pytest.mark.parametrize(("text", "said"), YES_NO.items())
def test_what_is_a_yes_or_a_no(text: str, said: bool | None):
    if said is None:
        with pytest.raises(MalformedReplyError):
            read_yes(reply(text))
    else:
        assert read_yes(reply(text)) == (said, None)


@pytest.mark.parametrize(("text", "level"), RATINGS.items())
def test_what_is_a_level(text: str, level: int | None):
    if level is None:
        with pytest.raises(MalformedReplyError):
            read_level(reply(text))
    else:
        assert read_level(reply(text)) == level


def test_negligible_probabilities_are_no_answer():
    noise = {"\n\n": 0.9995, "No": math.exp(-8)}
    assert read_yes(reply("**Yes**", noise)) == (True, None) and read_yes(reply("Yes", noise))[1] is None
    with pytest.raises(MalformedReplyError):
        read_yes(reply("\n\nThe text", noise))
    assert read_level(reply("3", {"\n": 0.99, "1": 0.001})) == 3
    assert read_yes(reply("Yes", {"Yes": 0.08, "No": 0.04})) == (True, pytest.approx(2 / 3))
    assert read_yes(reply("Yes", {"Yes": MIN_SHARE / 2 - 0.001, "No": MIN_SHARE / 2}))[1] is None


def test_a_token_that_goes_on_is_no_answer():
    with pytest.raises(MalformedReplyError):
        read_yes(reply("Yesterday", {"Yes": 0.9, "No": 0.05}))
    for text, first in (("10", {"1": 0.9}), ("4.5", {"4": 0.9}), ("-1", {"-": 0.6, "1": 0.3})):
        with pytest.raises(MalformedReplyError):
            read_level(reply(text, first))
    assert read_level(reply("3.", {"3": 0.6, "4": 0.2})) == pytest.approx(3.25)


@given(
    st.dictionaries(
        st.sampled_from(["Yes", " yes", "No", "NO", "**", "\n", "Maybe", "Y"]),
        st.floats(1e-9, 0.2),
        max_size=8,
    )
)
def test_a_probability_is_that_of_the_answers_alone(first: dict[str, float]):
    yes = sum(p for t, p in first.items() if t.strip().lower() == "yes")
    no = sum(p for t, p in first.items() if t.strip().lower() == "no")
    found = read_yes(reply("Yes", first))
    if yes + no >= MIN_SHARE * 1.0001:
        assert found[1] == pytest.approx(yes / (yes + no))
    elif yes + no < MIN_SHARE * 0.9999:
        assert found == (True, None)


SPREAD = {"Yes": 0.7, "No": 0.2, "It": 0.1}
NOISE = {"\n\n": 0.9995, "No": 0.0003}
LOGGED: dict[str, tuple[dict[str, Any], float | None]] = {
    "first token": (logged("Yes", ("Yes", SPREAD)), 7 / 9),
    "behind line breaks": (logged("\n\nYes", ("\n\n", NOISE), ("Yes", SPREAD)), 7 / 9),
    "behind stars": (logged("**Yes**", ("**", NOISE), ("Yes", SPREAD), ("**", {"**": 0.99})), 7 / 9),
    "behind a label": (logged("Answer: Yes", ("Answer", NOISE), (":", NOISE), (" Yes", SPREAD)), 7 / 9),
    "within quotes": (logged('"Yes"', ('"Yes', {'"Yes': 0.7, '"No': 0.2}), ('"', {'"': 0.99})), 7 / 9),
    "thoughts in the text": (
        logged("<think>No?</think>\n\nYes", ("<think>", {"<think>": 1.0}), ("No", {"No": 0.99}),
        ("?", {"?": 1.0}), ("</think>", NOISE), ("\n\n", NOISE), ("Yes", SPREAD)),
        7 / 9,
    ),
    "thoughts among the tokens alone": (logged("Yes", ("No", {"No": 0.9}), ("</think>", NOISE),
    ("Yes", SPREAD)), 7 / 9),
    "no share anywhere": (logged("\n\nYes", ("\n\n", NOISE), ("Yes", {"Well": 0.99, "No": 0.001})), None),
    "prose first": (logged("Certainly Yes", ("Certainly", NOISE), (" Yes", SPREAD)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGGED)
def test_probabilities_are_read_where_the_answer_stands(name: str, tmp_path: Any):
    played, probability = LOGGED[name]
    with endpoint(lambda _: played) as server:
        model = OpenAIModel(server.url, "m", api_key="k")

        async def go() -> list[Reply]:
            cached = Cached(model, ReplyStore(tmp_path / "replies.sqlite"))
            request = Request((Message("user", "?"),), 4, top_logprobs=10)
            found = [await cached.complete(request), await cached.complete(request)]
            await model.aclose()
            return found

        replies = anyio.run(go)
    assert len(server.ledger) == 1, "the second comes from the store"
    for found in replies:
        if name == "prose first":
            with pytest.raises(MalformedReplyError):
                read_yes(found)
        else:
            said = read_yes(found)
            assert said[0] is True and (
                said[1] == pytest.approx(probability) if probability is not None else said[1] is None
            )


def windows(n: int = 8) -> list[Window]:
    return [
        Window(i, i, np.zeros(2, np.int32), ("a", f" w{i}"), np.array([0, i % 2], np.float32))
        for i in range(n)
    ]


def detect(answer: Any) -> tuple[list[Any], list[Verdict]]:
    with endpoint(answer) as server:
        model = OpenAIModel(server.url, "m", api_key="k")

        async def go() -> Any:
            found = await Detection(model).run(SAID, windows())
            await model.aclose()
            return found

        scores, verdicts, _ = anyio.run(go)
    return scores, verdicts


def test_the_auroc_of_noise_is_undefined_and_not_a_result():
    scores, verdicts = detect(
        lambda body: logged(
            "**Yes**",
            ("**", {"**": 0.999, "No": math.exp(-8), "Yes": math.exp(-8 - int(str(body)[-9] == "1"))}),
        )
    )
    assert all(v.said is True and v.probability is None for v in verdicts)
    by_name = {s.name: s for s in scores}
    assert by_name["detection_auroc"].value is None and by_name["detection_balanced_accuracy"].value == 0.5
    assert by_name["detection_auroc"].undefined == "no answer came with probabilities that count"


def test_questions_that_no_probability_speaks_of_are_counted_beside_the_others():
    verdicts = [Verdict(i % 2 == 0, True, 0.9 if i % 2 == 0 else 0.2, row=i) for i in range(6)] + [
        Verdict(True, True, None, row=9)
    ]
    by_name = {s.name: s for s in judge("d", verdicts)}
    assert by_name["d_auroc"].value == 1 and (by_name["d_auroc"].n_scored, by_name["d_auroc"].n_failed) == (
        6,
        1,
    )
    assert (by_name["d_balanced_accuracy"].n_scored, by_name["d_balanced_accuracy"].n_failed) == (7, 0)


def test_what_is_neither_is_a_failure_with_its_words():
    scores, verdicts = detect(lambda _: completion("Not sure"))
    assert all(v.said is None and "neither yes nor no: 'Not sure'" in (v.failure or "") for v in verdicts)
    assert all(s.value is None and s.n_failed == 8 for s in scores)


@pytest.mark.parametrize("text", ["10", "4.5", "-1"])
def test_a_rating_out_of_range_is_a_failure(text: str):
    with endpoint(
        lambda _: logged(text, (text[0], {text[0]: 0.9, "3": 0.05}), (text[1:], {text[1:]: 0.9}))
    ) as server:
        model = OpenAIModel(server.url, "m", api_key="k")

        async def go() -> Any:
            found = await Complexity(model).run(SAID)
            await model.aclose()
            return found

        score, ratings, _ = anyio.run(go)
    assert score.value is None and ratings == [None] and "no number from 0 to 5" in (score.undefined or "")


def test_what_was_cut_before_its_answer_says_so():
    """And what gives more room; an answer that was cut behind its word stays one."""
    for read, answer in ((read_yes, (True, None)), (read_level, 3.0)):
        for text in ("", "I think that", "<think>well"):
            cut = Reply((text,), (True,), Usage(), room=54)
            said = r"cut after 54 tokens.*--thinking-tokens"
            with pytest.raises(TruncatedReplyError, match=said) as caught:
                read(cut)
            assert (f"({text!r})" in str(caught.value)) == bool(text) and len(str(caught.value)) < 240
        word = "Yes, as it" if read is read_yes else "3, as it"
        assert read(Reply((word,), (True,), Usage(), room=4)) == answer
