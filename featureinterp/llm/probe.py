"""What an endpoint can do, found out with a few small requests and remembered in the user's cache."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic

from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, LanguageModelError, MalformedReplyError
from featureinterp.files import content_key, write_json
from featureinterp.llm.config import Endpoint
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.prices import Price
from featureinterp.llm.stack import open_stack
from featureinterp.llm.types import Message, Request
from featureinterp.replies import parse_reply

_SCHEMA = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"], "additionalProperties": False}
_ASK = (Message("user", 'Name a colour, as JSON: {"colour": "..."}'),)
_ONE, _OTHER = tuple(range(100, 116)), tuple(range(200, 216))
_SAME = 1e-3


class _Colour(pydantic.BaseModel):
    colour: str


@dataclass(frozen=True)
class Probed:
    """What was found. ``reply_form``: the strictest form of a structured reply that is taken. ``follows``: whether the reply had it.
    ``prompt_logprobs``: the field that asks for the probabilities of a prompt's tokens, None when there is none. ``order_matters``: whether
    they changed when another prompt was read in between; None when there are none. ``call``: of one small call. ``usage``: of all."""

    reply_form: str
    follows: bool
    logprobs: bool
    choices: bool
    prompt_logprobs: str | None
    order_matters: bool | None
    call: Usage
    usage: Usage
    at: float

    @property
    def summary(self) -> str:
        """The capabilities in a few words."""
        names = [self.reply_form.replace("_", " ")]
        names += [name for name, on in (("logprobs", self.logprobs), ("prompt logprobs", self.prompt_logprobs), ("several choices", self.choices)) if on]
        return ", ".join(names)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Probed:
        """Reads what :meth:`to_json` wrote."""
        return cls(**{**value, "call": Usage(**value["call"]), "usage": Usage(**value["usage"])})

    def lines(self) -> list[tuple[str, str]]:
        """What a person reads."""
        form = {"json_schema": "JSON schema", "json_object": "JSON without a schema", "text": "free text only"}[self.reply_form]
        prompts = {"prompt_logprobs": "yes (prompt_logprobs)", "echo": "yes (echo)", None: "no: use the rated simulator, or a local one"}
        warning = "; they depend on the order of requests, so scores do a little, too" if self.order_matters else ""
        return [
            ("structured replies", form + ("" if self.follows else ", but its reply did not have the form")),
            ("logprobs", "yes" if self.logprobs else "no: verdicts are words, without probabilities"),
            ("prompt logprobs", prompts[self.prompt_logprobs] + warning),
            ("several choices", "yes" if self.choices else "no"),
            ("one small call", f"{self.call.seconds:.2f} s, {_spent(self.call)}"),
            ("this test", f"{self.usage.requests} calls, {_spent(self.usage)}"),
        ]


def _spent(usage: Usage) -> str:
    cost = "price not known" if usage.cost_usd is None else f"${usage.cost_usd:.6f}"
    return f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {cost}"


async def probe(endpoint: Endpoint, price: Price | None = None) -> Probed:
    """Asks an endpoint what it can do. Raises a ``LanguageModelError`` when it does not answer at all."""
    meter = Meter()
    async with open_stack(endpoint, meter, price=price) as stack:
        model = Metered(stack.bare, meter, price=price)
        reply = await model.complete(Request(_ASK, 40, schema=_SCHEMA))
        try:
            follows = bool(parse_reply(reply.text, _Colour).colour)
        except MalformedReplyError:
            follows = False
        found = await model.complete(Request((Message("user", "Say yes."),), 4, top_logprobs=5))
        accepts = getattr(stack.bare, "accepts", None)
        try:
            choices = len((await model.complete(Request(_ASK, 8, temperature=1.0, n=2))).texts) == 2
        except LanguageModelError:
            choices = False
        form = accepts.reply_form if accepts else "json_schema"
        meter.refused = None
        way, order_matters = await _prompts(model, accepts)
    probed = Probed(form, follows, bool(found.first_token and found.first_token[0]), choices, way, order_matters, reply.usage, meter.usage, time.time())
    write_json(_file(endpoint), probed.to_json())
    return probed


async def _prompts(model: Metered, accepts: Any) -> tuple[str | None, bool | None]:
    if accepts is None:
        return None, None
    read = [Request(prompt=ids, read_at=tuple(range(1, len(ids))), top_logprobs=5) for ids in (_ONE, _OTHER, _ONE)]
    try:
        first, _, again = [(await model.complete(r)).read for r in read]
    except (EndpointRefusedError, MalformedReplyError):
        return None, None
    changed = any(a.keys() != b.keys() or any(abs(a[t] - b[t]) > _SAME for t in a) for a, b in zip(first, again, strict=True))
    return accepts.prompt_logprobs, changed


def recall(endpoint: Endpoint) -> Probed | None:
    """What the last :func:`probe` of an endpoint found; None when there was none."""
    try:
        return Probed.from_json(json.loads(_file(endpoint).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _file(endpoint: Endpoint) -> Path:
    from featureinterp.assets import cache_folder

    return cache_folder() / "probed" / f"{content_key([endpoint.base_url, endpoint.model])}.json"
