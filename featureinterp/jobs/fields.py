"""The fields of a job as keyword arguments, for editors and type checkers. What each means is said at
:class:`featureinterp.Job`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from featureinterp.explainers.tree import TreeSettings
from featureinterp.falsification.counterexamples import TrialSettings
from featureinterp.falsification.intervention import SteeringSettings
from featureinterp.jobs.budget import Budget
from featureinterp.jobs.plan import Plan
from featureinterp.llm.config import Endpoint
from featureinterp.sampling.policy import RecordPolicy

Table = Mapping[str, Any]
"""A mapping of the settings that change, as in a TOML file."""


class JobFields(TypedDict, total=False):
    """All but the run and its features. ``device`` stands for both devices, ``dtype`` for
    ``simulator_dtype``."""

    out: str | Path | None
    stages: Sequence[str]
    scorers: Sequence[str]
    explainer: str
    style: Literal["sentence", "rules"]
    rule_cap: int
    few_shot: str | Path | None
    holistic: Literal["exact", "gradient"] | None
    tree: TreeSettings | Table
    trial: TrialSettings | Table
    steering: SteeringSettings | Table
    model: str | None
    sae: str | None
    simulator: str
    simulator_model: str
    device: str | None
    subject_device: str | None
    simulator_device: str | None
    dtype: str | None
    simulator_dtype: str | None
    simulator_chat: bool
    simulator_temperature: float | None
    llm: Endpoint | Table | str | None
    plan: Plan | Table
    records: RecordPolicy | Table
    budget: Budget | Table
    max_failure_rate: float
    options: Mapping[str, Table]


class ChangedFields(JobFields, total=False):
    """What a verb that goes on from a job may change in it."""

    features: str | Sequence[int]
