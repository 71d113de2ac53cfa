"""Adding up what was used, and stopping before it is more than was allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError
from featureinterp.interfaces import LanguageModel
from featureinterp.llm.prices import Price
from featureinterp.llm.types import Reply, Request


@dataclass
class Meter:
    """What a job has used so far, over all its models. ``before`` is called before every request and raises when there is
    nothing left to spend. ``in_flight``: requests under way. ``refused``: why no further request has a chance."""

    usage: Usage = field(default_factory=Usage)
    in_flight: int = 0
    before: Callable[[], None] = lambda: None
    refused: EndpointRefusedError | None = None


class Metered:
    """Passes requests on to ``model``, prices the replies and adds them up in ``meter``. Stands inside of ``Limited``: a request
    that waits for its turn is not sent any more when the budget has been reached or the key refused meanwhile."""

    def __init__(self, model: LanguageModel, meter: Meter | None = None, *, price: Price | None = None) -> None:
        self.name = model.name
        self.meter = meter or Meter()
        self._model, self._price = model, price

    @property
    def usage(self) -> Usage:
        """The sum so far."""
        return self.meter.usage

    async def complete(self, request: Request) -> Reply:
        if self.meter.refused is not None:
            raise self.meter.refused
        self.meter.before()
        self.meter.in_flight += 1
        try:
            reply = await self._model.complete(request)
        except EndpointRefusedError as error:
            self.meter.refused = error
            raise
        finally:
            self.meter.in_flight -= 1
        if self._price is not None:
            reply = replace(reply, usage=replace(reply.usage, cost_usd=self._price.of(reply.usage)))
        self.meter.usage += reply.usage
        return reply
