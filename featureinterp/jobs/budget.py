"""What a job may spend, and when it gives up."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pydantic

from featureinterp.domain.chat import Reply
from featureinterp.domain.score import Failure
from featureinterp.domain.usage import Usage
from featureinterp.errors import BudgetReachedError, InputError, TooManyFailuresError
from featureinterp.llm.prices import Price

FAILURES_COUNT_FROM = 20


@dataclass(frozen=True)
class Budget:
    """Limits of one run of a job; None: no limit. What earlier runs spent does not count."""

    usd: float | None = None
    tokens: int | None = None
    minutes: float | None = None

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for name, value in (("USD", self.usd), ("tokens", self.tokens), ("minutes", self.minutes)):
            if value is not None and not value > 0:
                raise InputError(f"a budget of {value:g} {name} allows nothing: give one above 0, or none")


class Guard:
    """Called before every request: raises ``BudgetReachedError`` when a limit has been reached. Called with
    every stage's outcome: raises ``TooManyFailuresError`` when at least 20 stages have run and more than
    ``max_failure_rate`` of them failed."""

    def __init__(
        self,
        budget: Budget,
        usage: Callable[[], Usage],
        *,
        max_failure_rate: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < max_failure_rate <= 1:
            raise InputError(
                f"a failure rate of {max_failure_rate:g} is not possible: give one above 0 and up to 1"
            )
        self.budget, self.max_failure_rate = budget, max_failure_rate
        self._usage, self._clock, self._start = usage, clock, clock()
        self._outcomes: Counter[bool] = Counter()
        self._causes: Counter[str] = Counter()

    def before(self) -> None:
        """Raises ``BudgetReachedError`` when nothing may be spent any more."""
        budget, used = self.budget, self._usage()
        if budget.usd is not None and used.cost_usd is None:
            raise BudgetReachedError(
                f"the budget of ${budget.usd:g} cannot be kept: what a reply cost is not known, as its "
                "model has no price and it came without a bill"
            )
        if budget.usd is not None and (used.cost_usd or 0.0) >= budget.usd:
            raise BudgetReachedError(
                f"the budget of ${budget.usd:g} is spent (${used.cost_usd:.4f}{estimate(used)})"
            )
        if budget.tokens is not None and used.tokens >= budget.tokens:
            raise BudgetReachedError(
                f"the budget of {budget.tokens:,} tokens is spent ({used.tokens:,}{estimate(used)})"
            )
        if budget.minutes is not None and self._clock() - self._start >= budget.minutes * 60:
            raise BudgetReachedError(f"the time of {budget.minutes:g} minutes is over")

    def fits(self, reserved: Usage) -> bool:
        """Whether ``reserved`` can be spent beside what is spent already."""
        budget, used = self.budget, self._usage()
        if budget.usd is not None and (used.cost_usd or 0.0) + (reserved.cost_usd or 0.0) > budget.usd:
            return False
        return budget.tokens is None or used.tokens + reserved.tokens <= budget.tokens

    def outcome(self, failure: Failure | None) -> None:
        """Counts a stage."""
        self._outcomes[failure is None] += 1
        if failure is None:
            return
        self._causes[f"{failure.stage}: {failure.error}: {failure.message}"] += 1
        n, failed = sum(self._outcomes.values()), self._outcomes[False]
        if n >= FAILURES_COUNT_FROM and failed > self.max_failure_rate * n:
            causes = "; ".join(f"{count} times {cause}" for cause, count in self._causes.most_common(3))
            raise TooManyFailuresError(
                f"{failed} of {n} stages failed, more than {self.max_failure_rate:.0%}, so the job "
                f"stopped: {causes}"
            )


async def check_endpoint(
    check: Callable[[], Awaitable[Reply | None]],
    model: str,
    *,
    budget: Budget,
    price: Price | None,
    path: Path,
) -> None:
    """Asks a first small request before any work. A budget in USD needs the model's ``price``, or the bill
    that this request comes with (OpenRouter's ``usage.cost``); ``path``: where prices belong.

    Raises ``InputError`` where there is neither, and a ``LanguageModelError`` when the endpoint cannot be
    used.
    """
    reply = await check()
    if budget.usd is not None and price is None and reply is not None and reply.usage.cost_usd is None:
        raise InputError(
            f"a budget in USD needs the price of {model!r}, which is not known, and its endpoint does not "
            "say what a reply "
            f"costs: add [prices.{json.dumps(model)}] with input and output (USD per million tokens) to "
            f"{path}, or give a "
            "budget in tokens or minutes"
        )


def estimate(used: Usage) -> str:
    """What is to be said beside a sum of which a part is an estimate; nothing beside one that is not."""
    if not used.estimated:
        return ""
    return f", an estimate: {used.estimated:,} of {used.requests:,} requests came without usable figures"
