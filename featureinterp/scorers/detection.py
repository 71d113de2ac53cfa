"""Detection: can a reader of the explanation tell windows where the feature fires from windows where it is
silent?
"""

from __future__ import annotations

from collections.abc import Sequence

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Score
from featureinterp.domain.usage import Usage
from featureinterp.errors import LanguageModelError
from featureinterp.interfaces import LanguageModel
from featureinterp.prompts import escape, load_prompt
from featureinterp.scorers.verdicts import Question, Verdict, ask, judge


class Detection:
    """Asks about every window whether it contains what the explanation describes. Labels come from the
    codes.
    """

    def __init__(self, model: LanguageModel, version: str = "v1") -> None:
        self.model, self.prompt = model, load_prompt("detect", version)

    async def run(
        self, explanation: Explanation, windows: Sequence[Window], *, seed: int = 0
    ) -> tuple[list[Score], list[Verdict], Usage]:
        """Scores ``detection_balanced_accuracy``, ``_f1`` and ``_auroc``, with the verdicts and what they
        cost.
        """
        questions = [Question(escape(w.text.strip()), w.fires, w.row) for w in windows]
        verdicts, usage = await ask(self.model, self.prompt, escape(explanation.text), questions)
        return judge("detection", verdicts, seed=seed), verdicts, usage


class FitJudge:
    """A :class:`featureinterp.interfaces.Judge`: says of any texts whether they fit an explanation, by the
    question of detection.
    """

    def __init__(self, model: LanguageModel, version: str = "v1") -> None:
        self.model, self.prompt = model, load_prompt("detect", version)
        self.settings = {"model": model.name, "prompt": self.prompt.name, "prompt_hash": self.prompt.hash}

    async def __call__(self, explanation: Explanation, texts: Sequence[str]) -> list[float | None]:
        """The probability of "yes" for each text (1 or 0 from an endpoint without probabilities), None where
        the question failed. Raises ``LanguageModelError`` when all of them failed."""
        verdicts, _ = await ask(
            self.model,
            self.prompt,
            escape(explanation.text),
            [Question(escape(t.strip()), True, i) for i, t in enumerate(texts)],
        )
        if verdicts and all(v.failure for v in verdicts):
            raise LanguageModelError(f"no text could be judged: {verdicts[0].failure}")
        return [
            v.probability if v.probability is not None else None if v.said is None else float(v.said)
            for v in verdicts
        ]
