"""The report: complete, self-contained, and nothing of a text or a model's reply ever becomes part of the
page.
"""

from __future__ import annotations

import html.parser
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import NASTY

from featureinterp.api import Results
from featureinterp.domain.explanation import Explanation, Provenance, Rule, SearchNode
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Failure, Interval, Score
from featureinterp.errors import DamagedStoreError, InputError
from featureinterp.reports.render import (
    histogram,
    number,
    read_results,
    search_rows,
    summarise,
    visible,
    whisker,
    write_report,
    write_results,
)
from featureinterp.stored.sums import sealed

P = Provenance("one-shot", "m", "explain/v1", "h")
ABOUT = {"title": "T", "subtitle": "S", "facts": {"Subject": "tiny <b>"}}


def shown(pieces: tuple[str, ...], source: str = "top", split: str = "test") -> ShownWindow:
    n = len(pieces)
    return ShownWindow(
        split, source, 1, "doc <1>", pieces, (2.0,) + (0.0,) * (n - 1), (4.5,) + (0.1,) * (n - 1), None
    )


def result(index: int = 7, text: str = "names of months", **changes: object) -> FeatureResult:
    score = Score(
        "correlation", 0.61, 16, 1, Interval(0.4, 0.8), null=0.05, null_interval=Interval(-0.1, 0.2)
    )
    made = FeatureResult(
        feature=index,
        sae="demo",
        scale=4.0,
        density=0.0123,
        count=99,
        windows=(shown((" May", " we")), shown((" so",), "similar_negative"), shown((" x",), "top", "train")),
        explanation=Explanation((Rule(text, 5), Rule("dates", 2)), P),
        scores=(
            score,
            Score("explained_variance", None, 16, undefined="constant <i>"),
            Score("complexity", 2.5, 2),
        ),
        baseline=Explanation((Rule('" May"', 4),), Provenance("top-tokens")),
        baseline_scores=(Score("correlation", 0.7, 16, interval=Interval(0.5, 0.9)),),
        null_of=8,
        shortfalls={"test/top": "8 of 10: few"},
        complexity=(2.0, None),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def rendered(results: Sequence[FeatureResult], about: Mapping[str, Any], labels: Any = None) -> str:
    """The page that is written for results."""
    with tempfile.TemporaryDirectory() as folder:
        return write_report(Path(folder) / "r.html", results, about, labels).read_text(encoding="utf-8")


def test_what_the_page_shows():
    page = rendered(
        [
            result(),
            result(
                8,
                "the word of",
                explanation=None,
                failures=(Failure(8, "explain", "TruncatedReplyError", "cut"),),
            ),
        ],
        ABOUT,
    )
    text = " ".join(Page(page).texts)
    for expected in (
        "names of months",
        "0.61",
        "0.40 to 0.80",
        "1 failed",
        "undefined: constant <i>",
        "TruncatedReplyError: cut",
        "8 of 10: few",
        "tiny <b>",
        "doc <1>",
    ):
        assert expected in text, expected
    assert 'id="f7"' in page and 'href="#f8"' in page


def searched(text: str) -> FeatureResult:
    """A feature whose explanation was searched for, with causes."""
    nodes = (
        SearchNode(0, None, 0, (Rule("dates", 5),), None, 0.3, 0.25, 0.2, kept=True),
        SearchNode(1, None, 0, (Rule("spring", 4),), None, 0.1, None, None),
        SearchNode(
            2, 0, 1, (Rule(text, 5), Rule("dates", 2)), f"too broad {text}", 0.7, 0.6, 0.61, chosen=True
        ),
        SearchNode(3, 0, 1, (), None, failure=f"MalformedReplyError: {text}"),
    )
    window = replace(shown((" May", " we"), split="train"), predicted=None, holistic=(0.5, -0.1))
    return result(
        explanation=Explanation((Rule(text, 5), Rule("dates", 2)), P, search=nodes),
        windows=(window, shown((" so",))),
        holistic="exact",
    )


def test_a_search_is_drawn_as_a_tree_and_causes_are_marked():
    page = rendered([searched("names of months")], ABOUT)
    assert "4 explanations tried, 1 of them improved" in page
    rows = re.search(r'<table class="search">.*?</table>', page, re.DOTALL)
    assert rows is not None
    order = re.findall(r"dates;|dates|spring|MalformedReplyError", rows[0])
    assert order == ["dates", "dates", "MalformedReplyError", "spring"]
    assert (
        rows[0].count('class="chosen"') == 1
        and "too broad names of months" in rows[0]
        and "0.61" in rows[0]
        and "–" in rows[0]
    )
    assert page.count("--c:1.00") == 1 and "without this token the feature would fire less" in page
    plain = rendered([result()], ABOUT)
    assert "--c:" not in plain and 'class="search"' not in plain and "would fire less" not in plain


def test_a_tree_is_read_from_every_root_down():
    parents = [None, None, 0, 0, 1, 2, 4, None]
    nodes = [SearchNode(i, parent, 0, (Rule("x", 1),)) for i, parent in enumerate(parents)]
    assert [n.number for n in search_rows(nodes)] == [0, 2, 5, 3, 1, 4, 6, 7]


def test_the_page_needs_nothing_from_outside():
    page = Page(rendered([result()], ABOUT))
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "data", "poster", "srcset"):
            assert value.startswith("#"), (tag, name, value)
    assert {"link", "img", "iframe", "form", "object"}.isdisjoint(page.tags)
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1


@pytest.mark.parametrize(
    "nasty", [*NASTY, '"><img src=x onerror=alert(1)>', "javascript:alert(1)", "{{ 7 * 7 }}"]
)
def test_hostile_text_is_shown_as_text_everywhere(nasty: str):
    plain = rendered([result(), searched("x")], ABOUT)
    bad = result(
        text=nasty,
        windows=(shown((nasty, " tail")),),
        failures=(Failure(7, nasty, nasty, nasty),),
        shortfalls={nasty: nasty},
        baseline=Explanation((Rule(nasty, 4),), P),
        sae=nasty,
    )
    hostile = rendered([bad, searched(nasty)], {"title": nasty, "subtitle": nasty, "facts": {nasty: nasty}})
    a, b = Page(plain), Page(hostile)
    assert set(b.tags) <= {*a.tags, "em"} and b.tags.count("script") == 1
    assert not [x for x in b.attributes if x[1].startswith("on")]
    if "alert(1)" in nasty:
        assert not re.search(r"<script>alert|<img", hostile)
    assert "49" not in b.texts


@given(st.text(max_size=30))
def test_visible_text_has_no_control_or_direction_characters(text: str):
    out = visible(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", out)


def test_results_round_trip(tmp_path: Path):
    results = [result(), result(8, explanation=None, scores=(), baseline=None), searched("months")]
    write_results(tmp_path, results, ABOUT)
    again, about = read_results(tmp_path)
    assert list(again) == results and about == ABOUT
    assert rendered(again, about) == rendered(results, ABOUT)


def test_missing_or_damaged_results_are_one_sentence(tmp_path: Path):
    with pytest.raises(InputError, match="no results"):
        read_results(tmp_path)
    write_results(tmp_path, [result()], ABOUT)
    (tmp_path / "results.jsonl").write_text('{"feature": 1}\n')
    with pytest.raises(
        DamagedStoreError, match=r"results.jsonl has .* run the same 'featureinterp explain' again"
    ):
        read_results(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps(sealed(ABOUT, {})))
    with pytest.raises(DamagedStoreError, match=r"about.json has no checksums of results.jsonl"):
        read_results(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))  # as versions before checksums wrote it
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path)
    with pytest.raises(InputError, match="no result"):
        write_report(tmp_path / "r.html", [], ABOUT)


def test_the_summary_by_hand():
    clear, touching = result(1), result(2)
    beaten = Score(
        "correlation", 0.1, 5, interval=Interval(-0.1, 0.3), null=0.2, null_interval=Interval(0.1, 0.4)
    )
    undefined = Score("correlation", None, 0, undefined="constant")
    found = summarise(
        [
            clear,
            touching,
            replace(clear, scores=(beaten,)),
            replace(clear, scores=(undefined,)),
            replace(clear, explanation=None, scores=()),
        ]
    )
    assert (found["n"], found["n_explained"], found["n_scored"]) == (5, 4, 3)
    assert (
        found["clear_of_null"],
        found["beats_null_value"],
        found["beats_baseline"],
        found["n_baseline"],
    ) == (2, 2, 0, 3)
    assert found["median"] == 0.61 and found["median_null"] == 0.05
    assert clear.scores[0].clear_of_null and not beaten.clear_of_null and not undefined.clear_of_null


def test_the_histogram_by_hand():
    made = histogram({"explanation": [-0.9, -0.2, 0.0, 0.05, 0.99, 1.0], "null": []})
    assert made["counts"]["explanation"] == [2, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2] and made["most"] == 2
    assert made["edges"][0] == -0.2 and made["edges"][-1] == pytest.approx(1.0)


def test_figures_and_whiskers():
    assert (number(-0.004), number(-0.126), number(None), number(2, 0)) == ("0.00", "−0.13", "–", "2")
    places = whisker(Score("s", 0.4, 3, interval=Interval(-0.5, 1.0), null=0.1))
    assert (
        places["value"] == 50 and places["low"] == 0 and places["high"] == 100 and places["null_low"] is None
    )


def test_results_draw_themselves_in_a_notebook(tmp_path: Path):
    results = Results((result(text="<script>alert(1)</script>"),), tmp_path, ABOUT)
    drawn = results._repr_html_()
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn and "0.61" in drawn
    assert json.dumps(results.to_json()) and len(results) == 1 and results[0].feature == 7
