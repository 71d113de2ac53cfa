"""The parts of the all-at-once prompt as token ids, so that the place of every level is known from the construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from featureinterp.errors import IncompatibleError
from featureinterp.prompts import Prompt, escape

LEVELS = "012345"


@dataclass(frozen=True, slots=True)
class Built:
    """A window's part of the prompt: ``ids`` after the explanation, and ``positions`` in them whose next token is a level."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


class PromptBuilder:
    """Turns the prompt's parts into token ids."""

    def __init__(self, tokenizer: Any, prompt: Prompt) -> None:
        self._tokenizer = tokenizer
        settings = prompt.json("settings.json")
        self._label: str = settings["label"]
        self.levels = [self._single(level) for level in LEVELS]
        self._tab = self._single("\t")
        self._end = self._encode(settings["fill"] + "\n")
        shots = [
            self._label + shot["explanation"] + "\n" + "".join(f"{escape(token)}\t{level}\n" for token, level in shot["tokens"]) + "\n"
            for shot in settings["few_shot"]
        ]
        bos = tokenizer.bos_token_id
        start = [bos] if bos is not None and getattr(tokenizer, "add_bos_token", False) else []
        self.header = start + self._encode(settings["intro"] + "\n\n" + "".join(shots))
        self._piece = lru_cache(65536)(lambda piece: self._encode(escape(piece)))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)  # type: ignore[no-any-return]

    def _single(self, text: str) -> int:
        ids = self._encode(text)
        if len(ids) != 1:
            raise IncompatibleError(
                f"the simulator's tokenizer writes {text!r} as {len(ids)} tokens, and the all-at-once simulator needs one: use --simulator rated"
            )
        return ids[0]

    def explanation(self, text: str) -> list[int]:
        """Ids of the explanation's line."""
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
