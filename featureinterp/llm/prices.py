"""What tokens cost: a table of prices per model, which a user's configuration extends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pydantic

from featureinterp.domain.usage import Usage
from featureinterp.errors import InputError


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens of the prompt and of the reply. ``cached_input``: of those that the provider has
    in its cache; as much as ``input`` when not given."""

    input: float
    output: float
    cached_input: float | None = None

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached_input"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(
                    f"a price of {value} for {name} is not possible: give USD per million tokens, 0 or more"
                )

    def of(self, usage: Usage) -> float:
        """USD for the tokens of ``usage``."""
        cached = self.input if self.cached_input is None else self.cached_input
        read = (usage.prompt_tokens - usage.cached_tokens) * self.input + usage.cached_tokens * cached
        return (read + usage.completion_tokens * self.output) / 1e6


FREE = Price(0.0, 0.0)

PRICES: Mapping[str, Price] = {
    "gpt-4o": Price(2.50, 10.00, 1.25),
    "gpt-4o-mini": Price(0.15, 0.60, 0.075),
    "gpt-4.1": Price(2.00, 8.00, 0.50),
    "gpt-4.1-mini": Price(0.40, 1.60, 0.10),
    "gpt-4.1-nano": Price(0.10, 0.40, 0.025),
    "gemini-2.5-flash": Price(0.30, 2.50, 0.075),
    "gemini-2.5-flash-lite": Price(0.10, 0.40, 0.025),
}
"""List prices of 2025-10, without discounts but that for cached tokens, of Gemini's the smaller one that it
began with; a provider's present ones belong into the configuration file."""


def price_of(model: str, table: Mapping[str, Price] = PRICES) -> Price | None:
    """The price of a model, also when a router's prefix (``vendor/``) stands before its name; None when it is
    not known.
    """
    return table.get(model) or table.get(model.rsplit("/", 1)[-1])
