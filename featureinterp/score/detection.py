"""Detection: can a reader of the explanation tell windows where the feature fires from windows where it is silent?"""

from __future__ import annotations

from collections.abc import Sequence

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Score
from featureinterp.domain.usage import Usage
from featureinterp.interfaces import LanguageModel
from featureinterp.prompts import escape, load_prompt
from featureinterp.score.verdicts import Question, Verdict, ask, judge


class Detection:
    """Asks about every window whether it contains what the explanation describes. Labels come from the codes."""

    def __init__(self, model: LanguageModel, version: str = "v1") -> None:
        self.model, self.prompt = model, load_prompt("detect", version)

    async def run(self, explanation: Explanation, windows: Sequence[Window], *, seed: int = 0) -> tuple[list[Score], list[Verdict], Usage]:
        """Scores ``detection_balanced_accuracy``, ``_f1`` and ``_auroc``, with the verdicts and what they cost."""
        questions = [Question(escape(w.text.strip()), w.fires, w.row) for w in windows]
        verdicts, usage = await ask(self.model, self.prompt, escape(explanation.text), questions)
        return judge("detection", verdicts, seed=seed), verdicts, usage
