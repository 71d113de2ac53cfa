"""Reading a completion: its choices, what each ended by, and what it cost; whole, or collected from a
stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from featureinterp.domain.chat import Reply
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointUnavailableError, MalformedReplyError
from featureinterp.llm.finish_reasons import End, end_of
from featureinterp.llm.tokens import Token, answer_tokens


class Choice(NamedTuple):
    """One reply. ``thought``: characters of its thoughts. ``refusal``: the model's words when it refuses."""

    text: str
    end: End
    reason: str
    tokens: tuple[Token, ...]
    thought: int
    refusal: str


def text_of(content: Any) -> str:
    """A message's content as text: a text, parts of one (OpenAI, Anthropic, Mistral), or nothing. Parts that
    are thoughts are none of it.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return "" if content is None else str(content)
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and str(part.get("type", "text")) in ("text", "output_text"):
            inner = part.get("text")
            parts.append(str(inner.get("value", "") if isinstance(inner, Mapping) else inner or ""))
    return "".join(parts)


def thought_of(message: Mapping[str, Any]) -> int:
    """How many characters of thoughts a message shows: ``reasoning_content`` (DeepSeek, vLLM, SGLang,
    llama.cpp), ``reasoning`` (OpenRouter, Groq, Ollama), ``thinking``, or parts of that type (Mistral)."""
    found = max(
        len(str(message.get(name) or ""))
        for name in ("reasoning_content", "reasoning", "thinking", "reasoning_details")
    )
    content = message.get("content")
    if isinstance(content, list):
        kinds = ("thinking", "reasoning")
        found = max(
            found, sum(len(str(p)) for p in content if isinstance(p, Mapping) and p.get("type") in kinds)
        )
    return found


def read_choices(completion: Any, where: str) -> list[Choice]:
    """The choices of a completion; empty where there are none. Raises ``MalformedReplyError`` for what is no
    completion.
    """
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(completion, dict) or not isinstance(choices, list | None):
        raise MalformedReplyError(
            f"{where} answered in another form than OpenAI's: is it an OpenAI-compatible endpoint?"
        )
    try:
        return [_choice(choice) for choice in choices or ()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"[:100]
        raise MalformedReplyError(
            f"{where} answered in another form than OpenAI's ({problem}): is it an OpenAI-compatible "
            "endpoint?"
        ) from None


def _choice(choice: Mapping[str, Any]) -> Choice:
    message = choice.get("message") or choice.get("delta")
    if message is None:  # a completion of a text, which some answer to a chat
        message = {"content": choice["text"]}
    tokens = (choice.get("logprobs") or {}).get("content") or []
    text = text_of(message.get("content"))
    reason = choice.get("finish_reason") or choice.get("native_finish_reason")
    refusal = message.get("refusal")
    return Choice(
        text,
        end_of(reason),
        str(reason),
        answer_tokens(tokens, text),
        thought_of(message),
        refusal if isinstance(refusal, str) else "",
    )


def reply_of(choices: list[Choice], usage: Usage, where: str) -> Reply:
    """The reply from the choices that say something. A refusal or a filter that leaves none of them is kept
    as the reply's ``refused``. Raises ``EndpointUnavailableError`` for one that broke off and
    ``MalformedReplyError`` for one that only thought or called a tool."""
    good = [c for c in choices if c.end in ("whole", "cut") and not c.refusal]
    if not good:
        broken = next((c for c in choices if c.end == "broken"), None)
        if broken is not None:
            raise _billed(
                EndpointUnavailableError(
                    f"the endpoint {where} broke its reply off ({broken.reason}): try again later"
                ),
                usage,
            )
        first = choices[0]
        cause = (
            f"the model refuses to answer: {' '.join(first.refusal.split())[:200]!r}"
            if first.refusal
            else f"a filter held the reply back ({first.reason})"
        )
        return Reply(("",), (False,), usage, ({},), refused=cause)
    if all(not c.text.strip() and c.end == "whole" for c in good):
        if any(c.thought for c in good):
            why = (
                "holds thoughts and no answer: give the model more room with --thinking-tokens, or "
                "switch its thinking off (docs/endpoints.md)"
            )
        elif any(c.reason in ("tool_calls", "function_call", "tool_use") for c in good):
            why = "calls a tool, and none was offered: choose another model"
        else:
            why = "is empty"
        raise _billed(MalformedReplyError(f"the reply of {where} {why}"), usage)
    heads = tuple(dict(c.tokens[0][1]) if c.tokens else {} for c in good)
    return Reply(
        tuple(c.text for c in good),
        tuple(c.end == "cut" for c in good),
        usage,
        heads,
        tokens=tuple(c.tokens for c in good),
    )


def _billed(error: Any, usage: Usage) -> Any:
    error.billed, error.usage = True, usage
    return error


def thinks(choices: list[Choice], completion: Any) -> bool:
    """Whether the model has thought, as far as the reply shows it."""
    usage = completion.get("usage") if isinstance(completion, dict) else None
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    tokens = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return any(c.thought for c in choices) or (isinstance(tokens, int) and tokens > 0)


def is_stream(content_type: str, body: bytes) -> bool:
    """Whether an answer came in pieces (server-sent events)."""
    return "text/event-stream" in content_type.lower() or body.lstrip()[:6] in (b"data: ", b"data:{")


def collect(body: bytes, *, read: Callable[[bytes], Any] = json.loads) -> Any:
    """A completion from the pieces of a stream, of all its choices; an error that comes as a piece is
    returned as it is. Raises ``ValueError`` when the stream broke off: no piece says why it ended and there
    is no ``[DONE]``."""
    choices: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    done = False
    for data in _events(body):
        if data == b"[DONE]":
            done = True
            break
        try:
            piece = read(data)
        except ValueError:
            raise ValueError("the stream broke off") from None
        if not isinstance(piece, dict):
            continue
        if piece.get("error"):
            return piece
        whole |= {
            name: value
            for name, value in piece.items()
            if name not in ("choices", "usage") and value is not None
        }
        if isinstance(piece.get("usage"), dict):
            whole["usage"] = piece["usage"]
        for part in piece.get("choices") or ():
            _add(choices.setdefault(int(part.get("index") or 0), {"message": {}}), part)
    if not done and not all(c.get("finish_reason") for c in choices.values()):
        raise ValueError("the stream broke off")
    return whole | {"choices": [choices[i] for i in sorted(choices)]}


def _events(body: bytes) -> Iterator[bytes]:
    """The data of each event."""
    for block in body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield b"\n".join(lines).strip()


def _add(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    message = choice["message"]
    delta = part.get("delta") or part.get("message") or {}
    for name, value in delta.items():
        if isinstance(value, str) and name != "role":
            message[name] = f"{message.get(name) or ''}{value}"
        elif isinstance(value, list) and name == "content":
            message[name] = f"{message.get(name) or ''}{text_of(value)}"
        elif value is not None:
            message.setdefault(name, value)
    if part.get("finish_reason"):
        choice["finish_reason"] = part["finish_reason"]
    tokens = (part.get("logprobs") or {}).get("content") or []
    if tokens:
        choice.setdefault("logprobs", {"content": []})["content"].extend(tokens)
