"""The all-at-once simulator on a local transformers model: one forward pass per window.

The prompt is a fixed header (task and worked examples), the explanation, and one line per token of the
window: the token, a tab, a fill word, a line break. At each tab the model's distribution over the level
strings 0 … 5, renormalised (p^(1/T)), has the expected level as its mean. The prompt is put together from
token ids of separately encoded parts, so that the place of every level is known from the construction and
never looked for in a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float64

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.interfaces import Parts
from featureinterp.local.prefix_cache import Branches, Prefix
from featureinterp.local.simulator import LocalSimulator, padded
from featureinterp.simulators.parts import TEMPERATURE, Built, PromptBuilder


class AllAtOnce(LocalSimulator):
    """Simulates on a local model. The header's keys and values are computed once, an explanation's once per
    explanation; its rules and the windows are one batch; and of the output matrix only the rows of the six
    levels are used.

    ``temperature`` T sharpens (< 1) or flattens (> 1) the level distribution: p^(1/T), renormalised; a small
    model leaves some probability on every level everywhere, which its own, 0.5, damps (``docs/prompts.md``).
    ``chat``: the prompt as turns of a chat, by the tokenizer's own template.
    """

    kind, version, own_temperature = "all-at-once", "v2", TEMPERATURE

    def __init__(
        self, load: Callable[[], tuple[Any, Any]], *, name: str, chat: bool = False, **options: Any
    ) -> None:
        super().__init__(load, name=name, **options)
        self.chat = chat

    @classmethod
    def of_job(cls, parts: Parts) -> Self:
        """The simulator of a job."""
        found = super().of_job(parts)
        found.chat = parts.simulates.chat
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a simulation depends on, besides explanation and window."""
        return {**super().settings, **({"chat": True} if self.chat else {})}

    @cached_property
    def builder(self) -> PromptBuilder:
        """Builds prompts with the model's tokenizer."""
        return PromptBuilder(self.tokenizer, self.prompt, chat=self.chat)

    @property
    def header(self) -> list[int]:
        """Ids of everything before the explanation."""
        return self.builder.header

    def _predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        built = [self.builder.window(w.pieces) for w in windows]
        best = [np.zeros(len(b.positions)) for b in built]
        rules = explanation.rules
        before = self._behind([self.builder.explanation(rule.activates_on) for rule in rules])

        def read(batch: list[int]) -> list[np.ndarray]:
            return self._levels(before, [built[i] for i in batch] * len(rules))

        for batch, levels in self._in_batches([b.ids for b in built], len(rules), read):
            for number, (rule, index) in enumerate(product(rules, batch)):
                best[index] = np.maximum(best[index], levels[number] * (rule.strength / 5))
        return [Simulation(levels) for levels in best]

    def _levels(
        self, before: Prefix | Branches, batch: Sequence[Built]
    ) -> list[Float64[np.ndarray, " _token"]]:
        """Expected level of every token of each window, in 0 … 5."""
        ids = padded([b.ids for b in batch], self.model.device)
        rows = torch.tensor([i for i, b in enumerate(batch) for _ in b.positions], device=self.model.device)
        columns = torch.tensor([p for b in batch for p in b.positions], device=self.model.device)
        hidden = self.model.hidden(before, ids)[rows, columns]
        probabilities = torch.softmax(self.model.logits(hidden, self._level_ids) / self.temperature, -1)
        expected = (
            (probabilities @ torch.arange(6, device=probabilities.device, dtype=probabilities.dtype))
            .double()
            .cpu()
            .numpy()
        )
        ends = np.cumsum([len(b.positions) for b in batch])
        return np.split(expected, ends[:-1])
