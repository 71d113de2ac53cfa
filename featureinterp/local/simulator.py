"""What simulators on a local transformers model have in common: the model, the levels' rows of its output
matrix, one batch at a time.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar

import anyio.to_thread
import torch
from jaxtyping import Int64
from torch import Tensor

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.errors import InputError
from featureinterp.interfaces import Parts
from featureinterp.local.prefix_cache import Branches, Prefix, PrefixModel, lock_of
from featureinterp.machine.accelerator import fit_of, in_parts
from featureinterp.prompts import load_prompt
from featureinterp.simulators.parts import LEVELS, single

BATCH_TOKENS = 1024
T = TypeVar("T")


class LocalSimulator(ABC):
    """Reads levels off a model's next-token distribution. ``load`` gives the model with its head and its
    tokenizer; it is called when the first window is simulated, so that a run whose simulations are all known
    loads nothing. ``version`` of its prompt and ``temperature``: its own when not given."""

    kind: ClassVar[str]
    version: ClassVar[str]
    own_temperature: ClassVar[float]

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        *,
        name: str,
        dtype: str,
        version: str | None = None,
        temperature: float | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.temperature = self.own_temperature if temperature is None else temperature
        if self.temperature <= 0:
            raise InputError(
                f"a simulator's temperature of {self.temperature:g} is not possible: give one above 0"
            )
        self.name, self.dtype, self.batch_tokens = name, dtype, batch_tokens
        self.prompt = load_prompt(f"simulate-{self.kind}", version or self.version)
        self._load = load
        self._busy = threading.Lock()

    @classmethod
    def of_job(cls, parts: Parts) -> Self:
        """The simulator of a job."""
        wanted = parts.simulates
        assert wanted.dtype is not None, "a job settles on the dtype of a local simulator"
        return cls(
            lambda: parts.load(wanted.model),
            name=wanted.model,
            dtype=wanted.dtype,
            temperature=wanted.temperature,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a simulation depends on, besides explanation and window."""
        return {
            "simulator": self.kind,
            "model": self.name,
            "prompt": self.prompt.name,
            "prompt_hash": self.prompt.hash,
            "temperature": self.temperature,
            "dtype": self.dtype,
        }

    @cached_property
    def model(self) -> PrefixModel:
        """The model, loaded."""
        return PrefixModel(self._loaded[0])

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load()

    @cached_property
    def _header(self) -> Prefix:
        return self.model.prefix(self.header)

    @cached_property
    def _level_ids(self) -> Int64[Tensor, " level"]:
        return torch.tensor([single(self.tokenizer, level) for level in LEVELS], device=self.model.device)

    def _behind(self, lines: Sequence[Sequence[int]]) -> Prefix | Branches:
        """What the windows are read behind: the header and the explanation's rules."""
        return (
            self.model.prefix(lines[0], self._header)
            if len(lines) == 1
            else self.model.branches(self._header, lines)
        )

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window, computed in a worker thread, so that the event loop goes on."""
        return await anyio.to_thread.run_sync(self.predict, explanation, windows, abandon_on_cancel=True)

    def predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """The same, for callers without an event loop. Several rules: the maximum over rules of level ·
        strength / 5.
        """
        with self._busy, lock_of(self._loaded[0]), torch.inference_mode():
            return self._predict(explanation, windows)

    def _in_batches(
        self, rows: Sequence[Sequence[int]], n_rules: int, work: Callable[[list[int]], T]
    ) -> Iterator[tuple[list[int], T]]:
        """``work`` on rows of about one length behind ``n_rules`` rules, as many at once as are to be, or as
        fit: (their indices, what it gave)."""
        fit, device = fit_of(self._loaded[0], "simulating"), self.model.device
        for batch in batches(rows, self.batch_tokens // n_rules):
            width = max(len(rows[i]) for i in batch) * n_rules

            def part_of(part: slice, batch: list[int] = batch) -> T:
                return work(batch[part])

            for part, found in in_parts(len(batch), width, self.batch_tokens, fit, device, part_of):
                yield batch[part], found

    @property
    @abstractmethod
    def header(self) -> list[int]:
        """Ids of everything before the explanation."""

    @abstractmethod
    def _predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window; the model is this thread's."""


def batches(rows: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Indices of the rows that are not empty, grouped by length, each group with at most ``budget`` tokens
    with its padding.
    """
    order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index]) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int64[Tensor, "row longest"]:
    """Rows of ids, none of them empty, filled up on the right with their last id."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
