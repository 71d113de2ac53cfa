"""Simulations of a search, kept in the journal, so that a search that was interrupted goes on where it
was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.files import content_key
from featureinterp.interfaces import Simulator, settings_of
from featureinterp.jobs.journal import Journal
from featureinterp.llm.tally import count, tally

STAGE = "simulate-search"
_FEATURE: ContextVar[int] = ContextVar("feature")


@contextmanager
def working_on(feature: int) -> Iterator[None]:
    """Says which feature the simulations within the block are for."""
    token = _FEATURE.set(feature)
    try:
        yield
    finally:
        _FEATURE.reset(token)


class KeptSimulator:
    """Simulates with ``simulator`` what ``journal`` does not hold. Use it within :func:`working_on`."""

    def __init__(self, simulator: Simulator, journal: Journal) -> None:
        self.settings: dict[str, Any] = settings_of(simulator)
        self._simulator, self._journal = simulator, journal

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """As the simulator; windows that failed are tried again another time."""
        key = content_key(
            {
                "stage": STAGE,
                "simulator": self.settings,
                "rules": [[r.activates_on, r.strength] for r in explanation.rules],
                "windows": [w.pieces for w in windows],
            }
        )
        known = self._journal.get(key)
        if known is not None and known.status == "done":
            count(known.usage)
            return simulations_of(known.value)
        with tally() as spent:
            simulations = await self._simulator.simulate(explanation, windows)
        failed = any(s.expected is None for s in simulations)
        if len(simulations) and not all(s.expected is None for s in simulations):
            self._journal.stage(
                key,
                _FEATURE.get(),
                STAGE,
                value_of(simulations),
                usage=spent.usage,
                provenance=self.settings,
                partial=failed,
            )
        return simulations


def value_of(simulations: Sequence[Simulation]) -> list[Any]:
    """Simulations as the journal keeps them."""
    return [
        {"failure": s.failure} if s.expected is None else np.round(s.expected, 5).tolist()
        for s in simulations
    ]


def simulations_of(value: Sequence[Any]) -> list[Simulation]:
    """Reads what :func:`value_of` made."""
    return [Simulation(None, v["failure"]) if isinstance(v, dict) else Simulation(np.array(v)) for v in value]
