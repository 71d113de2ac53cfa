"""The lexical simulator: predicts from a token's text alone, without a language model. The floor to beat."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.interfaces import Parts

_WORD = re.compile(r"[^\W_]+")


class Lexical:
    """A rule that is one token in double quotes (a JSON string) predicts its strength where exactly that
    token stands; any other rule where a word of the token occurs in the rule's text. A token gets the
    strongest rule that applies, else 0."""

    settings: ClassVar[Mapping[str, Any]] = {"simulator": "lexical"}

    @classmethod
    def of_job(cls, parts: Parts) -> Lexical:
        """The simulator of a job."""
        return cls()

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """Never fails."""
        return self.predict(explanation, windows)

    def predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """The same, for callers without an event loop."""
        exact: dict[str, int] = {}
        words: dict[str, int] = {}
        for rule in explanation.rules:
            token = _quoted(rule.activates_on)
            if token is not None:
                exact[token] = max(exact.get(token, 0), rule.strength)
                continue
            for word in _WORD.findall(rule.activates_on.lower()):
                words[word] = max(words.get(word, 0), rule.strength)
        return [
            Simulation(np.array([self._level(p, exact, words) for p in w.pieces], np.float64))
            for w in windows
        ]

    @staticmethod
    def _level(piece: str, exact: dict[str, int], words: dict[str, int]) -> int:
        found = _WORD.findall(piece.lower()) if words else []
        return max(exact.get(piece, 0), *(words.get(word, 0) for word in found), 0)


def _quoted(text: str) -> str | None:
    """The token that a rule names in quotes, read as JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
