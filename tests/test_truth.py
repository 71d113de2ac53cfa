"""The truth benchmark: what the planted detectors fire on, that each explanation is what its kind says, and
how ranking is counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest

from featureinterp.corpus.windows import WindowTable
from featureinterp.domain.chat import Request
from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.errors import MalformedReplyError
from featureinterp.falsification.counterexamples import Falsifier
from featureinterp.falsification.writing import TextWriter
from featureinterp.jobs.records import build_records
from featureinterp.llm.function import FunctionModel
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.scorers.detection import FitJudge
from featureinterp.simulators.lexical import Lexical

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "bench"))

import planted
import truth_explainers
import truth_falsify
import truth_scores
from planted import FEATURES, Planted, activations, development, spans

BY_NAME = {f.name: f for f in FEATURES}


def fires(name: str, text: str) -> list[str]:
    """The texts on which a feature's detectors fire."""
    return [text[a:b] for part in BY_NAME[name].parts for a, b in spans(part.pattern, text)]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("months", "In May 1848 they may march in March.", ["May", "March"]),
        ("negation", "Not one, nor two; nothing notable.", ["Not", "nor", "nothing"]),
        ("states", "from Texas and the Texans to Ohio", ["Texas", "Ohio"]),
        ("un", "unjust under unity, unless unhappy", ["unjust", "unless", "unhappy"]),
        ("capitals", "He saw the Senate. The House, Sir", ["Senate", "House", "Sir"]),
        ("of-after-house", "of the House of Peers, Secretary of War", ["of", "of"]),
        ("i-verb", "I am sure that I shall; In all", ["am", "shall"]),
        ("to-be", "to be, be it, to begin", ["be"]),
        ("united-states", "United States, these States", ["States"]),
        ("per-cent", "10 per cent per annum, person", ["cent", "annum"]),
        ("digits", "12,500 men in 7 days", ["12,500", "7"]),
        ("years", "1862 and 2016, 1600, 21862", ["1862", "2016"]),
        ("amounts", "$5,000 or 5,000", ["$5,000"]),
        ("quotations", 'he said "no peace" and “war”, so', ["no peace", "war"]),
        ("parentheses", "a (b c) d", ["b c"]),
        ("latin", "an ad valorem duty per annum", ["ad valorem", "per annum"]),
        ("sentence-start", "It is. The war! We go", ["The", "We"]),
        ("before-stop", "It ended. They left. U.S. men", ["ended", "left", "S"]),
        ("text-start", " the House of", ["the"]),
        ("months+water", "a river in June", ["June", "river"]),
    ],
)
def test_what_detectors_fire_on(name: str, text: str, found: list[str]):
    assert fires(name, text) == found


def test_activations_are_graded_and_on_the_tokens_of_the_match():
    pieces = (" in", " Feb", "ruary", ",", " a", " river")
    one, two = (activations(BY_NAME["months+water"], pieces, row) for row in (3, 4))
    assert (one > 0).tolist() == [False, True, True, False, False, True]
    assert one[1] == one[2] and 0.51 * 8 <= one[1] <= 8 and 0.51 * 3.2 - 1e-6 <= one[5] <= 3.2
    assert one[1] != two[1] and np.array_equal(one, activations(BY_NAME["months+water"], pieces, 3))
    assert (
        not activations(BY_NAME["months"], (" we", " sailed"), 0).any()
        and len(activations(BY_NAME["months"], (), 0)) == 0
    )


def test_every_feature_has_its_explanations():
    assert len(FEATURES) >= 40 and len(BY_NAME) == len(FEATURES) and len({f.family for f in FEATURES}) >= 8
    for feature in FEATURES:
        found = truth_scores.explanations(feature)
        texts = [tuple((r.activates_on, r.strength) for r in e.rules) for e in found.values()]
        assert len(set(texts)) == len(texts), feature.name
        union = feature.family == "union"
        assert set(found) == {
            "true",
            "another concept",
            "too broad",
            "too narrow",
            *({"rule missing", "strengths swapped"} if union else set()),
        }
        assert found["another concept"].text != found["true"].text
        if union:
            strong, weak = found["true"].rules
            assert (strong.strength, weak.strength) == (5, 2) and found["rule missing"].rules == (strong,)
            assert [(r.activates_on, r.strength) for r in found["strengths swapped"].rules] == [
                (weak.activates_on, 5),
                (strong.activates_on, 2),
            ]
    halves = [development(f) for f in FEATURES]
    assert abs(sum(halves) * 2 - len(halves)) <= len({f.family for f in FEATURES})


def test_planted_codes_are_the_detectors_activations(tmp_path: Path, windows: WindowTable):
    features = [BY_NAME[name] for name in ("months", "negation", "text-start", "digits")]
    store = planted.plant(tmp_path, windows, features)
    for index, feature in enumerate(features):
        rows = range(len(windows))
        found = store.window_activations(index, rows)
        for row in rows:
            expected = activations(feature, windows.pieces(row), row)
            np.testing.assert_allclose(found[row][: len(expected)], expected, rtol=1e-3)
    assert store.counts()[0] > 0 and planted.plant(tmp_path, windows, features).meta == store.meta


@pytest.fixture
def windows(tmp_path: Path, subject: object, corpus_file: Path) -> WindowTable:
    from featureinterp.corpus.text import load_corpus
    from featureinterp.corpus.windows import WindowPolicy, build_windows

    return build_windows(
        load_corpus(str(corpus_file)), subject.encoder, WindowPolicy(24, 24, 5000), tmp_path / "windows"
    )  # type: ignore[attr-defined]


def rows_of(score: str, values: dict[str, list[float | None]]) -> list[truth_scores.Row]:
    made = Planted("x", "f", (), "", "")
    return [
        truth_scores.row_of(planted.replace(made, name=str(i)), kind, score, "random", value)
        for kind, column in values.items()
        for i, value in enumerate(column)
    ]


def test_ranking_is_counted_within_features():
    values: dict[str, list[float | None]] = {
        "true": [0.9, 0.2, 0.5, None],
        "too broad": [0.1, 0.3, 0.5, None],
        "rule missing": [None, None, 0.6, -1.0],
    }
    table = {t["wrong"]: t for t in truth_scores.ranked(rows_of("correlation", values))}
    assert (
        table["too broad"]["auroc"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4) and table["too broad"]["n"] == 4
    )
    assert table["rule missing"]["auroc"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    interval = table["too broad"]["interval"]
    assert interval is not None and 0 <= interval.low <= 0.5 <= interval.high <= 1
    fewer = truth_scores.ranked(
        rows_of("false positives (fewer is better)", {"true": [0.0, 3.0], "too broad": [2.0, 1.0]})
    )
    assert fewer[0]["auroc"] == 0.5
    assert [truth_scores.paired(a, b) for a, b in ((1, 0), (0, 1), (1, 1))] == [1.0, 0.0, 0.5]


def test_what_random_windows_alone_would_have_missed():
    made = Planted("x", "f", (), "", "")

    def rows(source: str, values: dict[str, list[float | None]]) -> list[truth_scores.Row]:
        return [
            truth_scores.row_of(planted.replace(made, name=str(i)), kind, "correlation", source, v)
            for kind, column in values.items()
            for i, v in enumerate(column)
        ]

    easy = rows("random", {"true": [0.5, 0.5, 0.5, 0.5], "too broad": [0.6, 0.5, 0.4, 0.1]})
    hard = rows("similar_negative", {"true": [0.5, 0.5, 0.5, 0.5], "too broad": [0.4, 0.7, 0.6, None]})
    entry = next(t for t in truth_scores.missed([*easy, *hard]) if t["wrong"] == "too broad")
    assert list(entry.values()) == ["too broad", 4, 2, 1, 1]


class OneHot:
    """Texts are near when they share a word."""

    words = sorted({word for f in FEATURES for p in f.parts for word in p.text.split()})

    def embed(self, texts: list[str]) -> np.ndarray:
        vectors = np.array([[float(word in text.split()) for word in self.words] for text in texts])
        return vectors / np.maximum(1e-9, np.linalg.norm(vectors, axis=1, keepdims=True))


class Says:
    """An explainer with a given answer."""

    def __init__(self, *rules: str) -> None:
        self.rules = rules

    async def explain(self, record: object) -> Explanation:
        if not self.rules:
            raise MalformedReplyError("no rule at all")
        return Explanation(tuple(Rule(text, 5) for text in self.rules), Provenance("x"))


def test_an_explainer_finds_what_is_nearest(tmp_path: Path, windows: WindowTable):
    union = BY_NAME["months+water"]
    store = planted.plant(tmp_path, windows, [union, BY_NAME["negation"]])
    counts = {
        "top": (2, 2, 2),
        **{
            source: (0, 2, 2)
            for source in truth_scores.BESIDE
            if not source.startswith(("similar", "projected"))
        },
    }
    record = next(iter(build_records(tmp_path, store, [0], RecordPolicy(counts))))
    descriptions = truth_explainers.Descriptions(OneHot())
    month, water = (p.text for p in union.parts)

    def row(*rules: str) -> truth_scores.Row:
        return anyio.run(
            truth_explainers.explained, Says(*rules), "says", Lexical(), descriptions, union, record
        )

    found = [
        row(month, water),
        row(month),
        row(month, "names of countries other than the United States"),
        row("words about money, gold and banks"),
    ]
    assert [r["named"] for r in found] == [1, 0.5, 0.5, 0] and [r["right"] for r in found] == [1, 1, 0.5, 0]
    assert all(r["failure"] is None for r in found) and found[0]["explanation"] == f"{month}; {water}"
    failed = row()
    assert (failed["named"], failed["explanation"], failed["failure"]) == (0.0, None, "no rule at all")


def test_every_explainer_is_in_the_benchmark():
    assert set(truth_explainers.explainers(object(), object(), small=True)) == {
        "top tokens", "one-shot, sentence v1", "one-shot, rules v1", "one-shot, sentence", "one-shot, rules",
        "tree, sentence", "tree, rules",
    }  # fmt: skip


def test_trials_and_sensitivity_by_planted_detectors(subject: object, tmp_path: Path, windows: WindowTable):
    texts = {
        "months": ["In March we met.", "It was June.", "A month later"],
        "other": ["We sailed.", "The sea"],
    }

    def answer(request: Request) -> str:
        asked = request.messages[-1].content
        if "Does the text contain it?" in asked:
            return (
                "Yes"
                if any(m in asked.split("Text:")[1] for m in (" March", " June")) and "months" in asked
                else "No"
            )
        fits = "fits the description" in asked and "nothing in them" not in asked
        about_months = "names of months" in asked or "December" in asked or "<< March>>" in asked
        return json.dumps({"texts": texts["months" if about_months and (fits or "<<" in asked) else "other"]})

    model, activator = FunctionModel(answer), truth_falsify.PlantedActivator(subject.encoder)
    store = planted.plant(tmp_path, windows, FEATURES[:2])
    counts = {"top": (4, 2, 2), "random": (0, 2, 2), "random_negative": (0, 2, 2)}
    records = list(build_records(tmp_path, store, [0, 1], RecordPolicy(counts)))
    rows = anyio.run(
        truth_falsify.tried,
        Falsifier(model, activator, FitJudge(model)),
        Lexical(),
        BY_NAME["months"],
        records[0],
    )
    found = {r["explanation"]: r for r in rows}
    assert (
        found["true"]["precision"] == pytest.approx(2 / 3)
        and found["true"]["recall"] == 1
        and found["another concept"]["precision"] == 0
    )
    assert found["too narrow"]["recall"] == 1, (
        "its own texts fit it here, and those like the examples are the same"
    )
    truth_falsify.print_trials(rows)
    sensed = anyio.run(truth_falsify.sensed, TextWriter(model, per_call=3), activator, records, 3)
    assert (
        sensed[0]["sensitivity"] == pytest.approx(2 / 3)
        and sensed[1]["control"] == 0
        and [r["feature"] for r in sensed] == ["months", "negation"]
    )
    truth_falsify.print_sensitivity(sensed)
