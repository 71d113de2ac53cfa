"""What the service takes and gives: forms of bodies, of paths and of answers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import fastapi
import pydantic
from fastapi.responses import JSONResponse

from featureinterp.domain.choices import Form, HolisticMethod
from featureinterp.registry import registry
from featureinterp.server.runner import MIN_FREE
from featureinterp.visible import visible_json

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class Rules:
    """What requests may name. ``runs``: the folder whose run folders can be explained. ``endpoints``: names
    of the configuration file; the embedded model is always allowed. ``simulator_models``: names of local
    simulators. ``token``: what every request must carry; None: none is needed. ``queue``: how many jobs may
    wait. ``parallel``: how many run at once. ``min_free``: with less room on the disk, in bytes, no job is
    taken on or started."""

    jobs: Path
    runs: Path
    endpoints: tuple[str, ...] = ()
    simulator_models: tuple[str, ...] = ("qwen2.5-coder-1.5b-instruct",)
    token: str | None = field(default=None, repr=False)
    queue: int = 100
    parallel: int = 1
    min_free: int = MIN_FREE


def _integral(value: Any) -> Any:
    """JSON has one kind of numbers: 5.0 is an integer, and neither "5" nor true is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integral = pydantic.BeforeValidator(_integral)


@lru_cache
def _served(kind: str) -> tuple[str, ...]:
    """The names of a kind that a request may give: without what runs the subject model."""
    names = registry(kind)
    return tuple(x.name for x in names.listed() if x.trouble is None and not names.has(x.name, "live"))


def _one_of(kind: str) -> pydantic.AfterValidator:
    def check(name: str) -> str:
        if name not in _served(kind):
            known = ", ".join(_served(kind))
            raise ValueError(f"there is no {registry(kind).one} {name[:60]!r} here: choose from {known}")
        return name

    return pydantic.AfterValidator(check)


def _listed(kind: str) -> pydantic.WithJsonSchema:
    return pydantic.WithJsonSchema({"type": "string", "enum": list(_served(kind))})


_Stage = Annotated[str, _one_of("stages"), _listed("stages")]
_Explainer = Annotated[str, _one_of("explainers"), _listed("explainers")]
_Simulator = Annotated[str, _one_of("simulators"), _listed("simulators")]


class Submission(pydantic.BaseModel):
    """A job to be run. Names stand for what the operator allowed; there are no paths and no addresses."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {"run": "demo", "features": "random:10", "llm": None, "n_test": 8, "budget_usd": 1.5}
            ]
        },
    )

    run: str = pydantic.Field(pattern=_NAME, description="Name of a run folder (GET /api/runs).")
    features: str = pydantic.Field(
        default="random:10",
        min_length=1,
        max_length=2000,
        description='"0:40", "3,17", "random:20" or "alive".',
    )
    llm: str | None = pydantic.Field(
        default=None,
        pattern=_NAME,
        description="Name of an endpoint (GET /api/endpoints); null: the embedded model.",
    )
    stages: list[_Stage] = pydantic.Field(default=["explain", "simulate", "score"], max_length=16)
    explainer: _Explainer = "one-shot"
    holistic: HolisticMethod | None = pydantic.Field(
        default=None, description="Show the explainer which tokens cause the activations."
    )
    style: Form = "sentence"
    rule_cap: Annotated[int, pydantic.Field(ge=1, le=10), Integral] = 5
    simulator: _Simulator = "token-wise"
    simulator_model: str | None = pydantic.Field(
        default=None, max_length=200, description="One of the local models that are allowed."
    )
    n_test: Annotated[int, pydantic.Field(ge=1, le=100), Integral] = pydantic.Field(
        default=10, description="Test windows of each kind."
    )
    seed: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1), Integral] = 0
    budget_usd: float | None = pydantic.Field(default=None, gt=0, le=1e6)
    max_minutes: float | None = pydantic.Field(default=None, gt=0, le=1e5)


class Problem(pydantic.BaseModel):
    """Why a request was not done."""

    detail: str


class Feature(pydantic.BaseModel):
    """One feature of a job's results."""

    model_config = pydantic.ConfigDict(extra="allow")

    feature: int


class VisibleJson(JSONResponse):
    """JSON in which characters that steer a terminal or hide are written as JSON's own escapes; its value is
    the same.
    """

    def render(self, content: Any) -> bytes:
        """The body of an answer."""
        return as_json(content).encode()


def as_json(content: Any) -> str:
    return visible_json(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def _whole(text: Any) -> Any:
    """A number in a path or a query is written as in JSON: without spaces, signs, separators or digits of
    other scripts.
    """
    if isinstance(text, str) and not re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text, re.ASCII):
        raise ValueError("write an integer, such as 10")
    return text


JobId = Annotated[
    str, fastapi.Path(description="The job's id.", max_length=80, examples=["20260101-120000-0123abcd"])
]
Whole = pydantic.BeforeValidator(_whole)
Limit = Annotated[int, pydantic.Field(ge=1, le=1000), Whole, fastapi.Query(description="At most so many.")]
Offset = Annotated[
    int, pydantic.Field(ge=0, le=10**9), Whole, fastapi.Query(description="Leave out so many first.")
]
FeatureIndex = Annotated[int, pydantic.Field(ge=0, le=2**40), Whole, fastapi.Path()]
