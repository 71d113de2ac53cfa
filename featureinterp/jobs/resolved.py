"""A job that has settled everything: what it asks for by name, by default or by ``auto`` is spelt out once,
and every room takes it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from featureinterp.domain.choice import SimulatorChoice, SubjectChoice
from featureinterp.errors import InputError
from featureinterp.explainers.styles import Style, style
from featureinterp.explainers.tree import TreeSettings
from featureinterp.falsification.counterexamples import TrialSettings
from featureinterp.falsification.intervention import SteeringSettings
from featureinterp.jobs.budget import Budget
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.records import parse_features
from featureinterp.jobs.spec import Job
from featureinterp.llm.config import LOCAL, Config, Endpoint, load_config
from featureinterp.registry import EXPLAINERS, SCORERS, SIMULATORS, STAGES
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.stored.sums import described, read_marker, write_marker

if TYPE_CHECKING:
    from featureinterp.codes.store import CodesStore

FORMAT = 1
FILE = "resolved.json"
_REMEDY = "run the same job again, which writes it anew"


@dataclass(frozen=True)
class ResolvedJob:
    """``run``, ``folder``: where codes and results lie; ``codes``: the fingerprint of the codes.
    ``features``: all that are meant. ``stages``, ``scorers``: what is done, in order. ``endpoint``,
    ``judge``: with their prices as far as known. ``device``, ``dtype``: of models of this process that
    simulate or judge, and ``subject``: where the run's own model and SAE are; None where the job needs none.
    ``plan``, ``policy``: as they take effect. ``asks``: whether it needs its language model. The rest as in
    :class:`featureinterp.jobs.spec.Job`."""

    run: Path
    folder: Path
    codes: str
    features: tuple[int, ...]
    stages: tuple[str, ...]
    scorers: tuple[str, ...]
    explainer: str
    style: str
    rule_cap: int
    few_shot: Path | None
    holistic: Literal["exact", "gradient"] | None
    tree: TreeSettings
    trial: TrialSettings
    steering: SteeringSettings
    endpoint: Endpoint
    judge: Endpoint
    simulator: SimulatorChoice
    subject: SubjectChoice | None
    device: str | None
    dtype: str | None
    plan: Plan
    policy: RecordPolicy
    budget: Budget
    max_failure_rate: float
    asks: bool
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def form(self) -> Style:
        """The style of explanations. Raises ``InputError`` when the file of worked examples is none."""
        causes = self.holistic is not None
        return style(self.style, rule_cap=self.rule_cap, causes=causes, few_shot=self.few_shot)

    @property
    def source(self) -> list[Any]:
        """What the features' records come from, for the job's key."""
        policy = self.policy
        drawn: list[Any] = [policy.seed, policy.n_quantiles, policy.half_width, list(policy.counts.items())]
        if policy.wants("projected_similar", "projected_similar_negative"):
            drawn.append(policy.projection)
        if policy.wants("coactive_negative"):
            drawn.append(policy.n_neighbours)
        return [self.codes, *drawn] if self.holistic is None else [self.codes, *drawn, self.holistic]

    def to_json(self) -> dict[str, Any]:
        """As it is kept beside the results."""
        found: dict[str, Any] = _FORM.dump_python(self, mode="json")
        return {"format": FORMAT, **found}

    def save(self) -> None:
        """Writes it beside the results."""
        write_marker(self.folder / FILE, self.to_json())


_FORM = pydantic.TypeAdapter(ResolvedJob)


def resolved_in(folder: Path) -> ResolvedJob:
    """What a job in a folder had settled on. Raises ``InputError`` when it is not written there (jobs of
    earlier versions have not)."""
    path = folder / FILE
    if not path.exists():
        raise InputError(f"{folder} has no {FILE}: {_REMEDY}")
    value = read_marker(path, _REMEDY).value
    with described(path, _REMEDY):
        return _FORM.validate_python({name: v for name, v in value.items() if name != "format"})


def resolve(job: Job, store: CodesStore) -> ResolvedJob:
    """Settles everything that a job leaves open, for the codes that it is about. Asks no model and writes
    nothing.

    Raises ``InputError`` for what cannot work: features, names, files that do not exist.
    """
    config = load_config()
    endpoint, judge = (_priced(e, config) for e in (job.endpoint, job.judge_endpoint))
    plan, scorers = job.effective_plan, job.effective_scorers
    done = {"simulate": plan.simulate, "score": bool(scorers)}
    stages = tuple(name for name in in_order(job.stages) if done.get(name, True))
    simulates = "simulate" in stages or job.searches
    local = simulates and SIMULATORS.has(job.simulator, "local")
    here = local or LOCAL in (endpoint.base_url, judge.base_url)
    device, dtype = _here(job) if here else (None, None)
    chosen = SimulatorChoice(
        job.simulator,
        job.simulator_model,
        device if local else None,
        dtype if local else None,
        job.simulator_temperature,
        job.simulator_chat,
    )
    policy = job.policy
    lives = any(STAGES.has(name, "live") for name in stages)
    live = lives or job.holistic is not None or policy.wants("coactive_negative")
    return ResolvedJob(
        run=job.run,
        folder=job.folder,
        codes=store.fingerprint,
        features=tuple(_features(job, store)),
        stages=stages,
        scorers=scorers,
        explainer=job.explainer,
        style=job.style,
        rule_cap=job.rule_cap,
        few_shot=job.few_shot,
        holistic=job.holistic,
        tree=job.tree,
        trial=job.trial,
        steering=job.steering,
        endpoint=endpoint,
        judge=judge,
        simulator=chosen,
        subject=live_choice(store, job.model, job.sae, job.subject_device) if live else None,
        device=device,
        dtype=dtype,
        plan=plan,
        policy=policy,
        budget=job.budget,
        max_failure_rate=job.max_failure_rate,
        asks=_asks(job, stages, scorers, simulates=simulates),
        options=job.options,
    )


def in_order(stages: tuple[str, ...]) -> tuple[str, ...]:
    """Stages in the order of work: this project's own as the registry has them, then others as given."""
    given = dict.fromkeys(stages)
    return tuple(dict.fromkeys((*(name for name in STAGES.own if name in given), *given)))


def _asks(job: Job, stages: tuple[str, ...], scorers: tuple[str, ...], *, simulates: bool) -> bool:
    """Whether a job needs its language model at all."""
    return (
        EXPLAINERS.has(job.explainer, "asks")
        or (simulates and SIMULATORS.has(job.simulator, "asks"))
        or any(STAGES.has(name, "asks") for name in stages if name != "score")
        or any(SCORERS.has(name, "asks") for name in scorers)
    )


def _features(job: Job, store: CodesStore) -> list[int]:
    if isinstance(job.features, str):
        return parse_features(job.features, store)
    if not job.features:
        raise InputError("the job names no features: give indices, or text such as 0:40 or random:20")
    for index in job.features:
        store.check_feature(index)
    return list(dict.fromkeys(job.features))


def _priced(endpoint: Endpoint, config: Config) -> Endpoint:
    return replace(endpoint, price=config.price(endpoint))


def _here(job: Job) -> tuple[str, str]:
    """Device and dtype of models of this process."""
    from featureinterp.machine import this_machine

    machine = this_machine()
    return machine.device(job.simulator_device), machine.dtype(job.simulator_dtype, job.simulator_device)


def live_choice(
    store: CodesStore, model: str | None = None, sae: str | None = None, device: str | None = None
) -> SubjectChoice:
    """The model and the SAE that made a run, by the names that it recorded when none are given. The model
    runs in what the run was made in, where the device has it, else in float32."""
    from featureinterp.machine import this_machine

    meta, machine = store.meta, this_machine()
    dtype = machine.dtype(None, device, made_in=meta["model"]["dtype"])
    names = model or meta["model"]["name"], sae or meta["sae"]["name"]
    return SubjectChoice(*names, machine.device(device), dtype)
