"""What a call to a language model cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, wall seconds and money. ``cost_usd`` is None when the price is not known; unknown plus anything
    is unknown.

    ``completion_tokens``: with those of thoughts, which are billed, too. ``cached_tokens``: how many of
    ``prompt_tokens`` the provider took from its own cache, at their own price. ``estimated``: how many of the
    requests came without a usable count of tokens, so that theirs is an estimate by the length of the texts.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost_usd: float | None = 0.0
    cached_tokens: int = 0
    estimated: int = 0

    @property
    def tokens(self) -> int:
        """Of prompts and replies."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        cost = None if self.cost_usd is None or other.cost_usd is None else self.cost_usd + other.cost_usd
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
            cost,
            self.cached_tokens + other.cached_tokens,
            self.estimated + other.estimated,
        )


def cost_in_words(cost_usd: float | None, digits: int = 4, *, about: bool = False) -> str:
    """What something cost, for the end of a sentence: with so many digits of a dollar, or that no price is
    known.
    """
    if cost_usd is None:
        return "at a price that is not known"
    return f"for {'about ' if about else ''}${cost_usd:.{digits}f}"
