"""OneShot: one prompt with a feature's training windows, one explanation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.usage import Usage
from featureinterp.errors import InputError, MalformedReplyError, TruncatedReplyError
from featureinterp.explain.parse import RulesReply, SentenceReply, clean, rules_of
from featureinterp.interfaces import LanguageModel
from featureinterp.llm.types import Message, Reply, Request
from featureinterp.prompts import Prompt, escape, load_prompt, marked
from featureinterp.replies import parse_reply

MAX_ATTEMPTS = 3
REPEAT_BELOW = 0.2
"""When fewer than this share of a window's levels are above 0, those above 0 are listed once more."""


class Style(Protocol):
    """A form of prompt and reply."""

    prompt: Prompt

    def messages(self, record: FeatureRecord, windows: tuple[Window, ...]) -> tuple[Message, ...]:
        """The chat, without the part of any window outside of ``windows``."""
        ...

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of the reply."""
        ...

    def read(self, reply: str, provenance: Provenance) -> Explanation:
        """The explanation in a reply. Raises ``MalformedReplyError``."""
        ...


class SentenceStyle:
    """Excerpts with marked tokens, and the tokens that activate most in front; the reply is one phrase. Short prompts."""

    def __init__(self, version: str = "v2", *, context: int = 12, n_tokens: int = 8) -> None:
        self.prompt = load_prompt("explain-sentence", version)
        self.context, self.n_tokens = context, n_tokens

    @property
    def schema(self) -> Mapping[str, Any]:
        return _schema({"explanation": {"type": "string"}})

    def messages(self, record: FeatureRecord, windows: tuple[Window, ...]) -> tuple[Message, ...]:
        turns = [Message("system", self.prompt.text("system.txt"))]
        for shot in self.prompt.json("few_shot.json"):
            turns.append(Message("user", self.prompt.render("user.j2", tokens=shot["tokens"], excerpts=shot["excerpts"])))
            turns.append(Message("assistant", json.dumps({"explanation": shot["explanation"]}, ensure_ascii=False)))
        tokens = [escape(t) for t in top_tokens(windows, self.n_tokens)]
        excerpts = [excerpt(w, self.context) for w in windows]
        return (*turns, Message("user", self.prompt.render("user.j2", tokens=tokens, excerpts=excerpts)))

    def read(self, reply: str, provenance: Provenance) -> Explanation:
        text = clean(parse_reply(reply, SentenceReply).explanation)
        if not text:
            raise MalformedReplyError("the reply's explanation is empty")
        return Explanation.sentence(text, provenance)


class RulesStyle:
    """Windows as lines of token and level; the reply is a list of rules with strengths."""

    def __init__(self, version: str = "v1", *, rule_cap: int = 5) -> None:
        if not 1 <= rule_cap <= 10:
            raise InputError(f"at most {rule_cap} rules is not possible: choose from 1 to 10")
        self.prompt, self.rule_cap = load_prompt("explain-rules", version), rule_cap

    @property
    def schema(self) -> Mapping[str, Any]:
        rule = _schema({"activates_on": {"type": "string"}, "strength": {"type": "integer", "minimum": 0, "maximum": 5}})
        return _schema({"rules": {"type": "array", "items": rule, "minItems": 1, "maxItems": self.rule_cap}})

    def messages(self, record: FeatureRecord, windows: tuple[Window, ...]) -> tuple[Message, ...]:
        turns = [Message("system", self.prompt.render("system.j2", rule_cap=self.rule_cap))]
        for shot in self.prompt.json("few_shot.json"):
            turns.append(Message("user", self._user([[(t, int(level)) for t, level in w] for w in shot["windows"]])))
            turns.append(Message("assistant", json.dumps({"rules": shot["rules"]}, ensure_ascii=False)))
        lines = [list(zip(w.pieces, record.level(w), strict=True)) for w in windows]
        return (*turns, Message("user", self._user(lines)))

    def _user(self, windows: list[list[tuple[str, int]]]) -> str:
        shown = []
        for window in windows:
            lines = [(escape(token), level) for token, level in window]
            high = [line for line in lines if line[1] > 0]
            shown.append({"lines": lines, "repeated": high if len(high) < REPEAT_BELOW * len(lines) else []})
        return self.prompt.render("user.j2", windows=shown)

    def read(self, reply: str, provenance: Provenance) -> Explanation:
        return Explanation(rules_of(parse_reply(reply, RulesReply), self.rule_cap), provenance)


StyleName = Literal["sentence", "rules"]


def style(name: str, *, rule_cap: int = 5) -> Style:
    """The style of that name: ``sentence`` or ``rules``."""
    if name == "sentence":
        return SentenceStyle()
    if name == "rules":
        return RulesStyle(rule_cap=rule_cap)
    raise InputError(f"there is no style {name!r} of explanation: choose sentence or rules")


class OneShot:
    """Explains a feature with one request to ``model``; a malformed reply is asked for again, at most three times in all."""

    def __init__(self, model: LanguageModel, style: Style, *, n_windows: int = 10, temperature: float = 0.0, seed: int = 0, max_tokens: int = 300) -> None:
        self.model, self.style = model, style
        self.n_windows, self.temperature, self.seed, self.max_tokens = n_windows, temperature, seed, max_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an explanation depends on, besides the record."""
        return {
            "explainer": "one-shot",
            "model": self.model.name,
            "prompt": self.style.prompt.name,
            "prompt_hash": self.style.prompt.hash,
            "n_windows": self.n_windows,
            "temperature": self.temperature,
            "seed": self.seed,
            "rule_cap": getattr(self.style, "rule_cap", None),
        }

    async def explain(self, record: FeatureRecord) -> Explanation:
        """Raises ``MalformedReplyError`` or ``TruncatedReplyError`` after the last attempt, and ``InputError`` without windows."""
        windows = training_windows(record, self.n_windows)
        messages = self.style.messages(record, windows)
        provenance = Provenance(
            "one-shot",
            self.model.name,
            self.style.prompt.name,
            self.style.prompt.hash,
            self.temperature,
            self.seed,
            tuple(w.row for w in windows),
        )
        usage = Usage()
        last: MalformedReplyError | TruncatedReplyError | None = None
        for attempt in range(MAX_ATTEMPTS):
            temperature = self.temperature if not attempt else max(self.temperature, 0.5)
            request = Request(
                messages, self.max_tokens, temperature, self.seed + attempt, schema=self.style.schema, check=lambda reply: self._read(reply, provenance)
            )
            reply = await self.model.complete(request)
            usage += reply.usage
            try:
                return self._read(reply, replace(provenance, usage=usage, temperature=temperature, seed=request.seed))
            except (MalformedReplyError, TruncatedReplyError) as error:
                last = error
        assert last is not None
        raise last

    def _read(self, reply: Reply, provenance: Provenance) -> Explanation:
        if reply.truncated[0]:
            raise TruncatedReplyError(f"the reply was cut after {self.max_tokens} tokens: raise the explainer's max_tokens")
        return self.style.read(reply.text, provenance)


def training_windows(record: FeatureRecord, n: int) -> tuple[Window, ...]:
    """The first ``n`` windows to learn from: top ones of the training split, then importance-weighted ones."""
    windows = [w for w in (*record.get("train", "top"), *record.get("train", "weighted")) if w.fires][:n]
    if not windows:
        raise InputError(f"feature {record.feature.index} fires in no training window: it cannot be explained from this corpus")
    return tuple(windows)


def top_tokens(windows: tuple[Window, ...], n: int) -> list[str]:
    """The tokens at the windows' peaks, by their summed activation, largest first; at most ``n``."""
    total: dict[str, float] = defaultdict(float)
    for window in windows:
        peak = int(np.argmax(window.activations))
        if window.pieces[peak]:
            total[window.pieces[peak]] += float(window.activations[peak])
    return sorted(total, key=lambda t: -total[t])[:n]


def excerpt(window: Window, context: int) -> str:
    """The part of a window around its strongest token, with strong tokens marked: ``context`` tokens before it and half as many after.

    Marked are tokens of at least half of the window's maximum.
    """
    peak = int(np.argmax(window.activations))
    left, right = max(0, peak - context), min(len(window.pieces), peak + context // 2 + 1)
    strong = window.activations[left:right] >= window.max_activation / 2
    return marked(window.pieces[left:right], strong.tolist()).strip()


def _schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False}
