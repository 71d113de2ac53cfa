"""Interventions: the subject writes while a feature's direction is added, and while random directions of the
same length are.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, replace
from typing import Any

import pydantic

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.intervention import Direction, Intervention, SteeredText
from featureinterp.errors import InputError
from featureinterp.formerly import readable_as, take
from featureinterp.interfaces import Activator, Judge, Steerer, settings_of

OPENINGS = ("I think that", "The most important", "It was a", "There is a")


@dataclass(frozen=True)
class SteeringSettings:
    """``doses``: in units of the feature's largest activation in the corpus, so that 1 adds what the feature
    itself contributes there; 0 is always among them. ``openings``: what texts begin with, one text each.
    ``n_random``: random directions of the same length, as a control. ``tokens_per_text`` (formerly
    ``max_tokens``): that the subject writes."""

    doses: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    openings: tuple[str, ...] = OPENINGS
    n_random: int = 2
    tokens_per_text: int = 32
    temperature: float = 0.7
    max_tokens: InitVar[int | None] = None

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self, max_tokens: int | None) -> None:
        take(self, tokens_per_text=max_tokens)
        if (
            not self.doses
            or not any(self.doses)
            or min(self.doses) < 0
            or not all(map(math.isfinite, self.doses))
        ):
            raise InputError(
                "steering needs doses above 0, in units of the feature's largest activation, such as 0.5, "
                "1 and 2"
            )
        if not self.openings or not all(o.strip() for o in self.openings):
            raise InputError("steering needs openings, such as 'I think that', for texts to begin with")
        if self.n_random < 1 or self.tokens_per_text < 1 or not 0 <= self.temperature < math.inf:
            raise InputError(
                "steering needs at least one random direction and one token, and a temperature of 0 or more"
            )


readable_as("max_tokens", "tokens_per_text", SteeringSettings)


class Interventions:
    """Steers ``steerer`` and reads what it writes with ``activator``; ``judge`` says how well each text fits
    the explanation.
    """

    def __init__(
        self,
        steerer: Steerer,
        activator: Activator,
        judge: Judge,
        settings: SteeringSettings | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.steerer, self.activator, self.judge = steerer, activator, judge
        self.steering, self.seed = settings or SteeringSettings(), seed

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the texts depend on, besides the feature."""
        s = self.steering
        shape = [list(s.doses), list(s.openings), s.n_random, s.tokens_per_text, s.temperature]
        return {"steering": shape, "seed": self.seed, "steerer": settings_of(self.steerer)}

    async def write(self, feature: FeatureId, scale: float) -> Intervention:
        """The texts, with the feature's activations when they are read again, and without a judgement."""
        arms: list[tuple[Direction, float, int | None]] = [("none", 0.0, None)]
        for dose in sorted({d for d in self.steering.doses if d > 0}):
            arms += [
                ("feature", dose, None),
                *(("random", dose, number) for number in range(self.steering.n_random)),
            ]
        found = []
        for direction, dose, number in arms:
            texts = await self.steerer.write(
                feature.index,
                dose * scale,
                self.steering.openings,
                random=number,
                max_tokens=self.steering.tokens_per_text,
                temperature=self.steering.temperature,
                seed=self.seed,
            )
            windows = await self.activator.run(
                feature, [o + t for o, t in zip(self.steering.openings, texts, strict=True)]
            )
            for opening, text, window in zip(self.steering.openings, texts, windows, strict=True):
                found.append(SteeredText(opening, text, direction, dose, round(window.max_activation, 4)))
        return Intervention(tuple(found))

    async def judged(self, explanation: Explanation, written: Intervention) -> Intervention:
        """The same with how well each text fits the explanation. Equal texts are asked about once."""
        texts = list(dict.fromkeys(t.opening + t.text for t in written.texts))
        matches = dict(zip(texts, await self.judge(explanation, texts), strict=True))
        return Intervention(tuple(replace(t, match=matches[t.opening + t.text]) for t in written.texts))
