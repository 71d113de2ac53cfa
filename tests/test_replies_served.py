"""Replies as servers send them, through the whole client: what a user gets of each, what is asked again, and
what a second run asks.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from endpoint import Endpoint, completion, endpoint
from replies_of import DRESSES, THOUGHTS

from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.errors import MalformedReplyError
from featureinterp.explainers.one_shot import OneShot
from featureinterp.explainers.styles import RulesStyle
from featureinterp.falsification.writing import TextWriter
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.openai import OpenAIModel
from featureinterp.scorers.detection import Detection
from featureinterp.simulators.rated import Rated

SAID = Explanation.sentence("months", Provenance("test"))
WINDOWS = [
    Window(i, i, np.zeros(2, np.int32), ("in", f" May{i}"), np.array([0, 5 * (i % 2)], np.float32))
    for i in range(4)
]
RECORD = FeatureRecord(FeatureId("s", 7), 5.0, 0.1, 20, {"train": {"top": (WINDOWS[1],)}})
RULES = {
    "rules": [{"activates_on": "months of spring", "strength": 5}, {"activates_on": "dates", "strength": 2}]
}


def answer(body: dict[str, Any]) -> str:
    """A right answer to any request: an instance of its schema, or a word."""
    form = body.get("response_format")
    if form is None:
        return (
            "Yes"
            if "May1" in body["messages"][-1]["content"] or "May3" in body["messages"][-1]["content"]
            else "No"
        )
    schema = form["json_schema"]["schema"]
    if "rules" in schema["properties"]:
        return json.dumps(RULES)
    if "texts" in schema["properties"]:
        return json.dumps(
            {"texts": [f"a text {i}" for i in range(schema["properties"]["texts"]["minItems"])]}
        )
    levels = schema["properties"]["levels"]["prefixItems"]
    return json.dumps({"levels": [[3] * t["minItems"] for t in levels]})


def use(server: Endpoint, store: Path, work: Callable[[Any], Awaitable[Any]]) -> Any:
    model = OpenAIModel(server.url, "m", api_key="k")

    async def go() -> Any:
        try:
            return await work(Cached(model, ReplyStore(store)))
        finally:
            await model.aclose()

    return anyio.run(go)


async def everything(model: Any) -> tuple[Explanation, list[Any], list[Any], list[Any]]:
    explained = await OneShot(model, RulesStyle()).explain(RECORD)
    scores, _, _ = await Detection(model).run(SAID, WINDOWS)
    simulated = await Rated(model).simulate(SAID, WINDOWS)
    return explained, scores, simulated, await TextWriter(model, per_call=3).write(["a <<May>>"], 3)


def check(found: tuple[Explanation, list[Any], list[Any], list[Any]]) -> None:
    explained, scores, simulated, calls = found
    assert [(r.activates_on, r.strength) for r in explained.rules] == [("months of spring", 5), ("dates", 2)]
    assert scores[0].value == 1 and scores[0].n_failed == 0
    assert all(s.expected.tolist() == [3, 3] for s in simulated)
    assert [c.texts for c in calls] == [("a text 0", "a text 1", "a text 2")]


@pytest.mark.parametrize("thought", sorted(THOUGHTS))
def test_models_that_think_aloud(thought: str, tmp_path: Path):
    draft = 'No. {"rules": [{"activates_on": "a draft", "strength": 1}]} Yes'
    with endpoint(
        lambda body: THOUGHTS[thought](draft, answer(body)) if thought != "none" else answer(body)
    ) as server:
        check(use(server, tmp_path / "replies", everything))
        asked = len(server.ledger)
        check(use(server, tmp_path / "replies", everything))
    assert asked == 7 and len(server.ledger) == asked, "nothing is asked again"


@pytest.mark.parametrize("dress", sorted(DRESSES))
def test_models_that_dress_their_answers(dress: str, tmp_path: Path):
    def dressed(body: dict[str, Any]) -> str:
        said = answer(body)
        return DRESSES[dress](said) if said[0] == "{" else f"**{said}**"

    with endpoint(dressed) as server:
        check(use(server, tmp_path / "replies", everything))
    assert len(server.ledger) == 7


SPOILT = {
    "quotation marks within a text": '{"rules": [{"activates_on": ""we", "us"", "strength": 5}]}',
    "thoughts alone": "<think>" + json.dumps(RULES),
    "analysis alone": "<|channel|>analysis<|message|>" + json.dumps(RULES) + "<|end|>",
    "a truth value as a strength": '{"rules": [{"activates_on": "a", "strength": true}]}',
    "no rule": '{"rules": []}',
    "an empty rule": '{"rules": [{"activates_on": " ", "strength": 3}]}',
    "another form": '{"items": ["a", "b"]}',
    "a part of a list": '", "strength": 5}, {"activates_on": "b", "strength": 3}]}',
    "prose": "I cannot see a pattern.",
    "a name twice": '{"rules": [{"activates_on": "a", "activates_on": "b", "strength": 5}]}',
}
"""Replies that cannot be read without losing or making up something."""


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_reply_is_asked_for_again_with_another_seed(name: str, tmp_path: Path):
    replies = iter([SPOILT[name], SPOILT[name], json.dumps(RULES)])
    with endpoint(lambda _: next(replies)) as server:
        found = use(server, tmp_path / "replies", lambda model: OneShot(model, RulesStyle()).explain(RECORD))
    assert [r.activates_on for r in found.rules] == ["months of spring", "dates"]
    assert len(server.ledger) == 3 == len({e.body["seed"] for e in server.ledger})
    assert found.provenance.usage.requests == 3, "all three were billed"


@pytest.mark.parametrize("name", SPOILT)
def test_what_stays_spoilt_is_a_failure_with_its_words(name: str, tmp_path: Path):
    with endpoint(lambda _: completion(SPOILT[name])) as server:
        with pytest.raises(MalformedReplyError) as failed:
            use(server, tmp_path / "replies", lambda model: OneShot(model, RulesStyle()).explain(RECORD))
        first = len(server.ledger)
        with pytest.raises(MalformedReplyError):
            use(server, tmp_path / "replies", lambda model: OneShot(model, RulesStyle()).explain(RECORD))
    assert first == 3 == len(server.ledger), (
        "what was paid for is kept, and a second run fails without a request"
    )
    assert "\n" not in str(failed.value) and str(failed.value).startswith("the reply")
