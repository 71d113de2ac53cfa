"""What a job of explaining is asked to do, and how it says how far it is and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass

import pydantic

from featureinterp.domain.record import Source, SplitName
from featureinterp.domain.result import FeatureResult
from featureinterp.errors import InputError, JobStoppedError
from featureinterp.formerly import readable_as, take
from featureinterp.registry import WINDOWS
from featureinterp.validation import check_seed

Part = tuple[SplitName, Source]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. ``in_flight``: requests under way. ``cost_usd`` None: the price is not known.
    ``seconds`` since the run began, ``left_s`` until it is likely to end (None: not known yet).
    ``estimated``: requests whose tokens were not reported, but estimated."""

    done: int
    failed: int
    total: int
    in_flight: int
    requests: int
    tokens: int
    cost_usd: float | None
    seconds: float
    left_s: float | None
    estimated: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a screen may show: ``stage`` ("explained", "scored"), the feature, and how many of
    ``total`` are through it.
    """

    stage: str
    result: FeatureResult
    done: int
    total: int
    progress: Progress
    reused: bool = False


@dataclass(frozen=True)
class Plan:
    """How explanations are judged.

    ``n_test``, ``n_valid``: windows per source at most. ``negatives``: the kinds of windows that top windows
    are put beside, each giving a correlation of its own; the first is the main one, and the null and the
    affine fit use it. ``features_at_once`` (formerly ``concurrency``): how many are worked on at once.
    ``simulate``: whether explanations are simulated at all.
    """

    n_test: int = 10
    n_valid: int = 5
    negatives: tuple[Source, ...] = ("random", "similar_negative", "random_negative")
    simulate: bool = True
    detection: bool = True
    fuzzing: bool = True
    complexity: bool = True
    features_at_once: int = 16
    seed: int = 0
    concurrency: InitVar[int | None] = None

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self, concurrency: int | None) -> None:
        take(self, features_at_once=concurrency)
        for source in self.negatives:
            WINDOWS.check(source)
        if self.features_at_once < 1:
            raise InputError(
                f"features_at_once = {self.features_at_once} leaves nothing to do: give at least 1"
            )
        check_seed(self.seed)
        if self.n_test < 1:
            raise InputError(f"{self.n_test} test windows judge nothing: give at least 1 (n_test)")
        if self.n_valid < 0:
            raise InputError(f"{self.n_valid} validation windows are not possible: give 0 or more")
        kinds = set(self.negatives)
        if not kinds or len(kinds) < len(self.negatives) or "top" in kinds:
            raise InputError(
                f"the negatives {list(self.negatives)} are not possible: give at least one kind of windows "
                "to put top windows beside, each once, such as random"
            )

    def parts(self) -> list[tuple[Part, int]]:
        """What is simulated, with the feature's own explanation and with the null's."""
        main = self.negatives[0]
        return [
            (("test", "top"), self.n_test),
            *((("test", source), self.n_test) for source in self.negatives),
            (("valid", "top"), self.n_valid),
            (("valid", main), self.n_valid),
        ]

    def main_parts(self) -> list[tuple[Part, int]]:
        """What the main correlation is over."""
        return [(("test", "top"), self.n_test), (("test", self.negatives[0]), self.n_test)]


readable_as("concurrency", "features_at_once", Plan)


@dataclass(frozen=True)
class Outcome:
    """How a run of a job ended. ``status`` of every feature that it is through with ("done", "partial",
    "failed"), those of earlier runs included; ``left``: the features that it is not through with.
    ``stopped``: why it ended before it was through. ``price_of_the_rest``: USD that the features left would
    take, if they cost what those of this run did; None when that is not known."""

    job: str
    status: Mapping[int, str]
    left: tuple[int, ...]
    progress: Progress
    stopped: JobStoppedError | None = None
    price_of_the_rest: float | None = None
