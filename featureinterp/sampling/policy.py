"""How many windows of each kind a record gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pydantic

from featureinterp.domain.choices import Projection
from featureinterp.domain.record import Source
from featureinterp.errors import InputError
from featureinterp.registry import WINDOWS
from featureinterp.sampling.projected import PROJECTIONS
from featureinterp.validation import check_seed


@dataclass(frozen=True)
class RecordPolicy:
    """How many windows of each source go to (train, valid, test), and how they are drawn.

    ``n_quantiles``: the ranking is cut into so many parts and top windows come from the first.
    ``half_width``: tokens kept on each side of an importance-weighted position. ``projection``: that of
    ``projected_similar`` windows. ``n_neighbours``: how many features of the nearest decoder directions
    ``coactive_negative`` windows are looked for with.
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
    projection: Projection = "closed-form"
    n_neighbours: int = 8

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for source, counts in self.counts.items():
            if len(counts) != 3 or any(type(n) is not int for n in counts) or min(counts) < 0:
                raise InputError(
                    f"the record policy has {source}: {counts}: give three whole numbers of windows, 0 or "
                    "more, for train, valid and test"
                )
            WINDOWS.check(source)
        if self.projection not in PROJECTIONS:
            raise InputError(
                f"there is no projection {self.projection!r}: choose from {', '.join(PROJECTIONS)}"
            )
        if self.n_neighbours < 1:
            raise InputError(f"co-active windows of {self.n_neighbours} neighbours are none: give at least 1")
        if self.n_quantiles < 1 or self.half_width < 0:
            raise InputError(
                f"n_quantiles = {self.n_quantiles} and half_width = {self.half_width} are not possible: give "
                "at least 1 and at least 0"
            )
        check_seed(self.seed)

    def wants(self, *sources: Source) -> bool:
        """Whether any window of one of these sources is asked for."""
        return any(sum(self.counts.get(source, (0, 0, 0))) for source in sources)

    @property
    def embeds(self) -> bool:
        """Whether the windows' embeddings are needed."""
        wanted = (source for source, counts in self.counts.items() if sum(counts))
        return any(WINDOWS.has(source, "embeds") for source in wanted)
