"""What of a reply is its answer: models that reason write their thoughts in front of it, between marks of
many kinds.
"""

from __future__ import annotations

import re

from featureinterp.replies.strict import spans

_NAMES = r"(?:think|thinking|thought|thoughts|reasoning|analysis|seed:think|antml:thinking)"
_OPENS = re.compile(
    rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<unused94>|<\|channel>thought\b",
    re.IGNORECASE,
)
_CLOSES = re.compile(
    rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<unused95>|<channel\|>",
    re.IGNORECASE,
)
_CHANNEL = re.compile(
    r"(?:\A|assistant|<\|end\|>|<\|start\|>)\s*<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_BARE_CHANNEL = re.compile(
    r"\A\s*(?:assistant\s*)?(?:analysis.*?assistant\s*final|(?<=assistant)\s*final)", re.DOTALL
)
"""gpt-oss behind a server that leaves out special tokens: the channels' names alone are left."""
_EDGE = r"(?:<\|[\w-]{1,40}\|>|<｜[^｜>]{1,40}｜>|</?s>|<(?:bos|eos|end_of_turn|start_of_turn)>|\[/?INST\])"
_EDGES = re.compile(rf"\A(?:\s*{_EDGE})+|(?:{_EDGE}\s*)+\Z")


def answer_of(reply: str) -> str:
    """A reply without its thoughts, and without marks of turns and channels around it; empty when it ends
    before its answer.

    Marks within a whole JSON value are part of that value.
    """
    text = reply.removeprefix("\ufeff")
    if "<" in text or "[" in text or "◁" in text:
        text = _without_thoughts(_final_channel(text))
    elif bare := _BARE_CHANNEL.match(text):
        text = text[bare.end() :]
    return _EDGES.sub("", text.strip()).strip()


def _final_channel(text: str) -> str:
    """What stands in the last channel named ``final``; nothing when there are channels and none of that
    name.
    """
    channels = _outside(text, _CHANNEL)
    if not channels:
        bare = _BARE_CHANNEL.match(text)
        return text[bare.end() :] if bare else text
    final = next((m for m in reversed(channels) if m[1] == "final"), None)
    return "" if final is None else text[final.end() :]


def _without_thoughts(text: str) -> str:
    """What follows the last end of thoughts, whether or not their beginning is there; nothing when thoughts
    begin and do not end.
    """
    closed = _outside(text, _CLOSES)
    rest = text[closed[-1].end() :] if closed else text
    return "" if _OPENS.match(rest.lstrip()) else rest


def _outside(text: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """Matches that lie in no whole JSON value."""
    found = list(pattern.finditer(text))
    inside = list(spans(text)) if found else []
    return [m for m in found if not any(start < m.start() < end for start, end in inside)]
