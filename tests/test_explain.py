"""Explainers: what the model is shown, what is kept of its replies, and what becomes of bad ones."""

from __future__ import annotations

import json
import re
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import NASTY

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.usage import Usage
from featureinterp.errors import InputError, MalformedReplyError, TruncatedReplyError
from featureinterp.explainers.asking import MAX_ATTEMPTS
from featureinterp.explainers.baselines import TopTokens
from featureinterp.explainers.one_shot import OneShot
from featureinterp.explainers.parse import RulesReply, SentenceReply, clean, read_rules
from featureinterp.explainers.styles import RulesStyle, SentenceStyle
from featureinterp.explainers.windows import excerpt, top_tokens
from featureinterp.llm.function import FunctionModel
from featureinterp.replies import parse_reply
from featureinterp.simulators.lexical import Lexical


def window(row: int, pieces: list[str], activations: list[float]) -> Window:
    return Window(row, row, np.arange(len(pieces)), tuple(pieces), np.array(activations, np.float32))


def record(*train: Window, test: tuple[Window, ...] = (), scale: float = 10.0) -> FeatureRecord:
    return FeatureRecord(FeatureId("s", 7), scale, 0.01, 20, {"train": {"top": train}, "test": {"top": test}})


MAY = window(1, ["In", " May", " we", " sailed"], [0, 10, 0, 0])
JUNE = window(2, ["by", " June", " or", " so"], [0, 6, 2.5, 0])
SECRET = window(9, [" held", " out"], [0, 8])


def explain(
    answer: Any, style: Any = None, rec: FeatureRecord | None = None, **options: Any
) -> tuple[Explanation, FunctionModel]:
    model = FunctionModel(answer)
    explainer = OneShot(model, style or SentenceStyle(), **options)
    return anyio.run(explainer.explain, rec or record(MAY, JUNE, test=(SECRET,))), model


def test_a_sentence_with_its_provenance():
    found, model = explain(lambda _: '{"explanation": "Names of months."}')
    assert found.text == "Names of months" and not found.structured
    p = found.provenance
    assert (p.method, p.model, p.prompt, p.examples, p.usage.requests) == (
        "one-shot",
        "function",
        "explain-sentence/v2",
        (1, 2),
        1,
    )
    assert p.prompt_hash == SentenceStyle().prompt.hash
    assert Explanation.from_json(json.loads(json.dumps(found.to_json()))) == found
    request = model.requests[0]
    last = request.messages[-1].content
    assert (
        "Tokens:  May |  June" in last and "- In<< May>> we sailed" in last and "- by<< June>> or so" in last
    )
    assert request.schema is not None and "held" not in "".join(m.content for m in request.messages)


def test_rules_show_levels_and_repeat_rare_ones():
    long = window(3, ["x"] * 9 + [" July"], [0] * 9 + [10])
    found, model = explain(
        lambda _: json.dumps(
            {"rules": [{"activates_on": "months", "strength": 3}, {"activates_on": "summer", "strength": 5}]}
        ),
        RulesStyle(rule_cap=4),
        record(long, JUNE),
    )
    assert [(r.activates_on, r.strength) for r in found.rules] == [
        ("summer", 5),
        ("months", 3),
    ] and found.structured
    text = model.requests[0].messages[-1].content
    assert " July\t5\nAgain, the tokens above 0:\n July\t5" in text
    assert "by\t0\n June\t3\n or\t1\n so\t0" in text and text.count("Again") == 1
    assert "at most 4, the strongest first" in model.requests[0].messages[0].content


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("style", [SentenceStyle(), RulesStyle()])
def test_text_that_tries_to_break_a_prompt_stays_in_its_line(nasty: str, style: Any):
    bad = window(1, [nasty, " tail"], [10, 0])
    reply = '{"explanation": "x", "rules": [{"activates_on": "x", "strength": 5}]}'
    _, model = explain(lambda _: reply, style, record(bad))
    _, clean_model = explain(lambda _: reply, style, record(window(1, ["a", " tail"], [10, 0])))
    broken, plain = (m.requests[0].messages[-1].content for m in (model, clean_model))
    assert len(broken.splitlines()) == len(plain.splitlines()) and broken.count("\t") == plain.count("\t")
    assert broken.count("<<") == plain.count("<<") and "\x00" not in broken


def test_bad_replies_are_asked_again_and_then_fail_by_name():
    answers = iter(["no json here", '{"explanation": 3', '{"explanation": "found"}'])
    found, model = explain(lambda _: next(answers))
    assert found.text == "found" and len(model.requests) == 3 and found.provenance.usage.requests == 3
    assert len({r.seed for r in model.requests}) == 3
    model = FunctionModel(lambda _: "never")
    with pytest.raises(MalformedReplyError, match="never"):
        anyio.run(OneShot(model, SentenceStyle()).explain, record(MAY))
    assert len(model.requests) == MAX_ATTEMPTS
    with pytest.raises(TruncatedReplyError, match="--reply-tokens"):
        explain(lambda _: Reply(('{"explanation": "cut',), (True,), Usage()))


def test_a_feature_that_never_fires_in_training_cannot_be_explained():
    with pytest.raises(InputError, match="no training window"):
        explain(lambda _: "x", rec=record(window(1, ["a"], [0.0])))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"explanation": "a b"}', "a b"),
        ('Sure! ```json\n{"explanation": "a b"}\n``` Hope it helps', "a b"),
        ("Here: {'explanation': 'a b',}", "a b"),
        ('{"explanation": "a b"', "a b"),
        ('{"explanation": "a\\nb"}', "a b"),
    ],
)
def test_tolerant_parsing(reply: str, found: str):
    assert clean(parse_reply(reply, SentenceReply).explanation) == found


@pytest.mark.parametrize(
    "reply",
    ["", "{}", '{"explanation": ""}', '{"explanation": ["a"]}', '{"other": "a"}', "[1, 2", "x" * 30_000],
)
def test_replies_of_another_form_are_refused(reply: str):
    with pytest.raises(MalformedReplyError):
        parse_reply(reply, SentenceReply)


@given(st.text(max_size=300))
def test_the_parser_never_fails_otherwise(text: str):
    for form in (SentenceReply, RulesReply):
        try:
            parse_reply(text, form)
        except MalformedReplyError as error:
            assert "\n" not in str(error)


PHRASES = st.one_of(
    st.text(min_size=1, max_size=40),
    st.sampled_from(
        [
            'words "in" quotes',
            "it's",
            'a \\"b\\" c',
            "{not: json}",
            "[1, 2]",
            "a, b: c",
            "```json",
            "// no comment",
            "null",
            "NaN",
            "d" * 600,
        ]
    ),
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
RULES = st.lists(
    st.fixed_dictionaries(
        {
            "activates_on": st.one_of(PHRASES, PHRASES, ODD),
            "strength": st.one_of(st.integers(0, 5), st.integers(0, 5), ODD),
        }
    ),
    max_size=6,
)
SPOILT = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(
            [
                '"',
                "'",
                "\\",
                "{",
                "}",
                "[",
                "]",
                ",",
                ":",
                "\n",
                "\0",
                "“",
                "```",
                "NaN",
                '"strength": 3',
                "[" * 3000,
            ]
        ),
    ),
    max_size=4,
)


@st.composite
def spoilt_replies(draw: st.DrawFn) -> tuple[str, str]:
    """What a model may send instead of rules: (the reply, everything that it says)."""
    rules = draw(RULES)
    reply = json.dumps({"rules": rules}, ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        reply = reply.replace('"strength"', '"strength": 2, "strength"', 1)
    for place, what in draw(SPOILT):
        at = int(place * len(reply))
        reply = reply[:at] + what + reply[at:]
    if draw(st.booleans()):
        reply = reply[: int(draw(st.floats(0, 1)) * len(reply))]
    if draw(st.booleans()):
        reply = f"Sure:\n```json\n{reply}\n```\nAnything else?"
    return reply, " ".join(str(r["activates_on"]) for r in rules)


def letters(text: str) -> str:
    """A text without what quoting and escaping add or take."""
    return "".join(c for c in text if c.isalnum())


def unescaped(text: str) -> str:
    """A text with JSON's escapes replaced by what they stand for, wherever they are."""
    units = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), re.sub(r"\\[ntbfr]", " ", text))
    return units.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_spoilt(case: tuple[str, str]) -> None:
    reply, said = case
    try:
        rules, _ = read_rules(parse_reply(reply, RulesReply), 5)
    except MalformedReplyError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert 1 <= len(rules) <= 5
    for rule in rules:
        assert any(letters(rule.activates_on) in letters(where) for where in (reply, unescaped(reply), said))
        assert str(rule.strength) in reply


@settings(max_examples=300, deadline=None)
@given(spoilt_replies())
def test_no_rule_comes_from_nowhere(case: tuple[str, str]):
    check_spoilt(case)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(spoilt_replies())
def test_no_rule_comes_from_nowhere_at_length(case: tuple[str, str]):
    check_spoilt(case)


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ('{"explanation": "caf\\u00e9 \\u00', "café"),
        ('{"explanation": "a \\ud83d\\ude00 face', "a 😀 face"),
        ('{"explanation": "a face \\ud83d', "a face"),
        ('{"explanation": "a face \\ud83d\\ude', "a face"),
        ('{"explanation": "a \\\\ is\\\\\\' + "\n", "a \\ is\\"),
        ('{"explanation": "a\\f\\fb \\/ \\\\f \\t\\u00e9", "strengt', "a\f\fb / \\f \té"),
    ],
)
def test_a_cut_escape_is_no_part_of_the_text(reply: str, read: str):
    assert parse_reply(reply, SentenceReply).explanation.strip() == read


def test_rules_are_capped_and_each_said_once():
    reply = RulesReply.model_validate(
        {
            "rules": [
                {"activates_on": t, "strength": s}
                for t, s in (("a", 2), ("A.", 5), ("b", 0), ("c", 3), ("d", 1))
            ]
        }
    )
    assert read_rules(reply, 2) == ((Rule("A", 5), Rule("c", 3)), 3)
    with pytest.raises(MalformedReplyError):
        read_rules(RulesReply.model_validate({"rules": [{"activates_on": "b", "strength": 0}]}), 3)


def test_clean_by_hand():
    assert clean('  "names of\n months." ') == "names of months"
    assert clean('the word "of"') == 'the word "of"'


@given(
    st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.integers(0, 5)), min_size=1, max_size=10),
    st.booleans(),
    st.floats(0, 2),
)
def test_explanations_round_trip_through_json(
    rules: list[tuple[str, int]], structured: bool, temperature: float
):
    provenance = Provenance("one-shot", "m", "p/v1", "h", temperature, 3, (1, 2), Usage(1, 2, 3, 0.5, None))
    made = (
        Explanation(tuple(Rule(*r) for r in rules), provenance)
        if structured
        else Explanation.sentence(rules[0][0], provenance)
    )
    assert Explanation.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("bad", [("", 3), ("  ", 3), ("x", 6), ("x", -1)])
def test_impossible_rules(bad: tuple[str, int]):
    with pytest.raises(ValueError, match="rule"):
        Rule(*bad)
    with pytest.raises(ValueError, match="rules"):
        Explanation((), Provenance("x"))


def test_top_tokens_are_the_largest_means():
    found = anyio.run(TopTokens(2).explain, record(MAY, JUNE, window(3, [" May", " or", "\n"], [4, 0, 9])))
    assert [(r.activates_on, r.strength) for r in found.rules] == [('" May"', 4), ('" June"', 3)]
    assert top_tokens((MAY, JUNE), 3) == [" May", " June"] and top_tokens((MAY, JUNE), 1) == [" May"]
    only_space = anyio.run(TopTokens().explain, record(window(1, [" ", "\n\n"], [0, 5])))
    assert only_space.rules[0].activates_on == r'"\n\n"'


def test_the_lexical_simulator_by_hand():
    exact = Explanation((Rule('" May"', 4), Rule('" June"', 2)), Provenance("top-tokens"))
    words = Explanation.sentence("names such as May or June", Provenance("x"))
    shown = window(5, [" May", "May", " may", " so", " 日本"], [0] * 5)
    assert Lexical().predict(exact, [shown])[0].expected.tolist() == [4, 0, 0, 0, 0]
    assert Lexical().predict(words, [shown])[0].expected.tolist() == [5, 5, 5, 0, 0]
    assert anyio.run(Lexical().simulate, exact, [shown])[0].expected.tolist() == [4, 0, 0, 0, 0]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_a_top_token_s_rule_names_exactly_that_token(piece: str):
    found = anyio.run(TopTokens(1).explain, record(window(1, [piece], [5])))
    other = window(2, [piece, f"{piece}x", f"x{piece}"], [0] * 3)
    assert (Lexical().predict(found, [other])[0].expected > 0).tolist() == [True, False, False]


def test_excerpts_are_around_the_peak():
    pieces = [f" w{i}" for i in range(30)]
    activations = [0.0] * 30
    activations[20] = 9.0
    assert excerpt(window(1, pieces, activations), 4) == "w16 w17 w18 w19<< w20>> w21 w22"
    activations[18], activations[21] = 4.4, 4.5
    assert excerpt(window(1, pieces, activations), 4) == "w16 w17 w18 w19<< w20 w21>> w22"


def test_requests_carry_the_settings():
    _, model = explain(lambda _: '{"explanation": "x"}', temperature=0.7, seed=5, max_tokens=33)
    request: Request = model.requests[0]
    assert (request.temperature, request.seed, request.max_tokens) == (0.7, 5, 33)
    with pytest.raises(InputError, match="1 to 10"):
        RulesStyle(rule_cap=11)
