"""The plain form of values: every field of every class, and values as old folders have them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from featureinterp.domain.chat import Reply
from featureinterp.domain.explanation import Explanation, Provenance, Rule, SearchNode
from featureinterp.domain.intervention import Intervention, SteeredText
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Failure, Interval, Score
from featureinterp.domain.trial import Trial, TrialText
from featureinterp.domain.usage import Usage
from featureinterp.llm.probe import Probed

USAGE = Usage(3, 10, 4, 1.5, None, 2, 1)
NODE = SearchNode(1, 0, 2, (Rule("years", 5),), "too broad", 0.5, 0.25, 0.125, True, True, "no score")
EXPLANATION = Explanation(
    (Rule("years", 5),),
    Provenance("tree", "m", "explain/v1", "h", 0.5, 7, (1, 2), USAGE, 3),
    False,
    (NODE,),
)
TRIAL = Trial((Rule("years", 4),), (TrialText("in 1812", True, ("in", " 1812"), (0.0, 2.5), True),), 1.25)
STEERED = Intervention((SteeredText("The", " year", "feature", 2.0, 3.5, None),))
SCORE = Score("correlation", 0.5, 6, 1, Interval(0.25, 0.75), None, 0.125, Interval(0.0, 0.25), 2)
RESULT = FeatureResult(
    3,
    "demo",
    8.5,
    0.01,
    40,
    (ShownWindow("test", "top", 9, "d", ("a",), (1.0,), (2.0,), (0.5,), "cut", (0.25,)),),
    EXPLANATION,
    (SCORE,),
    EXPLANATION,
    (Score("correlation", None, 0, undefined="constant"),),
    4,
    (Failure(3, "score", "CutReply", "cut"),),
    {"test/top": "two are missing"},
    (None, 2.0),
    "exact",
    (TRIAL,),
    EXPLANATION,
    0.5,
    STEERED,
    {"length": {"words": 3}},
)
REPLY = Reply(
    ("Yes",), (False,), USAGE, ({"Yes": -0.5},), ({"3": -1.0},), "a filter", 8, ((("Yes", {"Yes": -0.5}),),)
)
PROBED = Probed("json_schema", True, True, False, "echo", None, USAGE, USAGE, 12.5, "cut", ("x",), True)


@pytest.mark.parametrize(
    "value", [NODE, EXPLANATION, TRIAL, STEERED, SCORE, RESULT, REPLY, PROBED], ids=lambda v: type(v).__name__
)
def test_every_field_is_kept(value: Any):
    plain = json.loads(json.dumps(value.to_json()))
    again = type(value).from_json(plain)
    assert again == value
    for field in fields(value):
        assert getattr(again, field.name) == getattr(value, field.name), field.name
        if field.name != "undefined":  # a score has a value, or says why it has none
            assert getattr(value, field.name) != field.default, f"{field.name} of the example is the default"


def test_the_forms_that_files_have():
    assert SCORE.to_json() == {
        "name": "correlation",
        "value": 0.5,
        "n_scored": 6,
        "n_failed": 1,
        "interval": [0.25, 0.75],
        "undefined": None,
        "null": 0.125,
        "null_interval": [0.0, 0.25],
        "null_failed": 2,
    }
    assert STEERED.to_json() == [["The", " year", "feature", 2.0, 3.5, None]]
    assert TRIAL.to_json() == {
        "rules": [["years", 4]],
        "texts": [["in 1812", True, ["in", " 1812"], [0.0, 2.5], True]],
        "threshold": 1.25,
    }
    assert RESULT.to_json()["failures"] == [
        {"feature": 3, "stage": "score", "error": "CutReply", "message": "cut"}
    ]


def test_fields_that_came_later_have_their_defaults():
    old = EXPLANATION.to_json()
    del old["search"], old["provenance"]["left_out"], old["provenance"]["usage"]["estimated"]
    again = Explanation.from_json(old)
    assert again.search == () and again.provenance.left_out == 0 and again.provenance.usage.estimated == 0
    reply = {"texts": ["x"], "truncated": [False], "usage": {"requests": 1}, "first_token": [{}], "read": []}
    assert Reply.from_json(reply) == Reply(("x",), (False,), Usage(1), ({},))


def test_a_field_that_nobody_knows_and_values_of_another_type_are_errors():
    with pytest.raises(ValueError, match="unknown"):
        Score.from_json({**SCORE.to_json(), "unknown": 1})
    with pytest.raises(ValueError, match="n_scored"):
        Score.from_json({**SCORE.to_json(), "n_scored": "many"})
    with pytest.raises(ValueError, match="3 values for the 2 fields of Interval"):
        Score.from_json({**SCORE.to_json(), "interval": [1, 2, 3]})
    with pytest.raises(ValueError, match="needs a value or a reason"):
        Score.from_json({**SCORE.to_json(), "value": None})


def test_numbers_of_numpy_and_infinite_ones_are_written():
    score = Score("complexity", np.float64(0.5), 2)
    assert json.dumps(score.to_json()["value"]) == "0.5"
    reply = Reply(("x",), (False,), Usage(), ({"x": float("-inf")},))
    assert Reply.from_json(json.loads(json.dumps(reply.to_json()))) == reply
