"""The all-at-once simulator on an endpoint that gives the probabilities of a prompt's tokens (vLLM does)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.errors import EndpointRefusedError, LanguageModelError, MalformedReplyError
from featureinterp.interfaces import LanguageModel, Parts
from featureinterp.prompts import load_prompt
from featureinterp.simulators.parts import LEVELS, TEMPERATURE, Built, PromptBuilder
from featureinterp.tasks import each

ALTERNATIVES = 20


class PromptLogprobs:
    """The same prompt and the same expected levels as :class:`AllAtOnce`, one request per window and rule.

    ``tokenizer`` gives the endpoint's own tokenizer; it is loaded when the first window is simulated. The
    levels' probabilities are those among the most probable tokens that the endpoint returns, renormalised; a
    place where none of them is a level is a failure of the window.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Callable[[], Any],
        *,
        version: str = "v2",
        temperature: float | None = None,
        chat: bool = False,
    ) -> None:
        self.model, self.temperature = model, TEMPERATURE if temperature is None else temperature
        self.prompt, self.chat = load_prompt("simulate-all-at-once", version), chat
        self._tokenizer = tokenizer

    @classmethod
    def of_job(cls, parts: Parts) -> PromptLogprobs:
        """The simulator of a job."""
        wanted = parts.simulates
        return cls(parts.model, parts.tokenizer, temperature=wanted.temperature, chat=wanted.chat)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a simulation depends on, besides explanation and window."""
        return {
            "simulator": "prompt-logprobs",
            "model": self.model.name,
            "prompt": self.prompt.name,
            "prompt_hash": self.prompt.hash,
            "temperature": self.temperature,
            **({"chat": True} if self.chat else {}),
        }

    @cached_property
    def builder(self) -> PromptBuilder:
        """Builds prompts with the endpoint's tokenizer."""
        return PromptBuilder(self._tokenizer(), self.prompt, chat=self.chat)

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window. Several rules: the maximum over rules of level · strength / 5."""
        builder = self.builder
        built = [builder.window(w.pieces) for w in windows]
        heads = [builder.header + builder.explanation(rule.activates_on) for rule in explanation.rules]
        places = [(head, b) for b in built for head in heads]
        found = iter(await each(lambda place: self._window(*place), places))
        out = []
        for _ in windows:
            rules = [(rule.strength / 5, next(found)) for rule in explanation.rules]
            failed = next((s for _, s in rules if s.expected is None), None)
            out.append(
                failed
                or Simulation(
                    np.max([weight * s.expected for weight, s in rules if s.expected is not None], axis=0)
                )
            )
        return out

    async def _window(self, head: list[int], window: Built) -> Simulation:
        if not window.positions:
            return Simulation(np.zeros(0))
        prompt = (
            *head,
            *window.ids,
            0,
        )  # the last level is read at the place after its tab, whatever stands there
        read_at = tuple(len(head) + p + 1 for p in window.positions)
        request = Request(
            max_tokens=1,
            prompt=prompt[: max(read_at) + 1],
            read_at=read_at,
            top_logprobs=ALTERNATIVES,
            check=self._expected,
        )
        try:
            return Simulation(self._expected(await self.model.complete(request)))
        except EndpointRefusedError:
            raise
        except LanguageModelError as error:
            return Simulation(None, f"{type(error).__name__}: {error}")

    def _expected(self, reply: Reply) -> np.ndarray:
        return np.array([expected_level(alternatives, self.temperature) for alternatives in reply.read])


def expected_level(alternatives: Any, temperature: float = 1.0) -> float:
    """Σ level · p(level)^(1/T) / Σ p(level)^(1/T) over the levels 0 … 5 among a place's alternatives
    (natural-log probabilities).
    """
    mass = {
        int(level): math.exp(alternatives[level] / temperature) for level in LEVELS if level in alternatives
    }
    total = sum(mass.values())
    if not total > 0:
        raise MalformedReplyError(
            "none of the levels 0 to 5 is among a place's most probable tokens: use a larger model, or "
            "--simulator rated"
        )
    return sum(level * m for level, m in mass.items()) / total
