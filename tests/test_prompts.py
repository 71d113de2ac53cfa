"""Prompts: strict rendering, reversible escaping, and no text that can leave its line."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import NASTY

from featureinterp.errors import UnknownNameError
from featureinterp.prompts import Prompt, escape, load_prompt, marked, unescape
from featureinterp.resources import prompts_folder

ALL = [(p.parent.name, p.name) for p in prompts_folder().glob("*/*")]


@given(st.text())
def test_escaping_is_undone(text: str):
    assert unescape(escape(text)) == text


@given(st.text())
def test_escaped_text_stays_on_its_line_and_holds_no_mark(text: str):
    out = escape(text)
    assert (
        len(out.splitlines()) <= 1
        and "\t" not in out
        and "<<" not in out
        and ">>" not in out
        and "\x00" not in out
    )


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_is_escaped_reversibly(text: str):
    assert unescape(escape(text)) == text


@given(st.lists(st.tuples(st.text(alphabet="<>a \n\\", max_size=4), st.booleans()), max_size=8))
def test_marks_are_the_only_double_brackets(parts: list[tuple[str, bool]]):
    out = marked([p for p, _ in parts], [m for _, m in parts])
    runs = sum(m and (i == 0 or not parts[i - 1][1]) for i, (_, m) in enumerate(parts))
    hidden = out.replace("\\\\", "\2").replace("\\<", "\0").replace("\\>", "\1")
    assert hidden.count("<<") == hidden.count(">>") == runs
    assert unescape(
        hidden.replace("<<", "").replace(">>", "").replace("\0", "<").replace("\1", ">").replace("\2", "\\\\")
    ) == "".join(p for p, _ in parts)


def test_marked_by_hand():
    assert marked([" not", "-", "B", " x"], [False, False, True, True]) == " not-<<B x>>"
    assert marked(["a<", "b"], [False, True]) == "a\\<<<b>>"


def test_rendering_is_strict_and_never_reads_values_as_templates():
    prompt = Prompt("t", "v1", {"a.j2": "[{{ text }}]"})
    assert prompt.render("a.j2", text="{{ 1 + 1 }} {% raw %} <b>") == "[{{ 1 + 1 }} {% raw %} <b>]"
    with pytest.raises(jinja2.UndefinedError):
        prompt.render("a.j2")


def test_the_hash_changes_with_any_file():
    one = Prompt("t", "v1", {"a": "x", "b": "y"})
    assert one.hash == Prompt("t", "v2", {"b": "y", "a": "x"}).hash
    assert (
        len({one.hash, Prompt("t", "v1", {"a": "x"}).hash, Prompt("t", "v1", {"a": "x", "b": "z"}).hash}) == 3
    )


@pytest.mark.parametrize(("task", "version"), ALL)
def test_every_prompt_parses(task: str, version: str):
    prompt = load_prompt(task, version)
    for name in prompt.files:
        if name.endswith(".j2"):
            jinja2.Environment(autoescape=True).parse(prompt.files[name])
        if name.endswith(".json"):
            json.loads(prompt.files[name])
    assert sum(len(t) for t in prompt.files.values()) < 4000


def test_missing_prompts_name_what_there_is():
    with pytest.raises(UnknownNameError, match="v1"):
        load_prompt("detect", "v99")
    with pytest.raises(UnknownNameError, match="task"):
        load_prompt("nothing", "v1")


def test_prompts_lie_where_they_are_looked_for():
    assert (Path(prompts_folder()) / "detect" / "v1" / "system.txt").exists()
