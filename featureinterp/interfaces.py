"""Every protocol of the project on one page.

What a journal's key rests on has ``settings``: everything that its results depend on besides what it is
given, as a mapping that JSON can hold. Where they change, nothing that is kept is used again.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.choice import SimulatorChoice
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.score import Agreement, Score, Simulation
from featureinterp.errors import InputError


class Settled(Protocol):
    """Whatever says what its results depend on."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that its results depend on besides what it is given."""
        ...


def settings_of(part: Settled) -> dict[str, Any]:
    """The settings of a part, for a journal's key. Raises ``InputError`` for a part that has none."""
    kind = type(part).__name__
    found = getattr(part, "settings", None)
    if not isinstance(found, Mapping) or not found:
        wrong = "no settings" if found is None else f"settings that are no mapping with content ({found!r})"
        raise InputError(
            f"{kind} has {wrong}: give it an attribute 'settings', a mapping of everything that its results "
            "depend on (its name at least), so that a journal knows when they are others"
        )
    try:
        json.dumps(dict(found), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the settings of {kind} cannot be written as JSON ({error}): keep to texts, numbers, lists and "
            "mappings"
        ) from error
    return dict(found)


class LanguageModel(Protocol):
    """Answers chat requests. Raises a ``LanguageModelError`` when it cannot."""

    @property
    def name(self) -> str:
        """The model's name, as results record it."""
        ...

    async def complete(self, request: Request) -> Reply:
        """One request, one reply."""
        ...


class Explainer(Settled, Protocol):
    """Says what a feature means, from its training windows alone."""

    async def explain(self, record: FeatureRecord) -> Explanation:
        """Raises a ``LanguageModelError`` when no explanation could be had."""
        ...


class Reviser(Settled, Protocol):
    """Improves an explanation that was contradicted."""

    async def revise(self, record: FeatureRecord, explanation: Explanation) -> Explanation:
        """The improved explanation, or the given one when none is better. ``record`` holds the
        counterexamples among its windows.
        """
        ...


class Simulator(Settled, Protocol):
    """Predicts activation levels from an explanation."""

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window: expected levels 0–5 per token, or the cause why there are none."""
        ...


class Agree(Protocol):
    """Compares simulations with what is true of their windows."""

    def __call__(self, windows: Sequence[Window], simulations: Sequence[Simulation]) -> Agreement:
        """The correlation, with and without each window."""
        ...


class Activator(Settled, Protocol):
    """Runs new texts through subject model and SAE."""

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        """One window per text, with the feature's activations."""
        ...


class Steerer(Settled, Protocol):
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


class Judge(Settled, Protocol):
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


Work = Callable[[], Awaitable[tuple[Any, Sequence[str]]]]
"""Gives a value that JSON can hold, and why parts of it failed (nothing: it is whole)."""


class State(Protocol):
    """A feature while a job works on it: what is known of it, and where a stage puts what it finds."""

    @property
    def record(self) -> FeatureRecord:
        """The feature's windows."""
        ...

    @property
    def explained(self) -> Explanation:
        """Its explanation; a stage runs on features that have one."""
        ...

    @property
    def other(self) -> Explanation | None:
        """Another feature's explanation, for a null; None where there is none, or where no stage of the job
        has the trait ``null``."""
        ...

    @property
    def scores(self) -> list[Score]:
        """The scores so far. What a stage adds stands in table, report and export."""
        ...

    @property
    def notes(self) -> dict[str, Any]:
        """What a stage found besides scores, by its name: values that JSON can hold. They stand in the result
        and in the report."""
        ...

    async def kept(self, stage: Stage[Any], depends: Mapping[str, Any], work: Work) -> Any | None:
        """What the journal holds for the stage, its settings, the feature's record and ``depends``, or what
        ``work`` gives now; None when that failed, which is a row with its cause."""
        ...


Worked = TypeVar("Worked", bound=State, contravariant=True)


class Stage(Settled, Protocol[Worked]):
    """One thing that a job does with every feature that has an explanation. Scorers are stages, too."""

    @property
    def name(self) -> str:
        """Its name, as in the registry."""
        ...

    async def run(self, state: Worked) -> None:
        """Adds to the state what it finds. A ``FeatureInterpError`` outside of :meth:`State.kept` stops the
        job."""
        ...


class Parts(Protocol):
    """What a job gives to whatever makes one of its parts. Each is made when it is first asked for."""

    @property
    def job(self) -> Any:
        """The :class:`featureinterp.jobs.resolved.ResolvedJob`."""
        ...

    @property
    def model(self) -> LanguageModel:
        """The job's language model."""
        ...

    @property
    def judge(self) -> LanguageModel:
        """What answers the many short questions."""
        ...

    @property
    def explainer(self) -> Explainer:
        """The job's explainer."""
        ...

    @property
    def simulator(self) -> Simulator:
        """The job's simulator."""
        ...

    @property
    def kept_simulator(self) -> Simulator:
        """The same for a search: what it has simulated once is read from the journal."""
        ...

    @property
    def agree(self) -> Agree:
        """Compares simulations with what is true."""
        ...

    @property
    def activator(self) -> Activator:
        """New texts through the run's model and SAE. Raises ``InputError`` in a part without the trait
        ``live``."""
        ...

    @property
    def steerer(self) -> Steerer:
        """The run's model as a writer. Raises ``InputError`` in a part without the trait ``live``."""
        ...

    @property
    def simulates(self) -> SimulatorChoice:
        """Which simulator the job has settled on, and its model."""
        ...

    def load(self, name: str) -> tuple[Any, Any]:
        """A transformers model with its head, and its tokenizer, on the job's device for models of this
        process; loaded once."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer of the job's endpoint. Raises ``InputError`` where it has none."""
        ...

    def options(self, name: str) -> Mapping[str, Any]:
        """What the job says for a part of that name (``[options.NAME]``); empty when it says nothing."""
        ...


class Layout(Protocol):
    """How an SAE's folder is laid out: a module or an object with these two."""

    def matches(self, folder: Path) -> bool:
        """Whether the folder is laid out so."""
        ...

    def read(self, folder: Path) -> Any:
        """The :class:`featureinterp.sae.layouts.checkpoint.Checkpoint` in it. Raises
        ``IncompatibleError``."""
        ...


class WriteTable(Protocol):
    """An export format: writes a file with one row per feature."""

    def __call__(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
        """Writes ``rows``, which may be gone through several times and all have the same columns; the number
        of rows."""
        ...
