"""What an endpoint can do, found out with a few small requests and remembered in the user's cache."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.plain import Plain
from featureinterp.domain.usage import Usage, cost_in_words
from featureinterp.errors import LanguageModelError, MalformedReplyError
from featureinterp.files import content_key
from featureinterp.llm.accepts import Accepts
from featureinterp.llm.config import LOCAL, Endpoint
from featureinterp.llm.learnt import forget
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.prices import Price
from featureinterp.llm.stack import open_stack
from featureinterp.replies import parse_reply
from featureinterp.stored.sums import read_cache, write_marker

_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string"}},
    "required": ["colour"],
    "additionalProperties": False,
}
_ASK = (Message("user", 'Name a colour, as JSON: {"colour": "..."}'),)
_YES = (Message("user", "Say yes."),)
_ONE, _OTHER = tuple(range(100, 116)), tuple(range(200, 216))
_SAME = 1e-3


class _Colour(pydantic.BaseModel):
    colour: str


@dataclass(frozen=True)
class Probed(Plain):
    """What was found. ``reply_form``: the strictest form of a structured reply that is taken, None when none
    was given. ``follows``: whether the reply had it. ``prompt_logprobs``: the field that asks for the
    probabilities of a prompt's tokens, None when there is none. ``order_matters``: whether they changed when
    another prompt was read in between; None when there are none. ``call``: of one small call. ``usage``: of
    all. ``problem``: why the endpoint could not be asked further. ``otherwise``: what it is sent in another
    form than OpenAI's older one. ``thinks``: its replies begin with thoughts."""

    reply_form: str | None
    follows: bool
    logprobs: bool
    choices: bool
    prompt_logprobs: str | None
    order_matters: bool | None
    call: Usage
    usage: Usage
    at: float
    problem: str | None = None
    otherwise: tuple[str, ...] = ()
    thinks: bool = False

    @property
    def summary(self) -> str:
        """The capabilities in a few words."""
        if self.reply_form is None:
            return "does not answer"
        names = [self.reply_form.replace("_", " ")]
        names += [
            name
            for name, on in (
                ("logprobs", self.logprobs),
                ("prompt logprobs", self.prompt_logprobs),
                ("several choices", self.choices),
            )
            if on
        ]
        return ", ".join(names)

    def lines(self) -> list[tuple[str, str]]:
        """What a person reads."""
        tested = self.reply_form is not None
        prompts = {
            "prompt_logprobs": "yes (prompt_logprobs)",
            "echo": "yes (echo)",
            None: "no: use the rated simulator, or a local one",
        }
        warning = (
            "; they depend on the order of requests, so scores do a little, too" if self.order_matters else ""
        )
        rows = [
            (
                "answers",
                "yes" if self.problem is None else f"{'in part' if tested else 'no'}: {self.problem}",
            ),
            (
                "structured replies",
                _FORM_NAMES[self.reply_form or "none"]
                + ("" if self.follows or not tested else ", but its reply did not have the form"),
            ),
            ("logprobs", "yes" if self.logprobs else "no: verdicts are words, without probabilities"),
            ("prompt logprobs", prompts[self.prompt_logprobs] + warning),
            ("several choices", "yes" if self.choices else "no"),
            ("thinks", "yes: --thinking-tokens gives it room, --effort less to do" if self.thinks else "no"),
            ("sent otherwise", ", ".join(self.otherwise) or "nothing"),
        ]
        if not tested:
            rows = [(name, value if name == "answers" else "not tested") for name, value in rows]
        spent = f"{self.call.seconds:.2f} s, {_spent(self.call)}" if tested else "none was answered"
        return [
            *rows,
            ("one small call", spent),
            ("this test", f"{self.usage.requests} calls, {_spent(self.usage)}"),
        ]


_WAYS = (None, "prompt_logprobs", "echo")
_PROBED = pydantic.TypeAdapter(Probed)
_FORM_NAMES = {
    "json_schema": "JSON schema",
    "plain_schema": "JSON schema without bounds",
    "bare_schema": "JSON schema without bounds and strictness",
    "json_object": "JSON without a schema",
    "text": "free text only",
    "none": "not tested",
}


def _spent(usage: Usage) -> str:
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    return f"{tokens} {cost_in_words(usage.cost_usd, 6)}"


async def probe(endpoint: Endpoint, price: Price | None = None) -> Probed:
    """Asks an endpoint what it can do, and learns anew what it takes. An endpoint that does not answer is a
    finding with its cause in ``problem``; raises ``InputError`` for what cannot even be asked."""
    meter = Meter()
    if endpoint.base_url not in (None, LOCAL):
        forget(str(endpoint.base_url), endpoint.model)
    async with open_stack(endpoint, meter, price=price) as stack:
        found = await _Test(Metered(stack.bare, meter, price=price), stack.bare, meter).run()
    write_marker(_file(endpoint), found.to_json())
    return found


class _Test:
    """The questions of one test, in order; each failure is noted, and ends it only when nothing can be asked
    any more.
    """

    def __init__(self, model: Metered, bare: Any, meter: Meter) -> None:
        self.model, self.bare, self.meter = model, bare, meter
        self.problem: str | None = None

    async def run(self) -> Probed:
        form, follows, logprobs, choices, call = None, False, False, False, Usage()
        way: str | None = None
        order_matters: bool | None = None
        said = await self.ask(Request(_YES, 4, top_logprobs=5))
        if said is not None:
            logprobs = bool(said.first_token and said.first_token[0])
            reply = await self.ask(Request(_ASK, 40, schema=_SCHEMA))
            form, call = self.accepts.reply_form if self.accepts else "json_schema", (reply or said).usage
            follows = reply is not None and _has_colour(reply.text)
            several = await self.ask(Request(_ASK, 40, temperature=1.0, n=2))
            choices = several is not None and len(several.texts) == 2
            way, order_matters = await self.prompts()
        accepts = self.accepts
        otherwise, thinks = (accepts.differences, accepts.thinks) if accepts else ((), False)
        return Probed(
            form,
            follows,
            logprobs,
            choices,
            way,
            order_matters,
            call,
            self.meter.usage,
            time.time(),
            self.problem,
            otherwise,
            thinks,
        )

    @property
    def accepts(self) -> Accepts | None:
        """What is known of the endpoint by now; None for a model of this machine."""
        return getattr(self.bare, "accepts", None)

    async def ask(self, request: Request) -> Reply | None:
        """A reply, or None with the cause noted."""
        try:
            reply = await self.model.complete(request)
        except LanguageModelError as error:
            self.problem = self.problem or str(error)
            self.meter.refused = None
            return None
        if reply.refused is not None:
            self.problem = self.problem or reply.refused
        return reply if reply.refused is None else None

    async def prompts(self) -> tuple[str | None, bool | None]:
        """How prompts can be read, and whether the order of requests changes what is read."""
        if self.accepts is None:
            return None, None
        read = [
            Request(prompt=ids, read_at=tuple(range(1, len(ids))), top_logprobs=5)
            for ids in (_ONE, _OTHER, _ONE)
        ]
        try:
            first, _, again = [(await self.model.complete(r)).read for r in read]
        except LanguageModelError:
            return None, None
        changed = any(
            a.keys() != b.keys() or any(abs(a[t] - b[t]) > _SAME for t in a)
            for a, b in zip(first, again, strict=True)
        )
        return self.accepts.prompt_logprobs, changed


def _has_colour(text: str) -> bool:
    try:
        return bool(parse_reply(text, _Colour).colour)
    except MalformedReplyError:
        return False


def recall(endpoint: Endpoint) -> Probed | None:
    """What the last :func:`probe` of an endpoint found; None when there was none."""
    kept = read_cache(_file(endpoint))
    try:
        text = json.dumps(kept, allow_nan=False)
        found = None if kept is None else _PROBED.validate_json(text, strict=True)
    except (ValueError, RecursionError):  # of an earlier version, or damaged
        return None
    known = found is not None and found.reply_form in (None, *_FORM_NAMES) and found.prompt_logprobs in _WAYS
    return found if known else None


def _file(endpoint: Endpoint) -> Path:
    from featureinterp.assets import cache_folder

    return cache_folder() / "probed" / f"{content_key([endpoint.base_url, endpoint.model])}.json"
