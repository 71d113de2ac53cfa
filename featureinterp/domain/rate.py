"""Shares of texts, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

from featureinterp.domain.score import Interval, Score


@dataclass(frozen=True, slots=True)
class Rate:
    """``hits`` of ``n``. ``interval``: 95 %, Wilson's (1927). A rate over nothing is undefined (None)."""

    hits: int
    n: int

    @property
    def value(self) -> float | None:
        """The share."""
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's score interval."""
        if not self.n:
            return None
        from scipy.stats import binomtest

        found = binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return Interval(float(found.low), float(found.high))

    def score(self, name: str, undefined: str) -> Score:
        """As a score; ``undefined``: why it is, when it is over nothing."""
        return Score(
            name, self.value, self.n, interval=self.interval, undefined=None if self.n else undefined
        )
