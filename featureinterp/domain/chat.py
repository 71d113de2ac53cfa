"""What goes to a language model and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from featureinterp.domain.plain import Plain
from featureinterp.domain.usage import Usage
from featureinterp.errors import TruncatedReplyError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One completion: of a chat (``messages``), or the reading of a raw prompt (``prompt``, token ids of the
    model's own tokenizer).

    ``schema``: JSON schema of the reply, or None for free text. ``top_logprobs``: how many alternatives to
    return for the reply's first token, or for each place of the prompt in ``read_at`` (0: none). ``n``: how
    many replies. ``answers``: the short replies that are expected; a model may end with the first token that
    is one of them. ``check`` is called with the reply and raises a ``LanguageModelError`` when it is no
    answer.
    """

    messages: tuple[Message, ...] = ()
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    n: int = 1
    schema: Mapping[str, Any] | None = None
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()
    check: Callable[[Reply], object] | None = field(default=None, compare=False, repr=False)
    answers: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    read_at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply(Plain):
    """``texts``: one per choice. ``truncated``: which of them were cut by ``max_tokens``. ``first_token``:
    for each choice the natural-log probabilities of the first token's alternatives, empty where the endpoint
    gives none. ``read``: the same for each place of ``read_at``, the alternatives by their text. ``refused``:
    why there is no answer, when a filter or the model itself refuses what the request is about; it was billed
    all the same. ``room``: how many tokens each could have had, thoughts among them; 0: not known.
    ``tokens``: for each choice the first few tokens of its answer, behind its thoughts, each as it was chosen
    and with its alternatives; empty where they are not known."""

    texts: tuple[str, ...]
    truncated: tuple[bool, ...]
    usage: Usage
    first_token: tuple[Mapping[str, float], ...] = field(default_factory=tuple)
    read: tuple[Mapping[str, float], ...] = field(default_factory=tuple)
    refused: str | None = None
    room: int = field(default=0, compare=False)
    tokens: tuple[tuple[tuple[str, Mapping[str, float]], ...], ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        """The first choice."""
        return self.texts[0]


def cut_short(reply: Reply, number: int = 0, *, limit: int = 0) -> TruncatedReplyError:
    """The error for a choice that was cut before it was an answer. ``limit``: of tokens, where the reply
    itself does not know how many it could have had.
    """
    room, text = reply.room or limit, " ".join(reply.texts[number].split())
    after, shown = f" after {room} tokens" if room else "", f" ({text[:60]!r})" if text else ""
    return TruncatedReplyError(
        f"the reply was cut{after}{shown}: give more room with --reply-tokens, or with --thinking-tokens to "
        "a model that thinks (reply_tokens and thinking_tokens of a job's [llm])"
    )
