"""The forms of explainers' replies, and what is kept of them."""

from __future__ import annotations

import pydantic

from featureinterp.domain.explanation import MAX_RULES, MAX_TEXT, Rule
from featureinterp.errors import MalformedReplyError


class SentenceReply(pydantic.BaseModel):
    """The reply to the prompt for one sentence."""

    explanation: str = pydantic.Field(min_length=1, max_length=MAX_TEXT)


class RuleReply(pydantic.BaseModel):
    """One rule of a structured reply."""

    activates_on: str = pydantic.Field(min_length=1, max_length=MAX_TEXT)
    strength: int = pydantic.Field(ge=0, le=5)

    @pydantic.field_validator("strength", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a strength is a number from 0 to 5")
        return value


class RulesReply(pydantic.BaseModel):
    """The reply to the prompt for rules."""

    rules: list[RuleReply] = pydantic.Field(min_length=1, max_length=MAX_RULES)


def clean(text: str) -> str:
    """A description as it is kept: one line, without quotation marks or a full stop around it."""
    text = " ".join(text.split()).rstrip(".").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].rstrip(".").strip()
    return text


def rules_of(reply: RulesReply, cap: int) -> tuple[Rule, ...]:
    """The rules, each description once, at most ``cap`` of them, strongest first. Raises ``MalformedReplyError`` when none is left."""
    rules: dict[str, Rule] = {}
    for rule in sorted(reply.rules, key=lambda r: -r.strength):
        text = clean(rule.activates_on)
        if text and rule.strength > 0:
            rules.setdefault(text.lower(), Rule(text, rule.strength))
    if not rules:
        raise MalformedReplyError("the reply holds no rule with a text and a strength above 0")
    return tuple(list(rules.values())[:cap])
