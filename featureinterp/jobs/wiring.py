"""The parts of a job, put together: each is made from the registry when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from featureinterp.codes.store import CodesStore
from featureinterp.domain.choice import SimulatorChoice
from featureinterp.domain.record import FeatureRecord
from featureinterp.errors import InputError
from featureinterp.interfaces import (
    Activator,
    Agree,
    Explainer,
    LanguageModel,
    Simulator,
    Stage,
    Steerer,
)
from featureinterp.jobs.feature import FeatureState
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.kept import KeptSimulator
from featureinterp.jobs.records import build_records
from featureinterp.jobs.resolved import ResolvedJob
from featureinterp.llm.config import Endpoint
from featureinterp.registry import EXPLAINERS, SIMULATORS, STAGES
from featureinterp.sampling.kinds import Neighbours
from featureinterp.scorers.correlation import agreement

Steps = Callable[[str, int, int], None]
Records = Callable[[Iterator[FeatureRecord]], Iterator[FeatureRecord]]


class LoadModel(Protocol):
    """Loads a transformers model with its head, and its tokenizer."""

    def __call__(self, name: str, *, device: str | None, dtype: str | None) -> tuple[Any, Any]:
        """The same pair for the same arguments."""
        ...


@dataclass(frozen=True)
class Local:
    """What needs a model library: model and tokenizer of a name, a tokenizer alone; what adds holistic
    activations to the records of a job; which features have the nearest decoder directions; and a job's model
    and SAE on new texts and as a writer."""

    load: LoadModel
    tokenizer: Callable[[str], Any]
    causes: Callable[[ResolvedJob, CodesStore], Records]
    neighbours: Callable[[ResolvedJob, CodesStore], Neighbours]
    activator: Callable[[ResolvedJob, CodesStore], Activator]
    steerer: Callable[[ResolvedJob, CodesStore], Steerer]


class Wired:
    """The :class:`featureinterp.interfaces.Parts` of a job."""

    def __init__(
        self,
        job: ResolvedJob,
        store: CodesStore,
        local: Local,
        model: LanguageModel,
        judge: LanguageModel,
        journal: Journal,
    ) -> None:
        self.job, self.store, self.local = job, store, local
        self.model, self.judge, self.journal = model, judge, journal
        self.agree: Agree = agreement

    @cached_property
    def explainer(self) -> Explainer:
        """The job's explainer."""
        return EXPLAINERS.load(self.job.explainer)(self)

    @cached_property
    def simulator(self) -> Simulator:
        """The job's simulator."""
        return SIMULATORS.load(self.job.simulator.name)(self)

    @cached_property
    def kept_simulator(self) -> Simulator:
        """The same, with the journal before it."""
        return KeptSimulator(self.simulator, self.journal)

    @property
    def simulates(self) -> SimulatorChoice:
        """Which simulator, and its model."""
        return self.job.simulator

    @cached_property
    def activator(self) -> Activator:
        """New texts through the run's model and SAE."""
        self._check_live()
        return self.local.activator(self.job, self.store)

    @cached_property
    def steerer(self) -> Steerer:
        """The run's model as a writer."""
        self._check_live()
        return self.local.steerer(self.job, self.store)

    def _check_live(self) -> None:
        if self.job.subject is None:
            raise InputError(
                "a part of the job runs the subject model and does not say so: give it traits = ('live',)"
            )

    def load(self, name: str) -> tuple[Any, Any]:
        """A transformers model and its tokenizer, where models of this process run."""
        return self.local.load(name, device=self.job.device, dtype=self.job.dtype)

    def tokenizer(self) -> Any:
        """That of the endpoint's model."""
        endpoint = self.job.endpoint
        if endpoint.base_url is None:
            raise InputError(
                "the embedded model's server does not read prompts: use --simulator token-wise, or give an "
                "endpoint that does"
            )
        return self.local.tokenizer(endpoint.tokenizer or endpoint.model)

    def options(self, name: str) -> Mapping[str, Any]:
        """What the job says for a part of that name."""
        return self.job.options.get(name, {})

    def stages(self) -> list[Stage[FeatureState]]:
        """The job's stages, in order."""
        return [STAGES.load(name)(self) for name in self.job.stages]


def records_of(
    job: ResolvedJob, store: CodesStore, local: Local, steps: Steps
) -> Callable[[Sequence[int]], Iterator[FeatureRecord]]:
    """What gives the records of features, with what the job wants in them."""

    def records(features: Sequence[int]) -> Iterator[FeatureRecord]:
        neighbours = local.neighbours(job, store) if job.policy.wants("coactive_negative") else None
        built = build_records(
            job.run,
            store,
            features,
            job.policy,
            neighbours=neighbours,
            progress=lambda done, total: steps("windows embedded", done, total),
        )
        return built if job.holistic is None else local.causes(job, store)(built)

    return records


def in_this_process(
    load: Callable[[str], tuple[Any, Any]], dtype: Callable[[], str | None]
) -> Callable[[Endpoint], LanguageModel]:
    """Makes the model of an endpoint that is this process itself. ``load`` gives model and tokenizer of a
    name, when the first question comes; ``dtype`` what they are loaded in."""

    def made(endpoint: Endpoint) -> LanguageModel:
        from featureinterp.local.chat import LocalModel

        kind = dtype()
        return LocalModel(partial(load, endpoint.model), name=endpoint.name_in(kind), dtype=kind)

    return made
