"""Text from elsewhere on terminals, pages and in prompts: nothing steers a screen, nothing hides, nothing
forges a separator.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featureinterp.cli.screen import Screen, one_line, put
from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.result import FeatureResult
from featureinterp.explainers.styles import RulesStyle, SentenceStyle
from featureinterp.prompts import SEPARATOR, escape, listed, unescape
from featureinterp.reports.render import environment, read_results, write_results
from featureinterp.reports.table import results_table
from featureinterp.visible import visible, visible_json

HOSTILE = (
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "up\x1b[1A",
    "\u202egpj.exe",
    "\u2067x\u2069",
    "zero\u200bwidth",
    "\u2028line",
    "soft\xadhyphen",
    "tag\U000e0041\U000e0042",
    "\ufeffbom",
    "\u3164filler",
    "x\U000e0100",
    "\ud800",
    "\ufffe",
    "\x00",
)
FORBIDDEN = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters, surrogates and separators of lines: none of them is ever shown.
"""


def hides(text: str) -> list[str]:
    """Characters that a reader cannot see, by another table than ours: Python's categories, and every format
    character but joiners.
    """
    # these are drawn
    marks = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
    egyptian = [chr(c) for c in range(0x13430, 0x13440)]
    return [
        c
        for c in text
        if unicodedata.category(c) in FORBIDDEN
        or (unicodedata.category(c) == "Cf" and c not in [*marks, *egyptian, "\u200c", "\u200d"])
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_steers_a_screen_or_hides_is_shown(text: str):
    assert not hides(visible(text)) and "\\" in visible(text) and visible(text).isascii()
    assert not hides(one_line(text)) and one_line(text).isascii()


@given(st.text())
def test_nothing_unseen_is_left_and_nothing_else_is_touched(text: str):
    shown = visible(text)
    assert not hides(shown) and visible(shown) == shown
    plain = "".join(c for c in text if (c.isalnum() and c.isascii()) or c in " .,;!?<>&")
    assert visible(plain) == plain


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧‍👦 ❤️ 1️⃣ ✈️", "می‌خواهم", "क्‍ष", "naïve Zürich 日本 ½ “quoted” — dash\xa0space"]
)
def test_joiners_in_their_place_stay(text: str):
    assert visible(text) == text == unescape(escape(text))


def test_by_hand():
    assert visible("a\x1b[1m\u202e\n\t\U000e0041") == "a\\x1b[1m\\u202e\\n\\t\\U000e0041"
    assert visible("a\nb\x07", "\n") == "a\nb\\x07"
    assert visible("x\u200dy \u200d") == "x\\u200dy \\u200d" and visible("e\ufe0f") == "e\\ufe0f"


@given(st.text())
def test_json_for_programs_keeps_its_value(text: str):
    shown = visible_json(json.dumps({"a": text}, ensure_ascii=False))
    assert json.loads(shown) == {"a": text} and not hides(shown)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_terminal_gets_escapes(text: str, capsys: pytest.CaptureFixture[str]):
    screen = Screen()
    screen.say(f"feature 1: {text}")
    screen.table([(text, "x")], ("explanation", "r"))
    screen.result({"text": text})
    put(f"Report: {text}")
    seen = capsys.readouterr()
    assert not hides(seen.out.replace("\n", "")) and not hides(seen.err.replace("\n", ""))
    assert json.loads(next(line for line in seen.out.splitlines() if line.startswith("{"))) == {"text": text}


@pytest.mark.parametrize("text", HOSTILE)
def test_pages_show_escapes(text: str):
    page = environment().from_string("<p title='{{ x }}'>{{ x }}</p>").render(x=f"<b>{text}")
    assert not hides(page) and "<b>" not in page
    result = FeatureResult(3, "s", 1.0, 0.1, 5, (), Explanation.sentence(f"x {text}", Provenance("test")))
    assert not hides(results_table([result]).replace("\n", ""))


@given(st.text())
def test_a_listed_token_holds_no_separator(text: str):
    assert "|" not in listed(text).replace("\\\\", "").replace("\\|", "") and unescape(listed(text)) == text


@pytest.mark.parametrize("style", [SentenceStyle(), RulesStyle()])
def test_tokens_cannot_forge_the_separator_of_a_list(style: SentenceStyle | RulesStyle):
    windows = tuple(
        Window(i, i, np.zeros(2, np.int32), (piece, " tail"), np.array([9 - i, 0], np.float32))
        for i, piece in enumerate(("a | b", "|", " c |"))
    )
    record = FeatureRecord(FeatureId("s", 3), 9.0, 0.1, 5, {"train": {"top": windows}})
    line = next(
        x for x in style.messages(record, windows)[-1].content.splitlines() if x.startswith("Tokens: ")
    )
    assert line.removeprefix("Tokens: ").split(SEPARATOR) == ["a \\| b", "\\|", " c \\|"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
def test_results_with_any_line_separator_are_read_back(character: str, tmp_path: Path):
    """JSON lines end at line feeds alone, whatever a text holds."""
    made = FeatureResult(3, "s", 1.0, 0.1, 5, (), Explanation.sentence(f"a{character}b", Provenance("test")))
    write_results(tmp_path, [made, made], {"name": character})
    found, about = read_results(tmp_path)
    assert (list(found), about) == ([made, made], {"name": character})
