"""Fuzzing: can a reader of the explanation tell rightly marked tokens from wrongly marked ones?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Score
from featureinterp.domain.usage import Usage
from featureinterp.interfaces import LanguageModel
from featureinterp.prompts import escape, load_prompt, marked
from featureinterp.scorers.verdicts import Question, Verdict, ask, judge


class Fuzzing:
    """Shows each firing window twice: with its active tokens marked, and with as many silent tokens marked
    instead.
    """

    def __init__(self, model: LanguageModel, version: str = "v1") -> None:
        self.model, self.prompt = model, load_prompt("fuzz", version)

    async def run(
        self, explanation: Explanation, windows: Sequence[Window], *, seed: int = 0
    ) -> tuple[list[Score], list[Verdict], Usage]:
        """Scores ``fuzzing_balanced_accuracy``, ``_f1`` and ``_auroc``, with the verdicts and what they
        cost.
        """
        rng = np.random.default_rng(seed)
        questions = [q for w in windows if w.fires for q in questions_of(w, rng)]
        verdicts, usage = await ask(self.model, self.prompt, escape(explanation.text), questions)
        return judge("fuzzing", verdicts, seed=seed), verdicts, usage


def questions_of(window: Window, rng: np.random.Generator) -> list[Question]:
    """A firing window with its active tokens marked (yes), and with equally many silent, visible tokens
    marked (no).

    When fewer silent tokens are visible than active ones, the second is left out.
    """
    active = window.activations > 0
    visible = np.array([bool(p.strip()) for p in window.pieces])
    silent = np.flatnonzero(~active & visible)
    questions = [Question(marked(window.pieces, active.tolist()).strip(), True, window.row)]
    if len(silent) >= active.sum():
        wrong = np.zeros(len(active), bool)
        wrong[rng.choice(silent, int(active.sum()), replace=False)] = True
        questions.append(Question(marked(window.pieces, wrong.tolist()).strip(), False, window.row))
    return questions
