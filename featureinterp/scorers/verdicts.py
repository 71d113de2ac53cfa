"""Yes-or-no questions about windows: asking them, and what the answers are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from featureinterp.domain.chat import Message, Request
from featureinterp.domain.score import Score
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, LanguageModelError
from featureinterp.interfaces import LanguageModel
from featureinterp.intervals import bootstrap, weighted_aurocs
from featureinterp.prompts import Prompt
from featureinterp.scorers.answers import read_yes
from featureinterp.tasks import each


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer. ``label``: what is true, from the codes. ``said``: what the model answered. ``probability``
    of "yes", None where the endpoint gives none. A question that failed has ``said`` None and the cause in
    ``failure``."""

    label: bool
    said: bool | None
    probability: float | None = None
    failure: str | None = None
    row: int = -1


@dataclass(frozen=True, slots=True)
class Question:
    """A window's text as it is shown, with the right answer."""

    text: str
    label: bool
    row: int = -1


async def ask(
    model: LanguageModel, prompt: Prompt, description: str, questions: Sequence[Question]
) -> tuple[list[Verdict], Usage]:
    """Asks every question; a failed one becomes a verdict with its cause. The description comes first in the
    prompt and the text last, so that a server's prefix cache serves all questions of one description."""
    shots = [
        turn
        for shot in prompt.json("few_shot.json")
        for turn in (
            Message("user", prompt.render("user.j2", description=shot["description"], text=shot["text"])),
            Message("assistant", shot["answer"]),
        )
    ]
    head = (Message("system", prompt.text("system.txt")), *shots)
    spent: list[Usage] = []

    async def one(question: Question) -> Verdict:
        user = Message("user", prompt.render("user.j2", description=description, text=question.text))
        try:
            reply = await model.complete(
                Request((*head, user), max_tokens=4, top_logprobs=10, answers=("Yes", "No"), check=read_yes)
            )
            spent.append(reply.usage)
            return Verdict(question.label, *read_yes(reply), row=question.row)
        except EndpointRefusedError:
            raise
        except LanguageModelError as error:
            return Verdict(question.label, None, failure=f"{type(error).__name__}: {error}", row=question.row)

    return await each(one, questions), sum(spent, Usage())


def judge(name: str, verdicts: Sequence[Verdict], *, seed: int = 0) -> list[Score]:
    """Balanced accuracy, F1, the AUROC of the probability of "yes", and the balanced accuracy of calibrated
    probabilities (:func:`calibrated`), each with a bootstrap interval over windows."""
    answered = [v for v in verdicts if v.said is not None]
    failed = len(verdicts) - len(answered)
    labels = np.array([v.label for v in answered], bool)
    said = np.array([bool(v.said) for v in answered], bool)
    n = len(answered)
    names = [f"{name}_{kind}" for kind in ("balanced_accuracy", "f1", "auroc", "calibrated_accuracy")]
    if not labels.any() or labels.all():
        reason = "no question was answered" if not n else "all answered questions have the same right answer"
        return [Score(full, None, n, failed, undefined=reason) for full in names]
    window, table = _windows(answered), _confusion(labels, said)
    rates: tuple[Statistic, ...] = (
        lambda counts: _balanced_accuracy(counts @ table),
        lambda counts: _f1(counts @ table),
    )
    scores = [_score(full, rate, window, failed, seed) for full, rate in zip(names[:2], rates, strict=True)]
    known = [v for v in answered if v.probability is not None]
    if not known:
        return scores + [
            Score(full, None, n, failed, undefined="no answer came with probabilities that count")
            for full in names[2:]
        ]
    return scores + _ranking(names[2:], known, failed + n - len(known), seed)


Statistic = Callable[[np.ndarray], np.ndarray]
"""Values of a statistic for weights of the questions, ``[resample, question]``."""


def _ranking(names: Sequence[str], known: Sequence[Verdict], failed: int, seed: int) -> list[Score]:
    """The AUROC and the calibrated accuracy of the answers whose probabilities count; the others are among
    the failed.
    """
    labels, window, n = np.array([v.label for v in known], bool), _windows(known), len(known)
    if not labels.any() or labels.all():
        reason = "all answered questions with probabilities have the same right answer"
        return [Score(full, None, n, failed, undefined=reason) for full in names]
    p = np.array([v.probability for v in known], float)
    ranked = _score(names[0], lambda counts: weighted_aurocs(p, labels, counts), window, failed, seed)
    fitted = calibrated(p, labels, window)
    if fitted is None:
        return [
            ranked,
            Score(
                names[1], None, n, failed, undefined="calibration needs two windows with each right answer"
            ),
        ]
    right = _confusion(labels, fitted > 0.5)
    return [ranked, _score(names[1], lambda counts: _balanced_accuracy(counts @ right), window, failed, seed)]


def _windows(verdicts: Sequence[Verdict]) -> np.ndarray:
    """The number of each verdict's window among theirs."""
    return np.asarray(np.unique([v.row for v in verdicts], return_inverse=True)[1])


def _score(full: str, statistic: Statistic, window: np.ndarray, failed: int, seed: int) -> Score:
    """A score with its bootstrap interval over windows; ``window [question]``."""
    interval = bootstrap(
        lambda counts: statistic(counts[:, window]), int(window.max()) + 1, np.random.default_rng(seed)
    )
    return Score(full, float(statistic(np.ones((1, len(window))))[0]), len(window), failed, interval)


def calibrated(probabilities: np.ndarray, labels: np.ndarray, windows: np.ndarray) -> np.ndarray | None:
    """The probability that the right answer is "yes" when both are equally likely, float64 ``[question]``: a
    logistic regression on the log-odds of "yes" (Platt 1999), fitted on the answers about all other windows.
    A model that leans to one answer is so put right. None with fewer than two windows of a label.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

    if min(len(np.unique(windows[labels])), len(np.unique(windows[~labels]))) < 2:
        return None
    p = np.clip(probabilities, 1e-6, 1 - 1e-6)
    odds = np.log(p / (1 - p))[:, None]
    fit = LogisticRegression(class_weight="balanced")
    return np.asarray(
        cross_val_predict(fit, odds, labels, groups=windows, cv=LeaveOneGroupOut(), method="predict_proba")[
            :, 1
        ]
    )


def _confusion(labels: np.ndarray, said: np.ndarray) -> np.ndarray:
    """One row per question: hit, miss, false alarm, right refusal."""
    return np.stack([labels & said, labels & ~said, ~labels & said, ~labels & ~said], 1).astype(float)


def _balanced_accuracy(table: np.ndarray) -> np.ndarray:
    hit, miss, false, right = table.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((hit / (hit + miss) + right / (false + right)) / 2)


def _f1(table: np.ndarray) -> np.ndarray:
    """2·TP / (2·TP + FP + FN); undefined without positives."""
    hit, miss, false, _ = table.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(hit + miss > 0, 2 * hit / (2 * hit + miss + false), np.nan)
