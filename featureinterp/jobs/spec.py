"""A job as a value: the same in a TOML file, in Python and over HTTP.

run = "RUN"
features = "0:40"
stages = ["explain", "simulate", "score"]
llm = "paid"                  # an endpoint of the configuration file, or a table [llm]

[plan]
n_test = 10

[budget]
usd = 2.5
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from featureinterp.domain.choices import Dtype, Form, HolisticMethod
from featureinterp.domain.record import Source
from featureinterp.errors import InputError, StorageError
from featureinterp.explainers.styles import Style, style
from featureinterp.explainers.tree import TreeSettings
from featureinterp.falsification.counterexamples import TrialSettings
from featureinterp.falsification.intervention import SteeringSettings
from featureinterp.files import UnparsedError, parse_toml
from featureinterp.jobs.budget import Budget
from featureinterp.jobs.plan import Plan
from featureinterp.llm.config import EMBEDDED, LOCAL, Endpoint, load_config
from featureinterp.registry import EXPLAINERS, SCORERS, SIMULATORS, STAGES, Registry
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.stored.sums import read_marker
from featureinterp.validation import first_problem


def _named(registry: Registry[Any]) -> Callable[[str], str]:
    """Checks a name, for a field of the job."""

    def check(name: str) -> str:
        try:
            return registry.check(name)
        except InputError as error:
            raise ValueError(str(error)) from error

    return check


ExplainerName = Annotated[str, pydantic.AfterValidator(_named(EXPLAINERS))]
SimulatorName = Annotated[str, pydantic.AfterValidator(_named(SIMULATORS))]
ScorerName = Annotated[str, pydantic.AfterValidator(_named(SCORERS))]
StageName = Annotated[str, pydantic.AfterValidator(_named(STAGES))]
_ROLES = {"device": ("subject_device", "simulator_device"), "dtype": ("simulator_dtype",)}
"""Fields that stand for those of every role which are not named."""


class Job(pydantic.BaseModel):
    """Which features of which run are explained and judged, by which models, for how much.

    ``run``: folder that ``collect`` wrote. ``features``: ``"0:40"``, ``"3,17"``, ``"random:20"``, ``"alive"``
    or indices. ``out``: folder for journal, results and report (``RUN/explain``). ``stages``: ``explain`` is
    always needed; ``simulate`` adds correlations, ``score`` detection, fuzzing and complexity, ``falsify``
    texts that are written to contradict the explanation (``trial`` says how many), and its revision by them,
    ``steer`` what the subject writes while the feature is pushed (``steering`` says how far). ``scorers``:
    what the stage ``score`` asks. Stages, scorers, explainers and simulators are names of
    :mod:`featureinterp.registry`, also of other packages; ``options`` are for those, by their names.
    ``llm``: an endpoint, the name of one in the configuration file, or None for the embedded model.
    ``simulator_chat``: the simulator's prompt as turns of a chat; ``simulator_temperature``: sharpens (below
    1) its level distribution; the simulator's own when not given.
    ``few_shot``: a JSON file with worked examples in place of the style's own. ``holistic``: shows the
    explainer which tokens cause the activations, found by leaving out each in turn ("exact") or by the
    gradient. ``model``, ``sae``: where the subject and the SAE of the run are found now, for holistic
    activations and co-active windows; by the names that the run recorded when not given. ``subject_device``:
    of the subject and the SAE; ``simulator_device``, ``simulator_dtype``: of models of this process that
    simulate and judge; ``device``: both devices, where they are not named; ``dtype``: the same for
    ``simulator_dtype`` (the subject runs in what its run was made in). ``max_failure_rate``: the job
    stops when more of its stages fail.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    run: Path
    features: str | tuple[int, ...] = "random:10"
    out: Path | None = None
    stages: tuple[StageName, ...] = ("explain", "simulate", "score")
    scorers: tuple[ScorerName, ...] = ("detection", "fuzzing", "complexity")
    explainer: ExplainerName = "one-shot"
    style: Form = "sentence"
    rule_cap: int = pydantic.Field(default=5, ge=1, le=10)
    few_shot: Path | None = None
    holistic: HolisticMethod | None = None
    tree: TreeSettings = TreeSettings()
    trial: TrialSettings = TrialSettings()
    steering: SteeringSettings = SteeringSettings()
    model: str | None = None
    sae: str | None = None
    simulator: SimulatorName = "token-wise"
    simulator_model: str = EMBEDDED
    subject_device: str | None = None
    simulator_device: str | None = None
    simulator_dtype: Dtype | None = None
    simulator_chat: bool = False
    simulator_temperature: float | None = pydantic.Field(default=None, gt=0, le=10)
    llm: Endpoint | str | None = None
    plan: Plan = Plan()
    records: RecordPolicy = RecordPolicy()
    budget: Budget = Budget()
    max_failure_rate: float = pydantic.Field(default=0.5, gt=0, le=1)
    options: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _every_role(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        for short in _ROLES.keys() & fields.keys():
            value = fields.pop(short)
            for name in _ROLES[short]:
                fields[name] = value if fields.get(name) is None else fields[name]
        return fields

    @pydantic.field_validator("stages")
    @classmethod
    def _explains(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if "explain" not in stages:
            raise ValueError("explain is missing, without which there is nothing to judge")
        return stages

    @pydantic.model_validator(mode="after")
    def _causes_are_shown(self) -> Job:
        if self.holistic is not None and not EXPLAINERS.has(self.explainer, "causes"):
            raise ValueError(
                f"{self.explainer} looks at no causes: leave holistic out, or choose the explainer one-shot "
                "or tree"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _chats(self) -> Job:
        if self.simulator_chat and not SIMULATORS.has(self.simulator, "chat"):
            raise ValueError(
                f"the simulator {self.simulator} has no chat form: leave simulator_chat out, or choose the "
                "simulator all-at-once"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _worked_examples_can_be_read(self) -> Job:
        if self.few_shot is not None:
            self.form()
        return self

    def form(self) -> Style:
        """The style of explanations. Raises ``InputError`` when the file of worked examples is none."""
        return style(
            self.style, rule_cap=self.rule_cap, causes=self.holistic is not None, few_shot=self.few_shot
        )

    @property
    def policy(self) -> RecordPolicy:
        """The record policy, with enough windows of every kind that the plan judges by and the search learns
        from.
        """
        counts = dict(self.records.counts)

        def at_least(source: Source, *wanted: int) -> None:
            had = counts.get(source, (0, 0, 0))
            counts[source] = (max(had[0], wanted[0]), max(had[1], wanted[1]), max(had[2], wanted[2]))

        plan = self.plan
        at_least("top", 0, plan.n_valid, plan.n_test)
        for i, source in enumerate(plan.negatives):
            at_least(source, 0, 0 if i else plan.n_valid, plan.n_test)
        if self.searches:
            for source in ("top", *self.tree.negatives):
                at_least(source, self.tree.n_windows, self.tree.n_windows, 0)
        return replace(self.records, counts=counts)

    @property
    def searches(self) -> bool:
        """Whether the job simulates on training and validation windows."""
        return EXPLAINERS.has(self.explainer, "searches") or any(
            STAGES.has(name, "searches") for name in self.stages
        )

    @property
    def effective_scorers(self) -> tuple[str, ...]:
        """The scorers without those that the plan leaves out; none without the stage ``score``."""
        left_out = {n for n in ("detection", "fuzzing", "complexity") if not getattr(self.plan, n)}
        return tuple(s for s in dict.fromkeys(self.scorers) if s not in left_out and "score" in self.stages)

    @property
    def folder(self) -> Path:
        """Where journal, results and report go."""
        return self.out or self.run / "explain"

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that is meant. Raises ``UnknownNameError`` for a name that the configuration file
        lacks.
        """
        if isinstance(self.llm, str):
            return load_config().endpoint(self.llm)
        return self.llm or Endpoint()

    @property
    def judge_endpoint(self) -> Endpoint:
        """Where the questions of scores go: to the job's endpoint, but to the simulator itself when that is
        the embedded model in this process, which answers many short questions in one pass."""
        endpoint = self.endpoint
        simulates = (
            "simulate" in self.stages
            and SIMULATORS.has(self.simulator, "local")
            and self.simulator_model == endpoint.model
        )
        return replace(endpoint, base_url=LOCAL) if endpoint.base_url is None and simulates else endpoint

    @property
    def effective_plan(self) -> Plan:
        """The plan without the stages that are not wanted; one feature at a time on the embedded model."""
        plan, scorers = self.plan, self.effective_scorers
        return replace(
            plan,
            simulate=plan.simulate and "simulate" in self.stages,
            detection="detection" in scorers,
            fuzzing="fuzzing" in scorers,
            complexity="complexity" in scorers,
            features_at_once=1 if self.endpoint.base_url in (None, LOCAL) else plan.features_at_once,
        )


def make_job(**fields: Any) -> Job:
    """A job from its fields. Raises ``InputError`` that names the first one that is wrong."""
    try:
        return Job(**fields)
    except pydantic.ValidationError as error:
        raise InputError(f"the job has a mistake: {first_problem(error)}") from error


def changed(job: Job, **fields: Any) -> Job:
    """The job with other fields; of a table (``budget``, ``plan``, ``trial``, ``steering`` …) a mapping
    changes what it names and keeps the rest. Raises ``InputError`` that names the first one that is wrong."""
    kept = {name: getattr(job, name) for name in type(job).model_fields}
    for short, roles in _ROLES.items():
        if fields.get(short) is not None:  # what is named now goes before what the job says
            kept |= dict.fromkeys(roles)
    for name, value in fields.items():
        tables = isinstance(value, Mapping) and is_dataclass(kept.get(name))
        kept[name] = {**asdict(kept[name]), **value} if tables else value
    return make_job(**kept)


def job_of(folder: Path) -> Job:
    """The job that ran in a folder. Raises ``InputError`` when there is none that can be read."""
    path = folder / "job.json"
    try:
        return Job.model_validate(read_marker(path, "run 'featureinterp explain' again").value["job"])
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the job in {folder} cannot be read ({str(error).splitlines()[0]}): run 'featureinterp "
            "explain' again"
        ) from error


def load_job(path: Path) -> Job:
    """A job from a TOML file; relative paths in it start from the file's folder. Raises ``InputError`` that
    names what is wrong.
    """
    try:
        fields = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UnparsedError) as error:
        raise InputError(f"the job {path} cannot be read: {error}") from error
    for name in ("run", "out", "few_shot"):
        if isinstance(fields.get(name), str):
            fields[name] = path.parent / fields[name]
    try:
        return Job.model_validate(fields)
    except pydantic.ValidationError as error:
        raise InputError(f"the job {path} has a mistake: {first_problem(error)}") from error
