"""Asking a language model for explanations: several at once, and again for those that could not be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from featureinterp.domain.chat import Reply, Request, cut_short
from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    EndpointRefusedError,
    LanguageModelError,
    MalformedReplyError,
    TruncatedReplyError,
)
from featureinterp.interfaces import LanguageModel

MAX_ATTEMPTS = 3
RETRY_TEMPERATURE = 0.5
"""A reply that could not be read is asked for again at least this warm: the same prompt at 0 gives the same
reply.
"""
Answer = TypeVar("Answer")


class Answers(NamedTuple, Generic[Answer]):
    """What could be read, each with the request that it answers; what it cost; and why there is no more of
    it.
    """

    found: list[tuple[Answer, Request]]
    usage: Usage
    error: LanguageModelError | None


async def ask(model: LanguageModel, request: Request, read: Callable[[str], Answer]) -> Answers[Answer]:
    """Up to ``request.n`` answers. Those that are missing, by the endpoint or because ``read`` raised
    ``MalformedReplyError``, are asked for again with another seed, until three requests have given none; an
    endpoint that gives one reply at a time is asked as often as needed. What was cut is not asked again.
    Raises what the model raises when there is no answer yet, and ``EndpointRefusedError`` always."""
    found: list[tuple[Answer, Request]] = []
    usage = Usage()
    last: LanguageModelError | None = None

    def readable(reply: Reply) -> list[Answer]:
        answers: list[Answer] = []
        problem: MalformedReplyError | TruncatedReplyError | None = None
        for number, (text, cut) in enumerate(zip(reply.texts, reply.truncated, strict=True)):
            try:
                if cut:
                    raise cut_short(reply, number, limit=request.max_tokens)
                answers.append(read(text))
            except (MalformedReplyError, TruncatedReplyError) as error:
                problem = error
        if not answers:
            raise problem or MalformedReplyError("the endpoint sent no reply at all")
        return answers

    attempt = failed = 0
    while len(found) < request.n and failed < MAX_ATTEMPTS:
        asked = replace(
            request,
            n=request.n - len(found),
            temperature=max(request.temperature, RETRY_TEMPERATURE) if failed else request.temperature,
            seed=None if request.seed is None else request.seed + attempt,
            check=readable,
        )
        try:
            reply = await model.complete(asked)
        except EndpointRefusedError:
            raise
        except LanguageModelError as error:
            if not found:
                raise
            return Answers(found, usage, error)
        usage += reply.usage
        attempt += 1
        try:
            found += [(answer, asked) for answer in readable(reply)[: asked.n]]
        except TruncatedReplyError as error:  # the same question would be cut at the same place
            return Answers(found, usage, error)
        except MalformedReplyError as error:
            last, failed = error, failed + 1
    return Answers(found, usage, last)
