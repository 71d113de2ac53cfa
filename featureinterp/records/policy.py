"""How many windows of each kind a record gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pydantic

from featureinterp.domain.record import SOURCES, Source
from featureinterp.errors import InputError


@dataclass(frozen=True)
class RecordPolicy:
    """How many windows of each source go to (train, valid, test), and how they are drawn.

    ``n_quantiles``: the ranking is cut into so many parts and top windows come from the first. ``half_width``: tokens kept on
    each side of an importance-weighted position.
    """

    counts: Mapping[Source, tuple[int, int, int]] = field(
        default_factory=lambda: {
            "top": (10, 10, 10),
            "similar_negative": (10, 10, 10),
            "weighted": (5, 2, 2),
            "quantile": (0, 5, 5),
            "similar": (0, 5, 5),
            "random_negative": (10, 10, 10),
            "random": (0, 10, 10),
        }
    )
    n_quantiles: int = 1000
    half_width: int = 10
    seed: int = 0

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for source, counts in self.counts.items():
            if source not in SOURCES or len(counts) != 3 or min(counts) < 0:
                raise InputError(f"the record policy has {source}: {counts}: give a known source ({', '.join(SOURCES)}) and three counts ≥ 0")
