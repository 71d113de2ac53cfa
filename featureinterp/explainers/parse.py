"""The forms of explainers' replies, and what is kept of them."""

from __future__ import annotations

import pydantic

from featureinterp.domain.explanation import MAX_TEXT, Rule
from featureinterp.errors import MalformedReplyError
from featureinterp.replies import Level


class SentenceReply(pydantic.BaseModel):
    """The reply to the prompt for one sentence."""

    explanation: str = pydantic.Field(min_length=1, max_length=MAX_TEXT)


class RuleReply(pydantic.BaseModel):
    """One rule of a structured reply. One without a text is left out, whatever its strength."""

    activates_on: str | None = pydantic.Field(max_length=MAX_TEXT)
    strength: Level | None = None


class RulesReply(pydantic.BaseModel):
    """The reply to the prompt for rules, however many they are: :func:`read_rules` keeps what is asked
    for.
    """

    rules: list[RuleReply] = pydantic.Field(min_length=1)


def clean(text: str) -> str:
    """A description as it is kept: one line, without quotation marks or a full stop around it."""
    text = " ".join(text.split()).rstrip(".").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].rstrip(".").strip()
    return text


def read_rules(reply: RulesReply, cap: int) -> tuple[tuple[Rule, ...], int]:
    """The rules, each description once, at most ``cap`` of them, strongest first; and how many of the reply's
    are not among them: those without a text, of strength 0, said twice, or beyond the cap. Raises
    ``MalformedReplyError`` when none is left, or one has no strength."""
    rules: dict[str, Rule] = {}
    written = [(clean(rule.activates_on or ""), rule.strength) for rule in reply.rules]
    for text, strength in sorted(written, key=lambda r: -(r[1] or 0)):
        if text and strength is None:
            raise MalformedReplyError(f"the reply has a rule without a strength: {text[:60]!r}")
        if text and strength:
            rules.setdefault(text.lower(), Rule(text, strength))
    if not rules:
        raise MalformedReplyError("the reply holds no rule with a text and a strength above 0")
    kept = tuple(list(rules.values())[:cap])
    return kept, len(reply.rules) - len(kept)
