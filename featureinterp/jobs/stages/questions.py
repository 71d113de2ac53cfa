"""What scorers of yes-or-no questions have in common: kept answers, scores from them, and a null."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import anyio.to_thread

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Score
from featureinterp.domain.usage import Usage
from featureinterp.errors import LanguageModelError
from featureinterp.interfaces import LanguageModel
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.scores import with_nulls
from featureinterp.prompts import Prompt
from featureinterp.scorers.verdicts import Verdict, judge


class Questions(Protocol):
    """Asks about windows; :class:`featureinterp.scorers.detection.Detection` for example."""

    model: LanguageModel
    prompt: Prompt

    async def run(
        self, explanation: Explanation, windows: Sequence[Window], *, seed: int = 0
    ) -> tuple[list[Score], list[Verdict], Usage]:
        """Scores, answers and what they cost."""
        ...


async def add_scores(
    state: FeatureState, name: str, questions: Questions, windows: Sequence[Window], seed: int
) -> None:
    """Adds the scores of an explanation's answers, beside those of another feature's explanation."""
    scores = await _asked(state, name, name, questions, state.explained, windows, seed)
    if scores is None:
        return
    nulls = None
    if state.other is not None:
        nulls = await _asked(state, name, f"{name}-null", questions, state.other, windows, seed)
    state.scores += with_nulls(scores, nulls or [])


async def _asked(
    state: FeatureState,
    name: str,
    stage: str,
    questions: Questions,
    explanation: Explanation,
    windows: Sequence[Window],
    seed: int,
) -> list[Score] | None:
    """The scores of a stage of questions; None when it failed."""

    async def work() -> Any:
        _, verdicts, _ = await questions.run(explanation, windows, seed=seed)
        failed = [v.failure for v in verdicts if v.failure]
        if verdicts and len(failed) == len(verdicts):
            raise LanguageModelError(f"no question was answered: {failed[0]}")
        return [[v.label, v.said, v.probability, v.failure, v.row] for v in verdicts], failed

    model, prompt = questions.model.name, questions.prompt
    depends = {
        "text": explanation.text,
        "model": model,
        "prompt": prompt.hash,
        "seed": seed,
        "windows": [[w.row, w.start, len(w.pieces)] for w in windows],
    }
    provenance = {"model": model, "prompt": prompt.name, "prompt_hash": prompt.hash}
    value = await state.row(stage, depends, work, provenance)
    if value is None:
        return None
    verdicts = [Verdict(*v) for v in value]
    return await anyio.to_thread.run_sync(partial(judge, name, verdicts, seed=seed))


def settings_of_questions(questions: Questions, seed: int) -> dict[str, Any]:
    """What the answers depend on, besides explanation and windows."""
    prompt = questions.prompt
    about = {"model": questions.model.name, "prompt": prompt.name, "prompt_hash": prompt.hash}
    return {**about, "seed": seed}
