"""Complexity: how abstract a rule is, from 0 (one fixed token) to 5 (an abstract idea), rated by a language
model.
"""

from __future__ import annotations

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.score import Score
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, LanguageModelError
from featureinterp.interfaces import LanguageModel
from featureinterp.prompts import escape, load_prompt
from featureinterp.scorers.answers import LEVELS, read_level


class Complexity:
    """Rates every rule; the score is their mean. Where the endpoint gives probabilities a rating is the
    expected level.
    """

    def __init__(self, model: LanguageModel, version: str = "v1") -> None:
        self.model, self.prompt = model, load_prompt("complexity", version)

    async def run(self, explanation: Explanation) -> tuple[Score, list[float | None], Usage]:
        """The score ``complexity``, each rule's rating (None where the question failed), and what they
        cost.
        """
        ratings: list[float | None] = []
        usage, cause = Usage(), ""
        for rule in explanation.rules:
            try:
                request = Request(
                    self._messages(rule.activates_on),
                    max_tokens=4,
                    top_logprobs=10,
                    answers=LEVELS,
                    check=rating,
                )
                reply = await self.model.complete(request)
                usage += reply.usage
                ratings.append(rating(reply))
            except EndpointRefusedError:
                raise
            except LanguageModelError as error:
                ratings.append(None)
                cause = str(error)
        known = [r for r in ratings if r is not None]
        failed = len(ratings) - len(known)
        if not known:
            return Score("complexity", None, 0, failed, undefined=cause), ratings, usage
        return Score("complexity", sum(known) / len(known), len(known), failed), ratings, usage

    def _messages(self, description: str) -> tuple[Message, ...]:
        turns = [Message("system", self.prompt.text("system.txt"))]
        for shot in self.prompt.json("few_shot.json"):
            turns += [
                Message("user", self.prompt.render("user.j2", description=shot["description"])),
                Message("assistant", shot["answer"]),
            ]
        return (*turns, Message("user", self.prompt.render("user.j2", description=escape(description))))


def rating(reply: Reply) -> float:
    """The level of :func:`featureinterp.scorers.answers.read_level`."""
    return read_level(reply)
