"""What tokens cost: a table of prices per model, which a user's configuration extends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from featureinterp.domain.usage import Usage


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens of the prompt and of the reply."""

    input: float
    output: float

    def of(self, usage: Usage) -> float:
        """USD for the tokens of ``usage``."""
        return (usage.prompt_tokens * self.input + usage.completion_tokens * self.output) / 1e6


FREE = Price(0.0, 0.0)

PRICES: Mapping[str, Price] = {
    "gpt-4o": Price(2.50, 10.00),
    "gpt-4o-mini": Price(0.15, 0.60),
    "gpt-4.1": Price(2.00, 8.00),
    "gpt-4.1-mini": Price(0.40, 1.60),
    "gpt-4.1-nano": Price(0.10, 0.40),
    "gemini-2.5-flash": Price(0.30, 2.50),
    "gemini-2.5-flash-lite": Price(0.10, 0.40),
}
"""List prices of 2025-10, without discounts; a provider's present ones belong into the configuration file."""


def price_of(model: str, table: Mapping[str, Price] = PRICES) -> Price | None:
    """The price of a model, also when a router's prefix (``vendor/``) stands before its name; None when it is not known."""
    return table.get(model) or table.get(model.rsplit("/", 1)[-1])
