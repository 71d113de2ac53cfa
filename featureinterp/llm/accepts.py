"""What an endpoint takes, and the body of a request that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from featureinterp.domain.chat import Message, Request
from featureinterp.llm.roles import as_text

ReplyForm = Literal["json_schema", "plain_schema", "bare_schema", "json_object", "text"]
"""From strict to loose. ``plain_schema``: the schema without bounds; ``bare_schema``: also without
``additionalProperties`` and ``strict``.
"""
THINKING_TOKENS = 4096
"""Room for the thoughts of a model that thinks, where the user gives none."""
_BOUNDS = {
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "default",
    "title",
    "prefixItems",
}
SAY_JSON = "Reply as JSON."


@dataclass(frozen=True, slots=True)
class Options:
    """What a user asks for beside a request. ``reply_tokens``: at least so much room for every reply.
    ``thinking_tokens``: room for thoughts beside it (None: 4,096 from the first reply on that shows
    thoughts). ``effort``: how hard to think, in the provider's words. ``extra``: fields of every body."""

    reply_tokens: int | None = None
    thinking_tokens: int | None = None
    effort: str | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def identity(self) -> list[Any]:
        """What of it can change an answer that came whole."""
        return [self.effort] if self.effort is not None else []


@dataclass(frozen=True, slots=True)
class Accepts:
    """What an endpoint takes, learnt from its refusals: each is tried once and left out, or put otherwise,
    from then on.

    ``reply_form``: the strictest form of a structured reply. ``most_logprobs``: alternatives per token at
    most, None: no limit is known.
    ``several``: replies to one request. ``system``: a system message; else it is put before the first
    question. ``stream``: only replies in pieces.
    ``thinks``: the model writes thoughts, which need room. ``least_tokens``, ``most_tokens``: bounds of the
    length. ``path``: what stands between base URL and call. ``prompt_logprobs``: the field that asks for the
    probabilities of a prompt, None when neither is taken.
    """

    reply_form: ReplyForm = "json_schema"
    logprobs: bool = True
    most_logprobs: int | None = None
    seed: bool = True
    temperature: bool = True
    several: bool = True
    stop: bool = True
    system: bool = True
    stream: bool = False
    thinks: bool = False
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    least_tokens: int = 0
    most_tokens: int | None = None
    path: str | None = None
    prompt_logprobs: Literal["prompt_logprobs", "echo"] | None = "prompt_logprobs"

    @property
    def differences(self) -> tuple[str, ...]:
        """What is left out or put otherwise, in words."""
        said: list[str] = [] if self.length_field == "max_tokens" else [self.length_field]
        said += [
            f"no {name}" for name in ("logprobs", "seed", "temperature", "stop") if not getattr(self, name)
        ]
        said += [
            words
            for words, on in (
                ("one choice at a time", not self.several),
                ("no system message", not self.system),
                ("as a stream", self.stream),
            )
            if on
        ]
        said += [
            f"{words} {n}"
            for words, n in (("at least", self.least_tokens), ("at most", self.most_tokens))
            if n
        ]
        said += [f"{self.most_logprobs} logprobs at most"] if self.most_logprobs else []
        return (*said, *([f"path {self.path or 'without /v1'}"] if self.path is not None else []))

    def room(self, request: Request, options: Options) -> int:
        """Tokens that a reply may have, thoughts among them."""
        own = (options.extra or {}).get(self.length_field)
        if isinstance(own, int):
            return own
        thinking = (
            options.thinking_tokens
            if options.thinking_tokens is not None
            else (THINKING_TOKENS if self.thinks else 0)
        )
        room = max(request.max_tokens, options.reply_tokens or 0) + thinking
        room = max(room, self.least_tokens)
        return room if self.most_tokens is None else min(room, self.most_tokens)

    def body(self, model: str, request: Request, options: Options) -> dict[str, Any]:
        """The body of a chat completion."""
        messages = request.messages
        form = self.reply_form if request.schema is not None else "text"
        if form == "json_object" and not any("json" in m.content.lower() for m in messages):
            messages = _with_system(
                messages, SAY_JSON
            )  # OpenAI and DeepSeek refuse this form where the word does not stand in a message
        if not self.system:
            messages = without_system(messages)
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": m.role, "content": as_text(m.content)} for m in messages],
            self.length_field: self.room(request, options),
        }
        if self.temperature:
            body["temperature"] = request.temperature
        if request.n != 1 and self.several:
            body["n"] = request.n
        if request.seed is not None and self.seed:
            body["seed"] = request.seed
        if request.stop and self.stop:
            body["stop"] = list(request.stop)
        if form == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif form != "text" and request.schema is not None:
            schema = schema_of(request.schema, form)
            inner = {"name": "reply", "schema": schema} | ({} if form == "bare_schema" else {"strict": True})
            body["response_format"] = {"type": "json_schema", "json_schema": inner}
        if request.top_logprobs and self.logprobs:
            most = (
                request.top_logprobs
                if self.most_logprobs is None
                else min(request.top_logprobs, self.most_logprobs)
            )
            body |= {"logprobs": True, "top_logprobs": most}
        if options.effort is not None:
            body["reasoning_effort"] = options.effort
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | dict(options.extra or {})


def without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The same chat for a template without system messages: what they say stands before the first
    question.
    """
    said = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    if not said:
        return tuple(rest)
    first = next((i for i, m in enumerate(rest) if m.role == "user"), None)
    if first is None:
        return (Message("user", said), *rest)
    rest[first] = replace(rest[first], content=f"{said}\n\n{rest[first].content}")
    return tuple(rest)


def _with_system(messages: tuple[Message, ...], words: str) -> tuple[Message, ...]:
    if messages and messages[0].role == "system":
        return (replace(messages[0], content=f"{messages[0].content}\n\n{words}"), *messages[1:])
    return (Message("system", words), *messages)


def schema_of(schema: Mapping[str, Any], form: ReplyForm) -> dict[str, Any]:
    """A schema in one of the three forms. Without bounds ``prefixItems`` becomes ``items`` of the first kind,
    which all of ours share.
    """
    return dict(schema) if form == "json_schema" else _plain(schema, bare=form == "bare_schema")


def _plain(schema: Mapping[str, Any], *, bare: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _BOUNDS or (bare and name == "additionalProperties"):
            continue
        if name == "properties":
            found[name] = {field: _plain(inner, bare=bare) for field, inner in value.items()}
        else:
            found[name] = _plain(value, bare=bare) if isinstance(value, Mapping) else value
    if "prefixItems" in schema and "items" not in schema and schema["prefixItems"]:
        found["items"] = _plain(schema["prefixItems"][0], bare=bare)
    return found
