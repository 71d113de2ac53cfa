"""Reading replies: exactly what was said, or a refusal; nothing comes from nowhere, and nothing is cut in
silence.
"""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies_of import DRESSES, MARKERS, THOUGHTS, Played, broken, texts_in, whole

from featureinterp.domain.explanation import Provenance, Rule
from featureinterp.errors import MalformedReplyError
from featureinterp.explainers.parse import RulesReply, SentenceReply, clean, read_rules
from featureinterp.explainers.styles import RulesStyle
from featureinterp.falsification.writing import _texts
from featureinterp.replies import answer_of, parse_reply
from featureinterp.simulators.rated import LevelsReply


def read(played: Played) -> list[tuple[str, int]]:
    """What the product reads: cleaned texts with strengths (of rules)."""
    if played.kind == "explanation":
        return [(parse_reply(played.reply, SentenceReply).explanation, 0)]
    if played.kind == "texts":
        return [(t, 0) for t in _texts(played.reply)[0]]
    found = parse_reply(played.reply, RulesReply)
    read_rules(found, 10)
    return [(r.activates_on or "", r.strength or 0) for r in found.rules]


def letters(text: str) -> str:
    """A text without what quoting and escaping add or take."""
    return "".join(c for c in text if c.isalnum())


def unescaped(text: str) -> str:
    units = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), re.sub(r"\\[ntbfr]", " ", text))
    return units.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_the_last_whole(found: list[tuple[str, int]], played: Played) -> bool:
    """Whether an object of the reply, strict JSON with words or nothing behind it, says exactly what was
    read.
    """
    for start in (m.start() for m in re.finditer(r"{", played.reply)):
        try:
            value, _ = json.JSONDecoder().raw_decode(played.reply, start)
        except ValueError:
            continue
        said = value.get(played.kind)
        texts = said if isinstance(said, list) else [said]
        if [t.get("activates_on") if isinstance(t, dict) else t for t in texts] == [t for t, _ in found]:
            return True
    return False


def check_whole(seed: int) -> None:
    played = whole(random.Random(seed))
    wanted = [(t, s if played.kind == "rules" else 0) for t, s in played.said]
    assert read(played) == wanted, f"seed {seed}: {played.reply!r}"


def check_broken(seed: int) -> bool:
    """Whether it was read. Every text is in the reply as written; every word that marks the beginning or end
    of a text, and is still whole in the answer, is in what was read."""
    played = broken(random.Random(seed))
    try:
        found = read(played)
    except MalformedReplyError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    sources = [letters(played.reply), letters(unescaped(played.reply))]
    for text, strength in found:
        assert any(letters(text) in source for source in sources), (
            f"seed {seed}: {text!r} from {played.reply!r}"
        )
        assert not strength or str(strength) in played.reply
        assert "beta" not in text, f"seed {seed}: a thought was read from {played.reply!r}"
    answer = played.reply[played.reply.rfind("alpha0") :] if "alpha0" in played.reply else ""
    left = set(re.findall(r"(?:alpha|omega)\d(?!\d)", answer))
    kept = {word for text, _ in found for word in re.findall(r"(?:alpha|omega)\d(?!\d)", text)}
    assert left <= kept or found == [("no", 0)] or is_the_last_whole(found, played), (
        f"seed {seed}: {sorted(left - kept)} lost from {played.reply!r}, read {found}"
    )
    return True


def test_whole_replies_are_read_exactly():
    for seed in range(1200):
        check_whole(seed)


def test_broken_replies_are_read_as_written_or_refused():
    read_ones = sum(check_broken(seed) for seed in range(1200))
    assert 60 < read_ones < 1140, "the damages are of the kinds that matter"


@pytest.mark.slow
def test_twenty_thousand_replies():
    for seed in range(10_000, 20_000):
        check_whole(seed)
    assert sum(check_broken(seed) for seed in range(10_000, 20_000)) > 500


WORDS = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=6)), min_size=1, max_size=6).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(WORDS, st.sampled_from(sorted(DRESSES)), st.sampled_from(sorted(THOUGHTS)), st.booleans())
def test_any_text_comes_through_any_dress(text: str, dress: str, thought: str, ascii_only: bool):
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")[:500]
    if not text.strip():
        return
    reply = THOUGHTS[thought](
        "Hm, I think", DRESSES[dress](json.dumps({"explanation": text}, ensure_ascii=ascii_only))
    )
    assert parse_reply(reply, SentenceReply).explanation == text


@settings(max_examples=300, deadline=None)
@given(WORDS)
def test_any_reply_is_read_or_refused(text: str):
    for form in (SentenceReply, RulesReply, LevelsReply):
        try:
            parse_reply(text, form)
        except MalformedReplyError as error:
            assert "\n" not in str(error)
    assert answer_of(answer_of(text)) in text


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"explanation": "three ``` marks"}', "three ``` marks"),
        ('{"explanation": "a {brace}"}', "a {brace}"),
        ('<think>{"explanation": "draft"}</think>{"explanation": "the tag </think>"}', "the tag </think>"),
        ('{"explanation": "draft"}\nBetter:\n{"explanation": "final"}', "final"),
        ('{"explanation": "again"}\n{"explanation": "again"}\n{"explan', "again"),
        ("{'explanation': 'it's a \"word\"',}", 'it\'s a "word"'),
        ("{explanation: “months of spring”}", "months of spring"),
        ('{"explanation": "two\nlines"}', "two\nlines"),
        ('{"explanation": "x"}}', "x"),
        ('"{"explanation": "x"}"', "x"),
        ('[{"explanation": "x"}]', "x"),
        ('See [1] and {curly}: {"explanation": "x"}', "x"),
    ],
)
def test_one_answer_by_hand(reply: str, found: str):
    assert parse_reply(reply, SentenceReply).explanation == found


@pytest.mark.parametrize(
    "reply",
    [
        '{"explanation": ""we", "us", …"}',
        '{"explanation": "the token "}" in code"}',
        '{"explanation": "words "a": b"}',
        '{"explanation": "a", "explanation": "b"}',
        '{"explanation": "a" // no, b\n}',
        '{"explanation": "draft"}\nBetter:\n{"explanation": "fin"al"}',
        "{'explanation': 'a </think> b'}",
        '{"explanation": "a<|im_end|>',
        "<think>it is {\"explanation\": \"x\"}",
        "<|channel|>analysis<|message|>{\"explanation\": \"x\"}<|end|>",
        '{"explanation": true}',
        '{"explanation": null}',
        "[[" * 5000,
        '{"a":' * 3000,
        '{"explanation": NaN}',
    ],
)  # fmt: skip
def test_what_would_lose_or_invent_a_text_is_refused(reply: str):
    with pytest.raises(MalformedReplyError):
        parse_reply(reply, SentenceReply)


HALVES = {
    "a \\ud83d b": "a \ufffd b",
    "\\ude00a": "\ufffda",
    "\\ud83d\\ude00": "😀",
    "\\ude00\\ud83d.": "\ufffd\ufffd.",
}
"""Escapes of UTF-16 units within a text, and the text: a half alone is U+FFFD."""


@pytest.mark.parametrize("written", HALVES)
@pytest.mark.parametrize(
    "dress",
    ['{"%s": %s}', "{'%s': %s,}", 'Here:\n```json\n{"%s": %s}\n```', '{"%s": %s', "{%s: %s}"],
)
def test_half_a_character_is_read_alike_in_json_and_in_what_is_nearly_json(written: str, dress: str):
    """In one text and in a list of them, and within rules."""
    text, shown = HALVES[written], f'"{written}"'
    assert parse_reply(dress % ("explanation", shown), SentenceReply).explanation == text
    (rule,) = parse_reply(
        dress % ("rules", f'[{{"activates_on": {shown}, "strength": 2}}]'), RulesReply
    ).rules
    assert rule.activates_on == text
    if not dress.endswith("%s"):  # the last text of a list that was cut is none
        assert texts_in(dress % ("texts", f'[{shown}, "and a whole one"]')) == [text, "and a whole one"]


def rule(text: object, strength: object = 3) -> dict[str, object]:
    return {"activates_on": text, "strength": strength}


def rules(reply: object) -> list[tuple[str, int]]:
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return [(r.activates_on, r.strength) for r in read_rules(parse_reply(text, RulesReply), 10)[0]]


def test_several_objects_are_one_list():
    one, two = json.dumps(rule("a", 5)), json.dumps(rule("b"))
    both = [("a", 5), ("b", 3)]
    assert (
        rules(f"{one}\n{two}")
        == rules(f"[{one}, {two}]")
        == rules(f'{{"rules": [{one}]}}\n{{"rules": [{two}]}}')
        == both
    )
    assert (
        rules(f"First: {one}. Second: {two}")
        == rules(f"1. {one}\n2. {two}")
        == rules(f"```\n{one}\n```\n```\n{two}\n```")
        == both
    )
    assert rules(f'Draft: {{"rules": [{one}]}}. Final: {{"rules": [{two}]}}') == [("b", 3)]
    for spoilt in (
        f'{one}\n{two[:-1]} "x"}}',
        f"{two[:-1]} x}}\n{one}",
        f'{{"rules": [{one} {two}]}}',
        f'", "strength": 5}}, {two}]}}',
    ):
        with pytest.raises(MalformedReplyError):
            rules(spoilt)


@pytest.mark.parametrize("n", [1, 5, 6, 10, 11, 40])
def test_however_many_rules_come_the_strongest_are_kept_and_the_rest_counted(n: int):
    reply = json.dumps({"rules": [rule(f"r{i}", 1 + i % 5) for i in range(n)]})
    found = RulesStyle(rule_cap=5).read(reply, Provenance("x"))
    assert len(found.rules) == min(n, 5) and found.provenance.left_out == n - min(n, 5)
    wanted = sorted((1 + i % 5 for i in range(n)), reverse=True)[:5]
    assert [r.strength for r in found.rules] == wanted


def test_an_empty_rule_among_good_ones_is_left_out_and_counted():
    for empty in (rule(""), rule(" . "), rule(None), rule("", None), rule("z", 0)):
        kept, left_out = read_rules(
            parse_reply(json.dumps({"rules": [rule("a"), empty, rule("b", 5)]}), RulesReply), 5
        )
        assert kept == (Rule("b", 5), Rule("a", 3)) and left_out == 1
    for spoilt in (
        [rule("")],
        [rule("a"), {"strength": 3}],
        [rule("a"), {"activates_on": "b"}],
        [rule("a"), rule("b", None)],
        [],
    ):
        with pytest.raises(MalformedReplyError):
            read_rules(parse_reply(json.dumps({"rules": spoilt}), RulesReply), 5)


@pytest.mark.parametrize("level", [True, False, 6, -1, 2.5, "x", None, [1]])
def test_what_is_no_level(level: object):
    with pytest.raises(MalformedReplyError):
        parse_reply(
            json.dumps({"rules": [rule("a", level)]})
            if level is not None
            else json.dumps({"rules": [{"activates_on": "a"}, 3]}),
            RulesReply,
        )
    with pytest.raises(MalformedReplyError):
        parse_reply(json.dumps({"levels": [[0, level]]}), LevelsReply)


def test_levels_by_hand():
    assert parse_reply('{"levels": [[0, 1], [5]]}', LevelsReply).levels == [[0, 1], [5]]
    assert parse_reply('{"levels": [[0, 1]]}\n{"levels": [[5]]}', LevelsReply).levels == [[0, 1], [5]]
    assert parse_reply("[[0, 1], [5]]", LevelsReply).levels == [[0, 1], [5]]
    with pytest.raises(MalformedReplyError):
        parse_reply('{"levels": [[0, 1], [5', LevelsReply)


@pytest.mark.parametrize("thought", sorted(THOUGHTS))
def test_thoughts_are_no_answer(thought: str):
    assert answer_of(THOUGHTS[thought]("Yes, no, {maybe} Yes", "No")) == "No"
    assert (
        clean(
            parse_reply(
                THOUGHTS[thought]('{"explanation": "draft"}', '{"explanation": "it."}'), SentenceReply
            ).explanation
        )
        == "it"
    )


def test_long_thoughts_do_not_make_a_reply_too_long():
    assert (
        parse_reply(f"<think>{'hm { ' * 20_000}</think>" + '{"explanation": "x"}', SentenceReply).explanation
        == "x"
    )
    with pytest.raises(MalformedReplyError, match="20,0"):
        parse_reply('{"explanation": "' + "x" * 20_000 + '"}', SentenceReply)
