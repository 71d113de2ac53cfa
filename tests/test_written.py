"""Written texts: each counts once over all calls, numbers are no part of them, and what cannot be read is
asked for with another seed.
"""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from endpoint import completion, endpoint
from replies_of import texts_in
from test_trials import Decides, Finds, explanation, window

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.usage import Usage
from featureinterp.errors import MalformedReplyError, TruncatedReplyError
from featureinterp.falsification.counterexamples import MAX_ATTEMPTS, Falsifier, TrialSettings
from featureinterp.falsification.writing import TextWriter, read_texts, without_numbers
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.openai import OpenAIModel


def record() -> FeatureRecord:
    return FeatureRecord(
        FeatureId("s", 1), 4.0, 0.01, 90, {"train": {"top": (window("the war was long", 0),)}}
    )


def test_a_text_counts_once_over_all_calls():
    pages = iter(
        [
            ["a war", "a  war", "<<a>> war", "an army"],
            ["a war", "an army"],
            ["a war", "a battle", "more", "yet more"],
        ]
    )
    with endpoint(lambda _: json.dumps({"texts": next(pages)})) as server:
        model = OpenAIModel(server.url, "m", api_key="k")

        async def go() -> Any:
            calls = await TextWriter(model, per_call=4).write(["a <<war>>"], 4)
            await model.aclose()
            return calls

        calls = anyio.run(go)
    assert [c.texts for c in calls] == [("a war", "an army"), (), ("a battle", "more")]
    assert [c.status for c in calls] == ["short", "short", "success"] and [c.asked for c in calls] == [
        4,
        2,
        2,
    ]
    assert len({e.body["seed"] for e in server.ledger}) == 3


def test_copies_alone_are_no_samples():
    calls = anyio.run(
        TextWriter(FunctionModel(lambda _: '{"texts": ["same", "same"]}'), per_call=2).write, ["x"], 6
    )
    assert [t for c in calls for t in c.texts] == ["same"] and calls[-1].status == "short"


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ('{"texts": ["1. one war", "2. two wars"]}', ["one war", "two wars"]),
        ('{"texts": ["1) one", "2) two", "3) one"]}', ["one", "two"]),
        ('{"texts": ["1. one", "3. three"]}', ["1. one", "3. three"]),
        ('{"texts": ["1865 was a year", "2. two"]}', ["1865 was a year", "2. two"]),
        ('{"texts": ["1. alone"]}', ["1. alone"]),
        (
            "1. The war was long.\n2. An army\nof men.\n\nI hope that helps!",
            ["The war was long.", "An army\nof men."],
        ),
        ('Here they are:\n\n1) "The war."\n2) "The army."', ["The war.", "The army."]),
        ("<think>1. no\n2. no</think>1. The war.\n2. The army.", ["The war.", "The army."]),
        ('["a", "b"]', ["a", "b"]),
        ('{"texts": ["a \\ud83d b", "c"]}', ["a \ufffd b", "c"]),
        ('{"texts": ["a"]}\n{"texts": ["b"]}', ["a", "b"]),
    ],
)
def test_lists_by_hand(reply: str, texts: list[str]):
    assert texts_in(reply) == texts


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "none",
        "1. one",
        "2. two\n3. three",
        '{"texts": []}',
        '{"texts": [" "]}',
        '{"texts": ["a "b" c"]}\n1. x\n2. y',
    ],
)
def test_what_is_no_list(reply: str):
    with pytest.raises(MalformedReplyError):
        read_texts(Reply((reply,), (False,), Usage()))


def test_a_text_that_was_cut_is_none():
    cut = '{"texts": ["a whole one", "the general led the'
    assert read_texts(Reply((cut,), (False,), Usage())) == ["a whole one"]
    assert read_texts(Reply((cut,), (True,), Usage())) == ["a whole one"]
    for nothing in ("", '{"texts": ["the general led', '{"texts": ["a"]}'):
        with pytest.raises(TruncatedReplyError, match="cut after 164 tokens"):
            read_texts(Reply((nothing,), (True,), Usage(), room=164))
    assert without_numbers([]) == []


def test_a_trial_asks_again_with_another_seed_for_what_it_cannot_read():
    asked: list[Request] = []

    def answer(request: Request) -> str:
        asked.append(request)
        good = json.dumps({"texts": ["the war", "a tree"]})
        return good if request.seed else "I would rather not."

    trial = anyio.run(
        Falsifier(FunctionModel(answer), Decides(), Finds(), TrialSettings(2)).run,
        explanation("words"),
        record(),
    )
    assert (
        len(trial.texts) >= 2
        and len({r.seed for r in asked if "fits the description" in r.messages[-1].content}) == 2
    )


def test_a_trial_gives_up_by_name_and_is_billed_for_every_reply():
    with endpoint(lambda _: completion("I would rather not.")) as server:
        model = OpenAIModel(server.url, "m", api_key="k")

        async def go() -> None:
            try:
                await Falsifier(model, Decides(), Finds(), TrialSettings(2)).run(
                    explanation("words"), record()
                )
            finally:
                await model.aclose()

        with pytest.raises(MalformedReplyError, match="rather not"):
            anyio.run(go)
    assert len(server.ledger) == MAX_ATTEMPTS == len({e.body["seed"] for e in server.ledger})
