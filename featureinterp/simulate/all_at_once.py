"""The all-at-once simulator on a local transformers model: one forward pass per window.

The prompt is a fixed header (task and worked examples), the explanation, and one line per token of the window: the token, a
tab, a fill word, a line break. At each tab the model's distribution over the level strings 0 … 5, renormalised (p^(1/T)), has
the expected level as its mean. The prompt is put together from token ids of separately encoded parts, so that the place of
every level is known from the construction and never looked for in a text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import anyio.to_thread
import numpy as np
import torch

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.errors import InputError
from featureinterp.llm.prefix_cache import Branches, Prefix, PrefixModel, lock_of
from featureinterp.prompts import load_prompt
from featureinterp.simulate.parts import Built, PromptBuilder

BATCH_TOKENS = 1024


class AllAtOnce:
    """Simulates on a local model. The header's keys and values are computed once, an explanation's once per explanation; its rules and the windows
    are one batch; and of the output matrix only the rows of the six levels are used.

    ``load`` gives the model with its head and its tokenizer; it is called when the first window is simulated, so that a run whose
    simulations are all known loads nothing. ``temperature`` T sharpens (< 1) or flattens (> 1) the level distribution: p^(1/T),
    renormalised; a small model leaves some probability on every level everywhere, which 0.5 damps (``docs/prompts.md``). ``chat``: the prompt as turns of
    a chat, by the tokenizer's own template.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        *,
        name: str,
        dtype: str = "bfloat16",
        version: str = "v2",
        temperature: float = 0.5,
        chat: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        if temperature <= 0:
            raise InputError(f"a simulator's temperature of {temperature:g} is not possible: give one above 0")
        self.name, self.dtype, self.temperature, self.batch_tokens = name, dtype, temperature, batch_tokens
        self.prompt, self.chat = load_prompt("simulate-all-at-once", version), chat
        self._load = load
        self._busy = threading.Lock()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a simulation depends on, besides explanation and window."""
        return {
            "simulator": "all-at-once",
            "model": self.name,
            "prompt": self.prompt.name,
            "prompt_hash": self.prompt.hash,
            "temperature": self.temperature,
            **({"chat": True} if self.chat else {}),
            "dtype": self.dtype,
        }

    @cached_property
    def builder(self) -> PromptBuilder:
        """Builds prompts with the model's tokenizer."""
        return PromptBuilder(self._loaded[1], self.prompt, chat=self.chat)

    @cached_property
    def model(self) -> PrefixModel:
        """The model, loaded."""
        return PrefixModel(self._loaded[0])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load()

    @cached_property
    def _header(self) -> Prefix:
        return self.model.prefix(self.builder.header)

    @cached_property
    def _level_ids(self) -> torch.Tensor:
        return torch.tensor(self.builder.levels, device=self.model.device)

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window, computed in a worker thread, so that the event loop goes on."""
        return await anyio.to_thread.run_sync(self.predict, explanation, windows, abandon_on_cancel=True)

    def predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """The same, for callers without an event loop. Several rules: the maximum over rules of level · strength / 5."""
        with self._busy, lock_of(self._loaded[0]):
            return self._predict(explanation, windows)

    @torch.inference_mode()
    def _predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        built = [self.builder.window(w.pieces) for w in windows]
        best = [np.zeros(len(b.positions)) for b in built]
        rules = explanation.rules
        lines = [self.builder.explanation(rule.activates_on) for rule in rules]
        before = self.model.prefix(lines[0], self._header) if len(rules) == 1 else self.model.branches(self._header, lines)
        for batch in _batches(built, self.batch_tokens // len(rules)):
            levels = self._levels(before, [built[i] for i in batch] * len(rules))
            for rule in rules:
                for index in batch:
                    best[index] = np.maximum(best[index], next(levels) * (rule.strength / 5))
        return [Simulation(levels) for levels in best]

    def _levels(self, before: Prefix | Branches, batch: Sequence[Built]) -> Iterator[np.ndarray]:
        """Expected level of every token of each window, ``[token]`` in 0 … 5."""
        width = max(len(b.ids) for b in batch)
        ids = torch.tensor([list(b.ids) + [b.ids[-1]] * (width - len(b.ids)) for b in batch], device=self.model.device)
        rows = torch.tensor([i for i, b in enumerate(batch) for _ in b.positions], device=self.model.device)
        columns = torch.tensor([p for b in batch for p in b.positions], device=self.model.device)
        hidden = self.model.hidden(before, ids)[rows, columns]
        probabilities = torch.softmax(self.model.logits(hidden, self._level_ids) / self.temperature, -1)
        expected = (probabilities @ torch.arange(6, device=probabilities.device, dtype=probabilities.dtype)).double().cpu().numpy()
        start = 0
        for b in batch:
            yield expected[start : start + len(b.positions)]
            start += len(b.positions)


def _batches(built: Sequence[Built], budget: int) -> Iterator[list[int]]:
    """Indices of non-empty windows grouped by length, each group with at most ``budget`` tokens with its padding."""
    order = sorted((i for i, b in enumerate(built) if b.ids), key=lambda i: len(built[i].ids))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(built[index].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
