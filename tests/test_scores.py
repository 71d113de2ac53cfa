"""Scores against independent implementations, and the cases in which they are undefined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import linear_model, metrics

from featureinterp.domain.chat import Reply
from featureinterp.domain.record import Window
from featureinterp.domain.score import Interval, Score, Simulation
from featureinterp.domain.usage import Usage
from featureinterp.intervals import interval_of, resample_counts, weighted_aurocs
from featureinterp.scorers.answers import read_yes
from featureinterp.scorers.complexity import rating
from featureinterp.scorers.correlation import (
    Pairs,
    correlation,
    deviation_explained,
    explained_variance,
    false_positives,
)
from featureinterp.scorers.fuzzing import questions_of
from featureinterp.scorers.verdicts import Verdict, calibrated, judge


def pairs(seed: int, n: int = 12, noise: float = 1.0) -> Pairs:
    rng = np.random.default_rng(seed)
    true = [np.maximum(0, rng.normal(size=rng.integers(3, 9))) * 10 for _ in range(n)]
    return Pairs(tuple(true), tuple(np.clip(t / 4 + noise * rng.normal(size=len(t)), 0, 5) for t in true))


@pytest.mark.parametrize("seed", range(5))
def test_correlation_equals_scipys(seed: int):
    p = pairs(seed)
    score = correlation(p)
    assert score.value == pytest.approx(stats.pearsonr(p.x, p.y).statistic, abs=1e-12)
    assert (
        score.n_scored == 12
        and score.interval is not None
        and score.interval.low < score.value < score.interval.high
    )


def test_the_interval_is_the_bootstrap_over_windows():
    p = pairs(3)
    score = correlation(p, seed=5)
    counts = resample_counts(12, np.random.default_rng(5))
    slow = []
    for row in counts[:2000]:
        x = np.concatenate([np.tile(w, k) for w, k in zip(p.predicted, row, strict=True)])
        y = np.concatenate([np.tile(w, k) for w, k in zip(p.true, row, strict=True)])
        slow.append(np.corrcoef(x, y)[0, 1])
    low, high = np.percentile(slow, [2.5, 97.5])
    assert score.interval is not None
    assert (score.interval.low, score.interval.high) == pytest.approx((low, high), abs=1e-9)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(120):
        rng = np.random.default_rng(1000 + seed)
        x = [rng.normal(size=6) for _ in range(40)]
        y = [0.6 * a + 0.8 * rng.normal(size=6) for a in x]
        interval = correlation(Pairs(tuple(y), tuple(x)), seed=seed).interval
        assert interval is not None
        covered += interval.low <= 0.6 <= interval.high
    assert 0.85 <= covered / 120 <= 1.0


@pytest.mark.parametrize(
    ("true", "predicted", "reason"),
    [
        ([np.zeros(4)], [np.arange(4.0)], "true activations are constant"),
        ([np.arange(4.0)], [np.full(4, 0.7)], "predictions are constant"),
        ([], [], "no window"),
    ],
)
def test_correlation_is_undefined_and_not_zero(
    true: list[np.ndarray], predicted: list[np.ndarray], reason: str
):
    score = correlation(Pairs(tuple(true), tuple(predicted), 2))
    assert score.value is None and reason in (score.undefined or "") and score.n_failed == 2


def test_one_window_has_no_interval():
    assert correlation(Pairs((np.arange(4.0),), (np.array([0, 1, 2, 2.0]),))).interval is None


def test_explained_variance_is_fitted_on_valid_and_applied_to_test():
    valid, test = pairs(1), pairs(2)
    fit = linear_model.LinearRegression().fit(valid.x[:, None], valid.y)
    expected = metrics.r2_score(test.y, fit.predict(test.x[:, None]))
    assert explained_variance(valid, test).value == pytest.approx(expected, abs=1e-12)
    assert expected != pytest.approx(np.corrcoef(test.x, test.y)[0, 1] ** 2, abs=1e-4)
    deviation = 1 - np.abs(test.y - fit.predict(test.x[:, None])).mean() / np.abs(test.y).mean()
    assert deviation_explained(valid, test).value == pytest.approx(deviation, abs=1e-12)
    constant = Pairs((np.zeros(3),), (np.arange(3.0),))
    assert (
        explained_variance(constant, test).value is None and explained_variance(valid, constant).value is None
    )
    assert deviation_explained(valid, constant).undefined is not None


def test_false_positives_by_hand():
    valid = Pairs(
        (np.array([0, 1, 3.0]), np.array([2.0, 0])), (np.array([5.0, 2.5, 5.0]), np.array([0.5, 0]))
    )
    silent = Pairs((np.array([0, 0, 3.0]), np.zeros(2)), (np.array([2.5, 2.4, 5.0]), np.array([3.0, 5.0])), 1)
    score = false_positives(valid, silent)
    assert score.value == 1.5 and score.n_scored == 2 and score.n_failed == 1, (
        "the median prediction over tokens that fire is 2.5"
    )
    unseen = Pairs((np.array([1.0, 1, 0]),), (np.zeros(3),))
    assert false_positives(unseen, silent).value == 2, (
        "an explanation that predicts nothing where the feature fires: whatever it predicts elsewhere counts"
    )
    assert false_positives(Pairs((np.zeros(2),), (np.ones(2),)), silent).undefined is not None
    assert false_positives(valid, Pairs((), (), 3)).undefined == "no window could be simulated"


def test_failed_simulations_are_counted_and_never_filled_in():
    windows = [
        Window(i, i, np.array([1, 2]), ("a", "b"), np.array([0.0, float(i)], np.float32)) for i in range(3)
    ]
    made = Pairs.of(
        windows, [Simulation(np.array([0.0, 1.0])), Simulation(None, "cut"), Simulation(np.array([1.0, 2.0]))]
    )
    assert made.n_failed == 1 and made.y.tolist() == [0, 0, 0, 2]
    with pytest.raises(AssertionError):
        Pairs.of(windows[:1], [Simulation(np.zeros(3))])


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_equal_scikit_learns(seed: int):
    rng = np.random.default_rng(seed)
    labels = rng.random(30) < 0.4
    probability = np.round(np.clip(labels * 0.3 + rng.random(30) * 0.7, 0, 1), 1)
    verdicts = [
        Verdict(bool(y), bool(p > 0.5), float(p), row=i // 2)
        for i, (y, p) in enumerate(zip(labels, probability, strict=True))
    ]
    scores = {s.name: s for s in judge("d", [*verdicts, Verdict(True, None, failure="down")])}
    assert scores["d_balanced_accuracy"].value == pytest.approx(
        metrics.balanced_accuracy_score(labels, probability > 0.5)
    )
    assert scores["d_f1"].value == pytest.approx(metrics.f1_score(labels, probability > 0.5))
    assert scores["d_auroc"].value == pytest.approx(metrics.roc_auc_score(labels, probability))
    assert all(s.n_failed == 1 and s.n_scored == 30 for s in scores.values())
    windows = np.arange(30) // 2
    slow = []
    for row in resample_counts(15, np.random.default_rng(0))[:2000]:
        units = np.concatenate([np.flatnonzero(windows == w).repeat(k) for w, k in enumerate(row)])
        slow.append(
            metrics.roc_auc_score(labels[units], probability[units])
            if len(set(labels[units].tolist())) == 2
            else np.nan
        )
    interval = scores["d_auroc"].interval
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(
        tuple(np.nanpercentile(slow, [2.5, 97.5])), abs=1e-9
    ), "the bootstrap is over windows, not questions"


def test_calibration_puts_a_leaning_model_right():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2 == 0
    probability = 1 / (1 + np.exp(-(4 * labels - 7 + rng.normal(size=60))))
    verdicts = [
        Verdict(bool(y), bool(p > 0.5), float(p), row=i)
        for i, (y, p) in enumerate(zip(labels, probability, strict=True))
    ]
    scores = {s.name: s for s in judge("d", verdicts)}
    assert (
        scores["d_balanced_accuracy"].value == pytest.approx(0.5)
        and scores["d_calibrated_accuracy"].value > 0.9
    )


def test_a_questions_own_window_is_not_in_its_calibration():
    labels, windows = np.arange(24) % 2 == 0, np.arange(24) // 2
    first = calibrated(np.linspace(0.1, 0.9, 24), labels, windows)
    p = np.linspace(0.1, 0.9, 24)
    for window in range(12):
        changed = labels.copy()
        changed[windows == window] = ~changed[windows == window]
        again = calibrated(p, changed, windows)
        assert first is not None and again is not None
        np.testing.assert_allclose(again[windows == window], first[windows == window], atol=1e-9)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(0, 6)), min_size=2, max_size=25))
def test_calibration_gives_probabilities_or_none(units: list[tuple[bool, float, int]]):
    labels, p, windows = (np.array(column) for column in zip(*units, strict=True))
    found = calibrated(p, labels, windows)
    enough = min(len(set(windows[labels].tolist())), len(set(windows[~labels].tolist()))) >= 2
    if not enough:
        assert found is None
    else:
        assert found is not None and found.shape == p.shape and np.all((found >= 0) & (found <= 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=20))
def test_weighted_auroc_is_that_of_the_repeated_sample(units: list[tuple[bool, int, int]]):
    labels = np.array([u[0] for u in units])
    scores, counts = np.array([u[1] for u in units], float), np.array([u[2] for u in units])
    found = weighted_aurocs(scores, labels, counts[None])[0]
    y, s = np.repeat(labels, counts), np.repeat(scores, counts)
    if len(set(y.tolist())) < 2:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(metrics.roc_auc_score(y, s))


def test_verdicts_that_cannot_be_scored_say_why():
    two = judge("d", [Verdict(True, True, 0.9, row=0), Verdict(False, False, 0.2, row=1)])
    assert "two windows" in (two[-1].undefined or "") and two[2].value == 1
    one_sided = judge("d", [Verdict(True, True, 0.9), Verdict(True, False, 0.2)])
    assert all(s.value is None and "same right answer" in (s.undefined or "") for s in one_sided)
    no_probabilities = judge("d", [Verdict(True, True), Verdict(False, True)])
    assert [s.value for s in no_probabilities] == [0.5, pytest.approx(2 / 3), None, None]
    assert all("no question" in (s.undefined or "") for s in judge("d", [Verdict(True, None, failure="x")]))


def test_probability_of_yes():
    reply = Reply(
        ("Yes",),
        (False,),
        Usage(),
        ({"Yes": np.log(0.5), " yes": np.log(0.1), "no": np.log(0.2), "maybe": np.log(0.2)},),
    )
    assert read_yes(reply) == (True, pytest.approx(0.75))
    assert read_yes(Reply(("No",), (False,), Usage(), ({"maybe": -0.1},))) == (False, None)


def test_complexity_is_the_expected_level():
    assert rating(
        Reply(("2",), (False,), Usage(), ({"2": np.log(0.6), "4": np.log(0.2), "x": np.log(0.2)},))
    ) == pytest.approx(2.5)
    assert rating(Reply(("Complexity: 3",), (False,), Usage())) == 3


def test_fuzzing_marks_as_many_silent_tokens_as_there_are_active_ones():
    window = Window(
        0, 0, np.arange(5), (" a", " b", " ", " d", " e"), np.array([0, 2, 0, 0, 1.0], np.float32)
    )
    right, wrong = questions_of(window, np.random.default_rng(0))
    assert right.label and right.text == "a<< b>>  d<< e>>" and not wrong.label
    assert wrong.text == "<< a>> b << d>> e"
    full = Window(0, 0, np.arange(2), ("a", "b"), np.ones(2, np.float32))
    assert len(questions_of(full, np.random.default_rng(0))) == 1


def test_undefined_resamples_are_left_out_of_an_interval():
    assert interval_of(np.array([np.nan] * 60 + [1.0] * 40)) is None
    assert interval_of(np.array([np.nan] * 10 + [1.0] * 90)) == Interval(1.0, 1.0)


def test_a_score_has_a_value_or_a_reason():
    for value, reason in ((None, None), (1.0, "x")):
        with pytest.raises(ValueError, match="value or a reason"):
            Score("s", value, 1, undefined=reason)
    score = Score("s", 0.5, 3, 1, Interval(0.2, 0.8), null=0.1, null_interval=Interval(0, 0.3))
    assert Score.from_json(score.to_json()) == score and score.beats_null
    assert not Score("s", 0.5, 3, interval=Interval(0.2, 0.8)).beats_null
