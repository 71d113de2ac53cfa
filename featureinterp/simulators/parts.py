"""The parts of the all-at-once prompt as token ids, so that the place of every level is known from the
construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from featureinterp.errors import IncompatibleError
from featureinterp.llm.roles import text_ids
from featureinterp.prompts import Prompt, escape

LEVELS = "012345"
TEMPERATURE = 0.5
"""Of the all-at-once prompt's level distribution."""
_PLACE = "\ufffcexplanation\ufffc"
"""Stands for the explanation while a template is filled in."""


@dataclass(frozen=True, slots=True)
class Built:
    """A window's part of the prompt: ``ids`` after the explanation, and ``positions`` in them whose next
    token is a level.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]


def single(tokenizer: Any, text: str) -> int:
    """The id of a text of one token. Raises ``IncompatibleError`` when it has several."""
    ids = text_ids(tokenizer, text)
    if len(ids) != 1:
        raise IncompatibleError(
            f"the simulator's tokenizer writes {text!r} as {len(ids)} tokens, and a simulator that reads "
            "levels needs one: use --simulator rated"
        )
    return ids[0]


class PromptBuilder:
    """Turns the prompt's parts into token ids. ``chat``: as turns of a chat, by the tokenizer's own template;
    else as one text.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, *, chat: bool = False) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self.header: list[int]
        settings = prompt.json("settings.json")
        self._label: str = settings["label"]
        self.levels = [single(tokenizer, level) for level in LEVELS]
        self._tab = single(tokenizer, "\t")
        self._end = self._encode(settings["fill"] + "\n")
        shots = [
            (
                self._label + shot["explanation"],
                "".join(f"{escape(token)}\t{level}\n" for token, level in shot["tokens"]),
            )
            for shot in settings["few_shot"]
        ]
        if chat:
            before, after = self._turns(settings["intro"], shots)
            self.header, self._after = (
                tokenizer.encode(text, add_special_tokens=False) for text in (before, after)
            )
        else:
            bos = tokenizer.bos_token_id
            start = [bos] if bos is not None and getattr(tokenizer, "add_bos_token", False) else []
            text = settings["intro"] + "\n\n" + "".join(f"{what}\n{lines}\n" for what, lines in shots)
            self.header, self._after = start + self._encode(text), []
        self._piece = lru_cache(65536)(lambda piece: self._encode(escape(piece)))

    def _turns(self, intro: str, shots: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """The chat up to the explanation, and from there to where the lines begin."""
        import jinja2

        if not getattr(self._tokenizer, "chat_template", None):
            raise IncompatibleError(
                "the simulator's tokenizer has no chat template: give a chat model, or simulate without "
                "the chat form"
            )
        turns = [
            turn
            for what, lines in shots
            for turn in (
                {"role": "user", "content": what},
                {"role": "assistant", "content": lines.rstrip("\n")},
            )
        ]
        turns.append({"role": "user", "content": self._label + _PLACE})
        with_system = [{"role": "system", "content": intro}, *turns]
        without = [
            {"role": "user", "content": f"{intro}\n\n{turns[0]['content']}"},
            *turns[1:],
        ]  # some templates refuse a system turn
        try:
            text = self._tokenizer.apply_chat_template(
                with_system, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError):
            text = self._tokenizer.apply_chat_template(without, tokenize=False, add_generation_prompt=True)
        before, found, after = text.rpartition(_PLACE)
        if not found:
            raise IncompatibleError(
                "the simulator's chat template leaves out what the user says: simulate without the chat form"
            )
        return before, after

    def _encode(self, text: str) -> list[int]:
        return text_ids(self._tokenizer, text)

    def explanation(self, text: str) -> list[int]:
        """Ids of the explanation's line, or of what is left of its turn."""
        if self._chat:
            return [*self._encode(escape(text)), *self._after]
        return self._encode(f"{self._label}{escape(text)}\n")

    def window(self, pieces: Sequence[str]) -> Built:
        """Ids of a window's lines."""
        ids: list[int] = []
        positions = []
        for piece in pieces:
            ids += self._piece(piece)
            positions.append(len(ids))
            ids.append(self._tab)
            ids += self._end
        return Built(tuple(ids[: positions[-1] + 1]) if positions else (), tuple(positions))
