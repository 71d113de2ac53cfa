"""Contents of a chat stay contents: tokens that a tokenizer or a server would take for the marks of a chat's
turns are text in them.

A chat's turns are marked by tokens such as ``<|im_start|>``. A text from a corpus may hold the same
characters. Where we encode a chat ourselves, those of a content are encoded as the characters that they are
(:func:`chat_ids`), and nothing else changes. Where a server does it, they get a backslash (:func:`as_text`),
as other characters do that would break a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from featureinterp.domain.chat import Message

_NAMED = (
    "s|bos|eos|pad|unk|think|tool_call|tool_response|(?:start|end)_of_\\w{1,20}"
    "|(?:begin|beginning|end)_of_sentence|seed:\\w{1,20}"
)
_BRACKETED = "INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|THINK|gMASK|BOS|EOS"
_LIKE_A_MARK = re.compile(
    f"<(?=[|｜][^\\s<>]{{1,64}}>|[^\\s<>|]{{1,64}}[|｜]>|/?(?:{_NAMED})>)|\\[(?=/?(?:{_BRACKETED})\\]|\\|[^\\s|]{{1,32}}\\|\\])"
)
"""The brackets with which marks of turns begin in the chat templates of the open models: ``<|…|>`` and its
half forms, ``<｜…｜>``, ``<start_of_turn>``, ``</s>``, ``[INST]``, ``[|…|]``."""


def as_text(content: str) -> str:
    r"""A content in which no mark of a turn is left whole: ``<|im_end|>`` becomes ``<\|im_end|>``."""
    return _LIKE_A_MARK.sub(lambda m: m[0] + "\\", content)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens: what looks like one is encoded as the characters that it is."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    marks = _marks(tokenizer)
    if marks.keys().isdisjoint(ids):
        return ids
    parts = re.split(
        f"(?<=(?={_any_of(marks.values())})[\\s\\S])", text
    )  # behind the first character of every mark
    if len(parts) == 1:
        return ids
    return [
        i
        for part in parts
        for i in tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
    ]


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a chat by the tokenizer's template, up to where the assistant's turn begins; only the template's
    own marks are marks.
    """
    marks = re.compile(_any_of(_marks(tokenizer).values()))
    contents = [m.content for m in messages]
    stand_ins = _stand_ins(contents, {found for content in contents for found in marks.findall(content)})
    turns = [
        {"role": m.role, "content": marks.sub(lambda found: stand_ins[found[0]], m.content)} for m in messages
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not stand_ins:
        return list(tokenizer.encode(text, add_special_tokens=False))
    marked = {stand_in: mark for mark, stand_in in stand_ins.items()}
    ids: list[int] = []
    for part in re.split(f"([{''.join(marked)}])", text):
        ids += (
            text_ids(tokenizer, marked[part])
            if part in marked
            else tokenizer.encode(part, add_special_tokens=False)
            if part
            else []
        )
    return ids


def _stand_ins(contents: Sequence[str], marks: set[str]) -> dict[str, str]:
    """A private character, which no content holds, for each of the marks."""
    free = (
        chr(code)
        for code in (*range(0xE000, 0xF900), *range(0x100000, 0x10FFFE))
        if not any(chr(code) in c for c in contents)
    )
    return dict(zip(sorted(marks), free, strict=False)) if marks else {}


def _any_of(marks: Any) -> str:
    """A pattern that matches each of the marks, the longest first; without any it matches nothing."""
    return "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)"


_known: WeakKeyDictionary[Any, tuple[str, dict[int, str]]] = WeakKeyDictionary()


def _marks(tokenizer: Any) -> dict[int, str]:
    """The tokens that no text may hold, by their ids: the special ones, and added ones that the chat template
    names.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = _known.get(tokenizer)
    if known is None or known[0] != template:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = {
            i: t.content
            for i, t in added.items()
            if t.content.strip() and (t.special or t.content in template)
        }
        known = _known[tokenizer] = (template, marks)
    return known[1]
