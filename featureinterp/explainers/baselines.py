"""Explanations without a language model, which every method has to beat."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from featureinterp.domain.explanation import MAX_RULES, Explanation, Provenance, Rule
from featureinterp.domain.record import FeatureRecord
from featureinterp.explainers.windows import training_windows
from featureinterp.interfaces import Parts


class TopTokens:
    """Rules from the tokens with the largest mean activation over the training windows, one per token.

    A token's strength is its mean activation on 0–5, at least 1; tokens are compared as they are, case and
    space included.
    """

    def __init__(self, n_tokens: int = MAX_RULES, n_windows: int = 15) -> None:
        self.n_tokens, self.n_windows = n_tokens, n_windows

    @classmethod
    def of_job(cls, parts: Parts) -> TopTokens:
        """The explainer of a job."""
        return cls()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an explanation depends on, besides the record."""
        return {"explainer": "top-tokens", "n_tokens": self.n_tokens, "n_windows": self.n_windows}

    async def explain(self, record: FeatureRecord) -> Explanation:
        """Never fails on a feature that fires in a training window; raises ``InputError`` on one that does
        not.
        """
        windows = training_windows(record, self.n_windows)
        total: dict[str, float] = defaultdict(float)
        seen: dict[str, int] = defaultdict(int)
        for window in windows:
            for piece, activation in zip(window.pieces, window.activations.tolist(), strict=True):
                if piece.strip():
                    total[piece] += activation
                    seen[piece] += 1
        if not any(total.values()):
            for window in windows:  # the feature fires on white space alone
                for piece, activation in zip(window.pieces, window.activations.tolist(), strict=True):
                    total[piece or "\u200b"] += activation
                    seen[piece or "\u200b"] += 1
        means = {piece: total[piece] / seen[piece] for piece in total if total[piece] > 0}
        best = sorted(means, key=lambda piece: -means[piece])[: self.n_tokens]
        rules = tuple(
            Rule(
                json.dumps(piece, ensure_ascii=False), min(5, max(1, round(5 * means[piece] / record.scale)))
            )
            for piece in best
        )
        return Explanation(rules, Provenance("top-tokens", examples=tuple(w.row for w in windows)))
