"""How large the parts of a reply may be, given what was asked for."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from featureinterp.domain.chat import Request
from featureinterp.errors import MalformedReplyError
from featureinterp.llm.answers import Choice

MAX_SURPLUS = 16
"""Some servers send more choices than they were asked for: these are ignored; so many more are no answer."""
MOST_BYTES_PER_TOKEN = 64
SLACK_BYTES = 64 * 2**10
"""Servers that take no notice of ``max_tokens`` write somewhat more than it allows."""
MAX_ALTERNATIVES = 256


def bounded(choices: list[Choice], request: Request, room: int, where: str) -> list[Choice]:
    """The choices that were asked for, each with its likeliest alternatives. ``room``: tokens that each could
    have.

    Raises ``MalformedReplyError`` for far more choices than were asked for, and for a text that is far longer
    than its tokens can be.
    """
    if len(choices) > request.n + MAX_SURPLUS:
        raise MalformedReplyError(
            f"the endpoint {where} sent {len(choices):,} choices where {request.n} were asked for"
        )
    longest = room * MOST_BYTES_PER_TOKEN + SLACK_BYTES
    for choice in choices:
        if len(choice.text) > longest:
            asked = f"where at most {room:,} tokens were asked for"
            raise MalformedReplyError(
                f"the endpoint {where} sent a text of {len(choice.text):,} characters {asked}"
            )
    return [
        choice._replace(tokens=tuple((t, likeliest(a)) for t, a in choice.tokens))
        for choice in choices[: request.n]
    ]


def likeliest(alternatives: Mapping[str, float]) -> Mapping[str, float]:
    """The likeliest alternatives of a token, in the order that they came in."""
    if len(alternatives) <= MAX_ALTERNATIVES:
        return alternatives
    kept = set(heapq.nlargest(MAX_ALTERNATIVES, alternatives, key=alternatives.__getitem__))
    return {text: p for text, p in alternatives.items() if text in kept}
