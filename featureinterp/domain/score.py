"""How well an explanation did, with what is needed to judge the figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from featureinterp.domain.plain import AsRow, Plain


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Score(Plain):
    """One figure about one explanation.

    ``value`` is None when the figure is undefined, and ``undefined`` then says why. ``n_scored`` and
    ``n_failed`` count its parts (windows or questions). ``null``: the same figure for another feature's
    explanation on the same windows; ``null_failed``: its parts that failed.
    """

    name: str
    value: float | None
    n_scored: int
    n_failed: int = 0
    interval: Annotated[Interval, AsRow()] | None = None
    undefined: str | None = None
    null: float | None = None
    null_interval: Annotated[Interval, AsRow()] | None = None
    null_failed: int = 0

    def __post_init__(self) -> None:
        if (self.value is None) == (self.undefined is None):
            raise ValueError(f"the score {self.name} needs a value or a reason why it has none, and not both")

    @property
    def beats_null(self) -> bool:
        """Whether the interval lies above the null's value; False when either is undefined."""
        return self.interval is not None and self.null is not None and self.interval.low > self.null

    @property
    def clear_of_null(self) -> bool:
        """Whether the interval lies above the null's whole interval; False when either is undefined."""
        return (
            self.interval is not None
            and self.null_interval is not None
            and self.interval.low > self.null_interval.high
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that did not work, as a row: which feature and stage, the error's class and its message."""

    feature: int
    stage: str
    error: str
    message: str


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a simulator made of one window: expected level of every token, float64 ``[token]`` in 0 … 5, or
    the failure's cause.
    """

    expected: np.ndarray | None
    failure: str | None = None

    def __post_init__(self) -> None:
        if (self.expected is None) == (self.failure is None):
            raise ValueError("a simulation holds expected levels or the cause of its failure, and not both")


@dataclass(frozen=True, eq=False)
class Agreement:
    """Correlation of predictions with true activations over some windows. ``value`` None: undefined, or
    nothing could be simulated. ``without``, float64 ``[window]``: the same with that window left out, NaN
    where undefined. ``n_failed``: windows that could not be simulated; they are left out of everything, and
    NaN in ``without``."""

    value: float | None
    without: np.ndarray
    n_failed: int = 0
