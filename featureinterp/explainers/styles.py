"""Forms of prompt and reply: one phrase or rules, with or without what causes the activations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from featureinterp.domain.chat import Message
from featureinterp.domain.explanation import MAX_RULES, Explanation, Provenance
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.errors import InputError, MalformedReplyError
from featureinterp.explainers.parse import RulesReply, SentenceReply, clean, read_rules
from featureinterp.explainers.windows import causes, excerpt, top_causes, top_tokens
from featureinterp.prompts import Prompt, escape, listed, load_prompt
from featureinterp.replies import object_schema, parse_reply

REPEAT_BELOW = 0.2
"""When fewer than this share of a window's levels are above 0, those above 0 are listed once more."""
FEW_SHOT = "few_shot.json"


class Style(Protocol):
    """A form of prompt and reply."""

    prompt: Prompt

    def messages(self, record: FeatureRecord, windows: tuple[Window, ...]) -> tuple[Message, ...]:
        """The chat, without the part of any window outside of ``windows``."""
        ...

    @property
    def fields(self) -> Mapping[str, Any]:
        """The properties of the reply's JSON object, each with its schema; all of them are required."""
        ...

    def read(self, reply: str, provenance: Provenance) -> Explanation:
        """The explanation in a reply. Raises ``MalformedReplyError``."""
        ...

    def write(self, explanation: Explanation) -> dict[str, Any]:
        """The values of ``fields`` that say this explanation."""
        ...


class SentenceStyle:
    """Excerpts with marked tokens, and the tokens that activate most in front; the reply is one phrase. Short
    prompts.

    ``causes``: also names the tokens with the largest holistic activations. ``few_shot``: a file with other
    worked examples.
    """

    def __init__(
        self,
        version: str | None = None,
        *,
        causes: bool = False,
        few_shot: Path | None = None,
        context: int = 12,
        n_tokens: int = 8,
    ) -> None:
        self.prompt = _load("explain-sentence", version or ("v1" if causes else "v2"), causes, few_shot)
        self.causes, self.context, self.n_tokens = causes, context, n_tokens

    @property
    def fields(self) -> Mapping[str, Any]:
        return {"explanation": {"type": "string"}}

    def messages(self, record: FeatureRecord, windows: tuple[Window, ...]) -> tuple[Message, ...]:
        turns = [Message("system", self.prompt.text("system.txt"))]
        for shot in self.prompt.json(FEW_SHOT):
            turns.append(
                Message("user", self._user(shot["tokens"], shot.get("causes", ()), shot["excerpts"]))
            )
            turns.append(Message("assistant", _json({"explanation": shot["explanation"]})))
        caused = [listed(t) for t in top_causes(windows, self.n_tokens)] if self.causes else []
        excerpts = [excerpt(w, self.context) for w in windows]
        return (
            *turns,
            Message(
                "user", self._user([listed(t) for t in top_tokens(windows, self.n_tokens)], caused, excerpts)
            ),
        )

    def _user(self, tokens: Sequence[str], caused: Sequence[str], excerpts: Sequence[str]) -> str:
        return self.prompt.render("user.j2", tokens=tokens, causes=caused, excerpts=excerpts)

    def read(self, reply: str, provenance: Provenance) -> Explanation:
        text = clean(parse_reply(reply, SentenceReply).explanation)
        if not text:
            raise MalformedReplyError("the reply's explanation is empty")
        return Explanation.sentence(text, provenance)

    def write(self, explanation: Explanation) -> dict[str, Any]:
        return {"explanation": explanation.text}


class RulesStyle:
    """Windows as lines of token and level; the reply is a list of rules with strengths.

    ``causes``: every window's tokens with a positive holistic activation come after it. ``few_shot``: a file
    with other worked examples.
    """

    def __init__(
        self,
        version: str | None = None,
        *,
        rule_cap: int = 5,
        causes: bool = False,
        few_shot: Path | None = None,
        n_tokens: int = 8,
    ) -> None:
        if not 1 <= rule_cap <= MAX_RULES:
            raise InputError(f"at most {rule_cap} rules is not possible: choose from 1 to {MAX_RULES}")
        self.prompt = _load("explain-rules", version or ("v1" if causes else "v2"), causes, few_shot)
        self.rule_cap, self.causes, self.n_tokens = rule_cap, causes, n_tokens

    @property
    def fields(self) -> Mapping[str, Any]:
        rule = object_schema(
            {"activates_on": {"type": "string"}, "strength": {"type": "integer", "minimum": 0, "maximum": 5}}
        )
        return {"rules": {"type": "array", "items": rule, "minItems": 1, "maxItems": self.rule_cap}}

    def messages(self, record: FeatureRecord, windows: tuple[Window, ...]) -> tuple[Message, ...]:
        turns = [Message("system", self.prompt.render("system.j2", rule_cap=self.rule_cap))]
        for shot in self.prompt.json(FEW_SHOT):
            rules = sorted(shot["rules"], key=lambda rule: -rule["strength"])[: self.rule_cap]
            turns.append(Message("user", self._user(shot["windows"], shot.get("causes"))))
            turns.append(Message("assistant", _json({"rules": rules})))
        lines = [list(zip(w.pieces, record.level(w), strict=True)) for w in windows]
        return (*turns, Message("user", self._user(lines, causes(windows) if self.causes else None)))

    def _user(
        self, windows: Sequence[Sequence[tuple[str, int]]], caused: Sequence[Sequence[tuple[str, int]]] | None
    ) -> str:
        shown = []
        for number, window in enumerate(windows):
            lines = [(escape(token), level) for token, level in window]
            high = [line for line in lines if line[1] > 0]
            causes = [(escape(token), level) for token, level in caused[number]] if caused is not None else []
            shown.append(
                {
                    "lines": lines,
                    "repeated": high if len(high) < REPEAT_BELOW * len(lines) else [],
                    "causes": causes,
                }
            )
        return self.prompt.render(
            "user.j2", windows=shown, tokens=[listed(token) for token in _peaks(windows)[: self.n_tokens]]
        )

    def read(self, reply: str, provenance: Provenance) -> Explanation:
        rules, left_out = read_rules(parse_reply(reply, RulesReply), self.rule_cap)
        return Explanation(rules, replace(provenance, left_out=left_out))

    def write(self, explanation: Explanation) -> dict[str, Any]:
        return {
            "rules": [{"activates_on": r.activates_on, "strength": r.strength} for r in explanation.rules]
        }


def _peaks(windows: Sequence[Sequence[tuple[str, int]]]) -> list[str]:
    """The tokens at the windows' highest levels, those with the largest sum first."""
    total: dict[str, int] = {}
    for window in windows:
        token, level = max(window, key=lambda line: line[1], default=("", 0))
        if token.strip() and level > 0:
            total[token] = total.get(token, 0) + level
    return sorted(total, key=lambda token: -total[token])


def style(name: str, *, rule_cap: int = 5, causes: bool = False, few_shot: Path | None = None) -> Style:
    """The style of that name: ``sentence`` or ``rules``."""
    if name == "sentence":
        return SentenceStyle(causes=causes, few_shot=few_shot)
    if name == "rules":
        return RulesStyle(rule_cap=rule_cap, causes=causes, few_shot=few_shot)
    raise InputError(f"there is no style {name!r} of explanation: choose sentence or rules")


def _load(task: str, version: str, causes: bool, few_shot: Path | None) -> Prompt:
    """A style's prompt. Raises ``InputError`` when a file of worked examples lacks what the prompt's own
    have.
    """
    prompt = load_prompt(f"{task}-causes" if causes else task, version)
    return prompt if few_shot is None else prompt.with_examples(FEW_SHOT, few_shot)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
