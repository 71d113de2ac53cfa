"""Every protocol of the project on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.score import Agreement, Score, Simulation
from featureinterp.llm.types import Reply, Request


class LanguageModel(Protocol):
    """Answers chat requests. Raises a ``LanguageModelError`` when it cannot."""

    @property
    def name(self) -> str:
        """The model's name, as results record it."""
        ...

    async def complete(self, request: Request) -> Reply:
        """One request, one reply."""
        ...


class Explainer(Protocol):
    """Says what a feature means, from its training windows alone."""

    async def explain(self, record: FeatureRecord) -> Explanation:
        """Raises a ``LanguageModelError`` when no explanation could be had."""
        ...


class Reviser(Protocol):
    """Improves an explanation that was contradicted."""

    async def revise(self, record: FeatureRecord, explanation: Explanation) -> Explanation:
        """The improved explanation, or the given one when none is better. ``record`` holds the
        counterexamples among its windows.
        """
        ...


class Simulator(Protocol):
    """Predicts activation levels from an explanation."""

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window: expected levels 0–5 per token, or the cause why there are none."""
        ...


class Agree(Protocol):
    """Compares simulations with what is true of their windows."""

    def __call__(self, windows: Sequence[Window], simulations: Sequence[Simulation]) -> Agreement:
        """The correlation, with and without each window."""
        ...


class Scorer(Protocol):
    """Judges an explanation on a record's test windows."""

    async def score(self, explanation: Explanation, record: FeatureRecord) -> Score:
        """Raises a ``LanguageModelError`` when nothing could be scored."""
        ...


class Activator(Protocol):
    """Runs new texts through subject model and SAE."""

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        """One window per text, with the feature's activations."""
        ...


class Steerer(Protocol):
    """The subject model as a writer whose residual stream is pushed along a direction."""

    async def write(
        self,
        feature: int,
        amount: float,
        openings: Sequence[str],
        *,
        random: int | None = None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """One continuation per opening, with ``amount`` times the feature's decoder row added (``random``: a
        random direction of that length, by its number); 0: the model as it is."""
        ...


class Judge(Protocol):
    """Says whether texts fit an explanation."""

    async def __call__(self, explanation: Explanation, texts: Sequence[str]) -> list[float | None]:
        """How probable it is that each text fits, None where it could not be asked."""
        ...


class Embedder(Protocol):
    """Embeds texts for similarity search."""

    @property
    def fingerprint(self) -> str:
        """Changes when the same text would be embedded otherwise."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Normalised embeddings, float32 ``[text, d]``."""
        ...
