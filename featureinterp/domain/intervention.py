"""What the subject writes while a feature's direction is added to its residual stream, beside random
directions of the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from featureinterp.domain.plain import AsRow, OfOneField
from featureinterp.domain.score import Interval, Score

Direction = Literal["none", "feature", "random"]


@dataclass(frozen=True, slots=True)
class SteeredText:
    """A text of the subject. ``direction`` and ``dose``: what was added while it was written; ``dose`` 1 is
    as much as the feature's largest activation in the corpus adds. ``activation``: the feature's largest
    activation when the text is read again without it (raw units). ``match``: probability that a judge says
    the text fits the explanation, 0 or 1 where it gives none; None when it could not be asked."""

    opening: str
    text: str
    direction: Direction
    dose: float
    activation: float
    match: float | None = None


@dataclass(frozen=True)
class Intervention(OfOneField):
    """The texts of one feature, in the order in which they were written."""

    texts: tuple[Annotated[SteeredText, AsRow()], ...]

    @property
    def doses(self) -> tuple[float, ...]:
        """Every dose, ascending; 0 is the model as it is."""
        return tuple(sorted({t.dose for t in self.texts}))

    def at(self, dose: float, direction: Direction) -> tuple[SteeredText, ...]:
        """The texts of a dose; at dose 0 there is no direction."""
        return tuple(t for t in self.texts if t.dose == dose and (t.direction == direction or dose == 0))

    def match(self, dose: float, direction: Direction) -> float | None:
        """Mean match of a dose; None when nothing was judged."""
        known = _matches(self.at(dose, direction))
        return float(known.mean()) if len(known) else None

    def effect(self, dose: float) -> Score:
        """Mean match with the feature's direction less that with random ones of the same length, with a
        bootstrap interval over texts.
        """
        own, other = (_matches(self.at(dose, direction)) for direction in ("feature", "random"))
        n = len(own) + len(other)
        failed = sum(t.match is None for t in self.texts if t.dose == dose)
        if not len(own) or not len(other):
            return Score("steering_effect", None, n, failed, undefined="no text could be judged")
        rng = np.random.default_rng(0)
        means = [rng.choice(values, (2000, len(values))).mean(1) for values in (own, other)]
        low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
        return Score(
            "steering_effect", float(own.mean() - other.mean()), n, failed, Interval(float(low), float(high))
        )


def _matches(texts: Sequence[SteeredText]) -> np.ndarray:
    return np.array([t.match for t in texts if t.match is not None], float)
