"""What an endpoint says that a reply cost, in the forms that providers have; and what it must have cost at
least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import MalformedReplyError

MAX_TOKENS = 100_000_000
"""No model reads or writes that many in one reply."""
MAX_COST_USD = 1_000.0
BYTES_PER_TOKEN = 3.0
"""For estimates. English text has four to five bytes a token, other scripts and code two to three."""
MOST_BYTES_PER_PROMPT_TOKEN = 12.0
MOST_BYTES_PER_REPLY_TOKEN = 24.0
"""A count that would need longer tokens than these is not believed."""
TOKENS_PER_MESSAGE = 4
TICKS_PER_USD = 10**10
"""xAI counts money in ticks."""
Count = Callable[[str], int]


def reported_usage(completion: Any, seconds: float) -> Usage:
    """The counts that a completion comes with; 0 for those that it lacks. ``cost_usd`` is the provider's own
    bill, None without one.

    Thoughts that ``completion_tokens`` leaves out, as Gemini's and xAI's endpoints do, are found in
    ``total_tokens`` or in ``completion_tokens_details``. Cached tokens are OpenAI's
    ``prompt_tokens_details``, DeepSeek's ``prompt_cache_hit_tokens`` or Moonshot's ``cached_tokens``. Raises
    ``MalformedReplyError`` for counts and costs that no reply can have.
    """
    found = completion.get("usage") if isinstance(completion, Mapping) else None
    if found is None:
        return Usage(1, seconds=seconds, cost_usd=None)
    if not isinstance(found, Mapping):
        raise _impossible("usage", found)
    prompt, reply, total = (
        _count(found, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    thoughts = _count(_inner(found, "completion_tokens_details"), "reasoning_tokens")
    if not prompt and total > reply:
        prompt = total - reply
    reply = max(reply, total - prompt) if prompt else reply
    if thoughts > reply:  # which they would be part of, if they were counted
        reply += thoughts
    details = _count(_inner(found, "prompt_tokens_details"), "cached_tokens")
    cached = details or _count(found, "prompt_cache_hit_tokens") or _count(found, "cached_tokens")
    return Usage(1, prompt, reply, seconds, _cost(found), min(cached, prompt))


def _inner(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, Mapping) else {}


def _count(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if value is None:
        return 0
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MAX_TOKENS
        or value != int(value)
    ):
        raise _impossible(name, value)
    return int(value)


def _cost(found: Mapping[str, Any]) -> float | None:
    """The provider's own bill in USD: OpenRouter's (with what its user pays elsewhere), Perplexity's,
    DeepInfra's or xAI's.
    """
    cost, ticks = found.get("cost"), found.get("cost_in_usd_ticks")
    if isinstance(cost, Mapping):
        cost = cost.get("total_cost")
    if cost is None:
        cost = found.get("estimated_cost")
    if cost is None and ticks is not None:
        cost = _money("cost_in_usd_ticks", ticks, TICKS_PER_USD)
    if cost is None:
        return None
    elsewhere = (
        _inner(found, "cost_details").get("upstream_inference_cost") if found.get("is_byok") is True else None
    )
    return _money("cost", cost) + (0.0 if elsewhere is None else _money("upstream_inference_cost", elsewhere))


def _money(name: str, value: Any, unit: float = 1.0) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or not 0 <= value <= MAX_COST_USD * unit:
        raise _impossible(name, value)
    return float(value) / unit


def _impossible(name: str, value: Any) -> MalformedReplyError:
    shown = str(value)[:40] if isinstance(value, int | float) else type(value).__name__
    return MalformedReplyError(
        f"the endpoint says {name} = {shown} of its reply, which no reply can have: its counts cannot be "
        "used, so the reply is not"
    )


def checked_usage(request: Request, reply: Reply, count: Count | None = None) -> Usage:
    """What ``reply`` reports; in place of counts that are missing, or too low for the length of the texts, an
    estimate.
    """
    usage = reply.usage
    prompt = prompt_size(request)
    text = sum(len(t.encode("utf-8", "replace")) for t in reply.texts)
    low_prompt = usage.prompt_tokens < (len(request.prompt) or prompt / MOST_BYTES_PER_PROMPT_TOKEN)
    low_reply = usage.completion_tokens < text / MOST_BYTES_PER_REPLY_TOKEN
    if not low_prompt and not low_reply:
        return usage
    prompt_tokens, reply_tokens = usage.prompt_tokens, usage.completion_tokens
    if low_prompt:
        prompt_tokens = max(prompt_tokens, estimated_prompt(request, count))
    if low_reply or (low_prompt and not reply_tokens):
        reply_tokens = max(reply_tokens, _estimated_reply(request, reply, count))
    cached = min(usage.cached_tokens, prompt_tokens)
    return Usage(
        usage.requests, prompt_tokens, reply_tokens, usage.seconds, usage.cost_usd, cached, usage.requests
    )


def prompt_size(request: Request) -> int:
    """Bytes of a request's messages."""
    return sum(len(m.content.encode("utf-8", "replace")) for m in request.messages)


def estimated_prompt(request: Request, count: Count | None = None) -> int:
    """Tokens of a prompt: as many as it is given in, those of a tokenizer, or those of its bytes."""
    if request.prompt:
        return len(request.prompt)
    return sum(TOKENS_PER_MESSAGE + _tokens(m.content, count) for m in request.messages)


def _estimated_reply(request: Request, reply: Reply, count: Count | None) -> int:
    """Tokens of the texts; of one that was cut, all that it was allowed."""
    pairs = zip(reply.texts, reply.truncated, strict=True)
    return sum(request.max_tokens if cut else max(1, _tokens(text, count)) for text, cut in pairs)


def _tokens(text: str, count: Count | None) -> int:
    if count is not None:
        return count(text)
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)
