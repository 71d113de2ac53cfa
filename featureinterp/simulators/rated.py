"""The rated simulator for chat endpoints without prompt logprobs: the model writes a level for every numbered
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic

from featureinterp.domain.chat import Message, Reply, Request, cut_short
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.errors import (
    EndpointRefusedError,
    LanguageModelError,
    MalformedReplyError,
)
from featureinterp.interfaces import LanguageModel, Parts
from featureinterp.prompts import escape, load_prompt
from featureinterp.replies import Level, parse_reply
from featureinterp.tasks import each

MAX_ATTEMPTS = 3


class LevelsReply(pydantic.BaseModel):
    """One list of levels per text."""

    levels: list[list[Level]]


class Rated:
    """Asks for levels of several windows at once; one simulation per rule, combined as the maximum of level ·
    strength / 5.

    A reply with the wrong number of texts or levels is a failure of its windows, with the cause; it is never
    filled in.
    """

    def __init__(self, model: LanguageModel, *, version: str = "v1", windows_per_request: int = 4) -> None:
        self.model, self.windows_per_request = model, windows_per_request
        self.prompt = load_prompt("simulate-rated", version)

    @classmethod
    def of_job(cls, parts: Parts) -> Rated:
        """The simulator of a job."""
        return cls(parts.model)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a simulation depends on, besides explanation and window."""
        return {
            "simulator": "rated",
            "model": self.model.name,
            "prompt": self.prompt.name,
            "prompt_hash": self.prompt.hash,
            "windows_per_request": self.windows_per_request,
        }

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        """One simulation per window."""
        chunks = [
            windows[i : i + self.windows_per_request]
            for i in range(0, len(windows), self.windows_per_request)
        ]
        places = [(r, c) for r in range(len(explanation.rules)) for c in range(len(chunks))]
        found = await each(
            lambda place: self._chunk(explanation.rules[place[0]].activates_on, chunks[place[1]]), places
        )
        results = dict(zip(places, found, strict=True))
        out = []
        for c, chunk in enumerate(chunks):
            for i in range(len(chunk)):
                per_rule = [(rule.strength / 5, results[r, c][i]) for r, rule in enumerate(explanation.rules)]
                out.append(_combine(per_rule))
        return out

    async def _chunk(self, description: str, windows: Sequence[Window]) -> list[Simulation]:
        texts = [[escape(p) for p in w.pieces] for w in windows]
        messages = (
            Message("system", self.prompt.text("system.txt")),
            Message("user", self.prompt.render("user.j2", description=escape(description), texts=texts)),
        )
        schema = _schema([len(t) for t in texts])
        budget = 40 + 6 * sum(len(t) for t in texts)

        def read(reply: Reply) -> list[np.ndarray]:
            if reply.truncated[0]:
                raise cut_short(reply, limit=budget)
            return _check(parse_reply(reply.text, LevelsReply), [len(t) for t in texts])

        cause: LanguageModelError | None = None
        for attempt in range(MAX_ATTEMPTS):
            try:
                reply = await self.model.complete(
                    Request(messages, budget, 0.0 if not attempt else 0.5, attempt, schema=schema, check=read)
                )
                return [Simulation(levels) for levels in read(reply)]
            except MalformedReplyError as error:
                cause = error
            except EndpointRefusedError:
                raise
            except LanguageModelError as error:
                cause = error
                break
        return [Simulation(None, f"{type(cause).__name__}: {cause}")] * len(windows)


def _check(reply: LevelsReply, sizes: Sequence[int]) -> list[np.ndarray]:
    if [len(levels) for levels in reply.levels] != list(sizes):
        raise MalformedReplyError(
            f"the reply has {[len(levels) for levels in reply.levels]} levels for texts of {list(sizes)} "
            "tokens"
        )
    return [np.array(levels, np.float64) for levels in reply.levels]


def _combine(per_rule: Sequence[tuple[float, Simulation]]) -> Simulation:
    failed = next((s for _, s in per_rule if s.expected is None), None)
    if failed is not None:
        return failed
    return Simulation(
        np.max([weight * s.expected for weight, s in per_rule if s.expected is not None], axis=0)
    )


def _schema(sizes: Sequence[int]) -> dict[str, Any]:
    level = {"type": "integer", "minimum": 0, "maximum": 5}
    texts = [{"type": "array", "items": level, "minItems": n, "maxItems": n} for n in sizes]
    levels = {"type": "array", "prefixItems": texts, "minItems": len(sizes), "maxItems": len(sizes)}
    return {
        "type": "object",
        "properties": {"levels": levels},
        "required": ["levels"],
        "additionalProperties": False,
    }
