"""Explanations on trial: what texts say of them, the loop of falsifying and revising, and that nothing of it
is lost or paid twice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest
from endpoint import endpoint, play
from test_cli import cli
from test_report import rendered

import featureinterp as fi
from featureinterp.domain.chat import Request
from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.result import FeatureResult
from featureinterp.domain.trial import Trial, TrialText
from featureinterp.errors import InputError, LanguageModelError, MalformedReplyError
from featureinterp.explainers.styles import SentenceStyle
from featureinterp.explainers.tree import Tree, TreeSettings
from featureinterp.falsification.counterexamples import Falsifier, TrialSettings, with_counterexamples
from featureinterp.jobs.explain import ExplainJob
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Plan
from featureinterp.llm.function import FunctionModel
from featureinterp.scorers.correlation import agreement
from featureinterp.simulators.lexical import Lexical

WORDS = ("war", "army", "battle")


def explanation(*texts: str) -> Explanation:
    return Explanation(tuple(Rule(t, 5) for t in texts), Provenance("test"))


def window(text: str, row: int) -> Window:
    pieces = tuple(p for p in text.replace(" ", "\0 ").split("\0") if p)
    activations = np.array([4.0 if p.strip(" .") in WORDS else 0.0 for p in pieces], np.float32)
    return Window(row, row, np.arange(len(pieces), dtype=np.int32), pieces, activations)


class Decides:
    """The subject: fires on words of war."""

    settings = {"model": "m"}

    def __init__(self) -> None:
        self.read: list[str] = []

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        self.read += texts
        return [window(t, i) for i, t in enumerate(texts)]


def record() -> FeatureRecord:
    rows = iter(range(100))
    splits = {}
    for split, end in (("train", ""), ("valid", " once"), ("test", " again")):  # a text is in one split only
        top = tuple(
            window(t + end, next(rows)) for t in ("the war was long", "an army of men", "the battle of May")
        )
        silent = tuple(window(t + end, next(rows)) for t in ("the house is calm", "no news today"))
        splits[split] = {"top": top, "random": silent, "random_negative": silent, "similar_negative": ()}
    return FeatureRecord(FeatureId("s", 1), 4.0, 0.01, 90, splits)


class Finds:
    """A judge: what fits holds a word of the explanation. ``unknown``: texts that it cannot judge."""

    settings = {"judge": "finds"}

    def __init__(self, *unknown: str) -> None:
        self.unknown = unknown

    async def __call__(self, explanation: Explanation, texts: Sequence[str]) -> list[float | None]:
        words = set(explanation.text.lower().split())
        return [None if t in self.unknown else 0.9 if words & set(t.lower().split()) else 0.1 for t in texts]


def kind_of(request: Request) -> str:
    asked = request.messages[-1].content
    if "with the same thing in them" in asked:
        return "alike"
    if "nothing in them that fits" in asked:
        return "near"
    return "fitting" if "fits the description" in asked else "other"


ALIKE = ("a long war",)


def writer(
    fitting: list[str],
    near: list[str],
    other: Callable[[Request], str] = lambda _: "?",
    alike: Sequence[str] = ALIKE,
) -> FunctionModel:
    def answer(request: Request) -> str:
        kind = kind_of(request)
        return (
            other(request)
            if kind == "other"
            else json.dumps({"texts": {"fitting": fitting, "near": near, "alike": list(alike)}[kind]})
        )

    return FunctionModel(answer)


def try_it(
    said: Explanation,
    fitting: list[str],
    near: list[str],
    n: int = 8,
    alike: Sequence[str] = (),
    judge: Finds | None = None,
) -> Trial:
    """Without ``alike`` the feature has no example to write texts like."""
    tried = record() if alike else FeatureRecord(FeatureId("s", 1), 4.0, 0.01, 90, {})
    return anyio.run(
        Falsifier(writer(fitting, near, alike=alike), Decides(), judge or Finds(), TrialSettings(n)).run,
        said,
        tried,
    )


def test_precision_and_recall_by_hand():
    trial = try_it(
        explanation("words"), ["the war", "a house", "an army"], ["battle cry", "a <<tree>>", "the war"]
    )
    assert (trial.precision.hits, trial.precision.n) == (2, 3)
    assert (trial.recall.hits, trial.recall.n) == (2, 3), (
        "a near miss that was written as fitting before is not counted twice"
    )
    assert [t.text for t in trial.contradictions] == ["a house", "battle cry"] and trial.f1 == pytest.approx(
        2 / 3
    )
    assert (
        trial.texts[-1].text == "a tree" and Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial
    )
    broad = try_it(explanation("nouns"), ["a house", "a tree"], ["go on"])
    assert broad.precision.value == 0 and broad.recall.value is None and broad.f1 == 0
    narrow = try_it(explanation("the word war"), ["the war", "a war"], ["an army", "a battle", "the army"])
    assert narrow.precision.value == 1 and narrow.recall.value == pytest.approx(0.4)


def test_texts_like_the_examples_show_what_is_too_narrow():
    alike = ["an army of <<men>>", "a battle", "the war", "a calm war", "what"]
    narrow = try_it(explanation("the word war"), ["the war"], ["go on"], alike=alike, judge=Finds("what"))
    found = {t.text: (t.fits, t.alike, narrow.fires(t)) for t in narrow.texts}
    assert found["the war"] == (True, False, True), "a text that was written as fitting is not judged again"
    assert (
        found["an army of men"] == (False, True, True)
        and found["a battle"] == (False, True, True)
        and found["a calm war"] == (True, True, True)
    )
    assert "what" not in found, "a text that could not be judged says nothing"
    assert (narrow.recall.hits, narrow.recall.n) == (2, 4) and narrow.precision.value == 1
    assert [t.text for t in narrow.contradictions] == ["an army of men", "a battle"]
    assert Trial.from_json(json.loads(json.dumps(narrow.to_json()))) == narrow
    with pytest.raises(LanguageModelError, match="could be judged"):
        try_it(explanation("x"), ["the war"], ["go on"], alike=["what"], judge=Finds("what"))


def test_the_writer_is_shown_training_examples_alone():
    model = writer(["the war"], ["go on"])
    anyio.run(Falsifier(model, Decides(), Finds(), TrialSettings(2)).run, explanation("war"), record())
    asked = next(r for r in model.requests if kind_of(r) == "alike").messages[-1].content
    assert (
        "the<< war>> was long" in asked
        and asked.count("\n- ") + asked.startswith("- ") == 3
        and "calm" not in asked
    )


def test_a_near_miss_with_a_word_of_the_explanation_is_none():
    trial = try_it(
        explanation('"war", "an army": words of war', "boats"),
        ["the war"],
        ["A WAR came", "warm days", "an army came", "the army came", "boats"],
    )
    assert [t.text for t in trial.texts] == ["the war", "warm days", "the army came", "boats"]


def test_a_text_fires_above_a_share_of_the_scale():
    texts = (TrialText("a", True, ("a",), (0.3,)), TrialText("b", True, ("b",), (0.5,)))
    assert [Trial((), texts, 0.4).fires(t) for t in texts] == [False, True]
    for wrong in ({"n_texts": 0}, {"rounds": 0}, {"fires_above": 1.0}):
        with pytest.raises(InputError):
            TrialSettings(**wrong)


def test_half_a_trial_is_none():
    def answer(request: Request) -> str:
        return json.dumps({"texts": ["the war"]}) if kind_of(request) == "fitting" else "no"

    with pytest.raises(MalformedReplyError):
        anyio.run(Falsifier(FunctionModel(answer), Decides(), Finds()).run, explanation("x"), record())

    def silent(request: Request) -> str:
        return "no" if kind_of(request) == "alike" else json.dumps({"texts": [kind_of(request)]})

    with pytest.raises(LanguageModelError, match="no text like the examples was written"):
        anyio.run(Falsifier(FunctionModel(silent), Decides(), Finds()).run, explanation("x"), record())


def test_counterexamples_are_shared_between_training_and_validation():
    trial = try_it(explanation("nouns"), ["a house", "the war", "a tree"], ["an army", "go on"])
    found = with_counterexamples(record(), [trial])
    train, valid = found.get("train", "counterexample"), found.get("valid", "counterexample")
    assert [w.text for w in train] == ["a house", "an army", "go on"] and [w.text for w in valid] == [
        "a tree",
        "the war",
    ]
    assert not found.get("test", "counterexample")
    assert [w.text for w in found.get("train", "top")] == [w.text for w in record().get("train", "top")]


IMPROVED = json.dumps(
    {"improvement": "it is only about war", "explanation": '"war", "army", "battle": words of conflict'}
)


def job(tmp_path: Path, model: FunctionModel, activator: Decides, rounds: int = 2) -> ExplainJob:
    class Says:
        settings = {"explainer": "says"}

        async def explain(self, record: FeatureRecord) -> Explanation:
            return explanation("the word war and things such as a house or a tree")

    simulator = Lexical()
    reviser = Tree(
        model,
        SentenceStyle(),
        simulator,
        agreement,
        tree=TreeSettings(roots=1, depth=1, width=1, branching=1, n_windows=6),
    )
    falsifier = Falsifier(model, activator, Finds(), TrialSettings(4, rounds))
    plan = Plan(3, 3, negatives=("random",))
    return ExplainJob(
        Journal(tmp_path / "j.sqlite"), Says(), simulator, falsifier=falsifier, reviser=reviser, plan=plan
    )


def finished(made: ExplainJob) -> FeatureResult:
    outcome = anyio.run(made.run, [1], lambda wanted: iter([record() for _ in wanted]))
    assert outcome.stopped is None
    return next(made.journal.features(made.key, [1]))


BROAD = (["a house stood", "a tree fell", "the war"], ["an army came", "go on"])


def test_explain_falsify_revise(tmp_path: Path):
    model = writer(*BROAD, other=lambda _: IMPROVED)
    result = finished(job(tmp_path, model, Decides()))
    first, second = result.trials
    assert first.precision.value == 2 / 4, (
        "of three texts that were written to fit and one like the examples that does"
    )
    assert [t.text for t in first.contradictions] == ["a house stood", "a tree fell", "an army came"]
    assert result.revised is not None and result.revised.text == '"war", "army", "battle": words of conflict'
    assert second.rules == result.revised.rules and result.revised_correlation is not None
    own = result.score("correlation")
    assert own is not None and own.value is not None and result.revised_correlation > own.value
    precision = result.score("trial_precision")
    assert (
        precision is not None
        and precision.value == 2 / 4
        and precision.interval is not None
        and precision.n_scored == 4
    )
    feedback = next(r for r in model.requests if kind_of(r) == "other").messages[-1].content
    assert re.search(r"^ house\t\d\.\d\t0\.0\t\+", feedback, re.MULTILINE), (
        "the search is shown texts that broke the explanation"
    )
    assert FeatureResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    again, activator = writer(*BROAD, other=lambda _: IMPROVED), Decides()
    assert finished(job(tmp_path, again, activator)) == result and not again.requests and not activator.read


def test_what_holds_is_not_revised_and_one_round_is_one_trial(tmp_path: Path):
    held = finished(job(tmp_path / "a", writer(["the war", "an army"], ["go on"]), Decides()))
    assert len(held.trials) == 1 and held.revised is None and not held.trials[0].contradictions
    once = finished(job(tmp_path / "b", writer(*BROAD), Decides(), rounds=1))
    assert len(once.trials) == 1 and once.revised is None


def test_a_trial_that_fails_is_a_row(tmp_path: Path):
    result = finished(job(tmp_path, FunctionModel(lambda _: "no JSON"), Decides()))
    assert (
        [f.stage for f in result.failures] == ["falsify"]
        and not result.trials
        and result.score("trial_precision") is None
    )
    assert result.score("correlation") is not None, "what was found before is kept"


def test_the_report_shows_what_broke_it_and_escapes_it(tmp_path: Path):
    texts = ["<script>alert(1)</script> a house", "the war", "a tree fell"]
    result = finished(
        job(tmp_path, writer(texts, ["an army came", "go on"], other=lambda _: IMPROVED), Decides())
    )
    page = rendered([result], {"title": "t", "subtitle": "s", "facts": {}})
    assert "On trial" in page and "Revision on trial" in page and "only near, and fires" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def answers(body: dict) -> object:
    """A played endpoint that also writes texts, some of which the tiny model's features fire on."""
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    if "texts" in schema.get("properties", {}):
        n = schema["properties"]["texts"]["minItems"]
        return json.dumps(
            {"texts": [f"The army marched in March and the fleet sailed {i} miles." for i in range(n)]}
        )
    return play(body)


@pytest.fixture
def run_copy(tmp_path: Path, run: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_verb_goes_on_from_a_finished_job(tmp_path: Path, run_copy: Path, subject_folder: Path):
    with endpoint(answers) as server:
        common = ["--base-url", server.url, "--llm-model", "m"]
        options = [
            "--features",
            "random:2",
            "--simulator",
            "lexical",
            "--no-questions",
            "--n-test",
            "3",
            "--model",
            str(subject_folder),
        ]
        done = cli("explain", str(run_copy), *options, "--negatives", "random", *common)
        assert done.returncode == 0, done.stderr
        asked = len(server.ledger)
        found = cli("falsify", str(run_copy), "--texts", "3", "--json")
        assert found.returncode == 0, found.stderr
        features = json.loads(found.stdout)["features"]
        assert len(features) == 2 and all(f["trials"] and len(f["trials"][0]["texts"]) >= 3 for f in features)
        assert len(server.ledger) > asked and not server.paid_twice()
        asked = len(server.ledger)
        again = cli("falsify", str(run_copy), "--texts", "3")
        assert again.returncode == 0 and len(server.ledger) == asked and "broken by" in again.stdout
    none = cli("falsify", str(tmp_path / "nowhere"))
    assert none.returncode == 2 and "Traceback" not in none.stderr


def test_a_dry_run_counts_trials_and_steering(tmp_path: Path, run_copy: Path, subject_folder: Path):
    with endpoint(answers) as server:
        job = fi.Job(
            run=run_copy,
            out=tmp_path / "out",
            features="random:2",
            stages=("explain", "simulate", "falsify", "steer"),
            simulator="lexical",
            llm=fi.Endpoint(server.url, "m"),
            model=str(subject_folder),
            plan=fi.Plan(3, 2, negatives=("random",)),
            steering={"doses": (1.0,), "openings": ("We",), "n_random": 1, "max_tokens": 4},
        )
        plan = fi.dry_run(job)
        assert not server.ledger and plan.left == 2
        results = fi.run(job)
        assert all(r.trials and r.intervention for r in results) and not results.n_failures
        paid = len(server.ledger) - 1  # that of the check of the endpoint
        assert 0 < paid <= plan.requests and fi.dry_run(job).left == 0
