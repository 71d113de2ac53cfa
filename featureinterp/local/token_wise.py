"""The token-wise simulator on a local transformers model: how well each token, by itself, fits the
explanation.

A small model that reads a window line by line leaves levels that depend more on the token, its neighbours and
the form of the prompt than on the explanation. Here every token of the windows is read alone: behind a fixed
header (task and worked examples) and the explanation stand the token and a tab, and the model's distribution
over the levels 0 … 5 is read there. What it would say of that token whatever the topic is divided out
(contextual calibration, Zhao et al. 2021), and what is known beforehand is put in its place: most tokens are
silent.

    p(level) ∝ prior(level) · (p(level | explanation, token) / p(level | neutral topic, token))^(1/T)

A token has the same level wherever it stands, so that it is read once, however often it occurs; and an
explanation that is about the context can only be judged by the tokens that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import Window
from featureinterp.domain.score import Simulation
from featureinterp.llm.roles import text_ids
from featureinterp.local.prefix_cache import Branches, Prefix
from featureinterp.local.simulator import LocalSimulator, padded
from featureinterp.prompts import escape
from featureinterp.simulators.parts import LEVELS, single

KEPT = 200_000
"""Tokens whose neutral distribution is kept."""


class TokenWise(LocalSimulator):
    """Simulates on a local model, each token by itself. The header's keys and values are computed once, an
    explanation's once per explanation; its rules and the windows' different tokens are one batch; of the
    output matrix only the rows of the six levels are used.

    ``temperature`` T sharpens (< 1) or flattens (> 1) what the model says, before the prior: the prompt's
    ``silent`` for level 0, the rest in equal parts.
    """

    kind, version, own_temperature = "token-wise", "v1", 1.5

    def __init__(self, load: Callable[[], tuple[Any, Any]], *, name: str, **options: Any) -> None:
        super().__init__(load, name=name, **options)
        self._asked = self.prompt.json("settings.json")
        self._neutral: dict[str, np.ndarray] = {}

    @cached_property
    def header(self) -> list[int]:
        """Ids of everything before the explanation."""
        bos = self.tokenizer.bos_token_id
        start = [bos] if bos is not None and getattr(self.tokenizer, "add_bos_token", False) else []
        shots = "".join(
            f"{self._about(what)}{escape(token)}\t{level}\n\n"
            for what, token, level in self._asked["few_shot"]
        )
        return start + text_ids(self.tokenizer, f"{self._asked['intro']}\n\n{shots}")

    def explanation(self, text: str) -> list[int]:
        """Ids of the explanation's line."""
        return text_ids(self.tokenizer, self._about(text))

    def token(self, piece: str) -> list[int]:
        """Ids of a token's line up to its level."""
        return [*text_ids(self.tokenizer, escape(piece)), self._tab]

    @cached_property
    def _tab(self) -> int:
        return single(self.tokenizer, "\t")

    def _about(self, text: str) -> str:
        return f"{self._asked['label']}{escape(text)}\n"

    @cached_property
    def _log_prior(self) -> Float64[np.ndarray, " level"]:
        silent: float = self._asked["silent"]
        return np.log([silent, *[(1 - silent) / 5] * 5])

    def _predict(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        pieces = sorted({piece for w in windows for piece in w.pieces})
        rules = explanation.rules
        before = self._behind([self.explanation(rule.activates_on) for rule in rules])
        said = self._read(before, pieces, len(rules))
        given = said - self._neutral_of(pieces) if pieces else said
        levels = np.exp(_normalised(given / self.temperature + self._log_prior)) @ np.arange(6.0)
        best = (levels * (np.array([rule.strength for rule in rules]) / 5)[:, None]).max(0)
        place = {piece: i for i, piece in enumerate(pieces)}
        return [Simulation(best[[place[piece] for piece in w.pieces]]) for w in windows]

    def _neutral_of(self, pieces: Sequence[str]) -> Float64[np.ndarray, "token level"]:
        """Log-probabilities of the levels of each token for the neutral topic."""
        new = [piece for piece in pieces if piece not in self._neutral]
        if new:
            before = self.model.prefix(self.explanation(self._asked["neutral"]), self._header)
            self._neutral.update(zip(new, self._read(before, new, 1)[0], strict=True))
        found = np.stack([self._neutral[piece] for piece in pieces])
        for piece in list(self._neutral)[: max(0, len(self._neutral) - KEPT)]:
            del self._neutral[piece]
        return found

    def _read(
        self, before: Prefix | Branches, pieces: Sequence[str], n_rules: int
    ) -> Float64[np.ndarray, "rule token level"]:
        """Log-probabilities of the levels, renormalised."""
        rows = [self.token(piece) for piece in pieces]
        found = np.zeros((n_rules, len(pieces), len(LEVELS)))

        def read(batch: list[int]) -> np.ndarray:
            part = [rows[i] for i in batch]
            ids = padded(part * n_rules, self.model.device)
            ends = torch.tensor([len(row) - 1 for row in part] * n_rules, device=self.model.device)
            hidden = self.model.hidden(before, ids)[torch.arange(len(ids), device=self.model.device), ends]
            logits = self.model.logits(hidden, self._level_ids).double().cpu().numpy()
            return _normalised(logits).reshape(n_rules, len(batch), -1)

        for batch, levels in self._in_batches(rows, n_rules, read):
            found[:, batch] = levels
        return found


def _normalised(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
