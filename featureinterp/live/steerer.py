"""The model and the SAE that made a run, as a writer whose residual stream is pushed along a feature's
direction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import anyio.to_thread
import torch

from featureinterp.codes.collect import check_sae
from featureinterp.codes.store import CodesStore
from featureinterp.live.activator import live_settings
from featureinterp.sae.load import LoadedSae
from featureinterp.subject.load import check_same_weights
from featureinterp.subject.steering import random_directions, write

PUSH = 3
"""How a direction is added; part of every result's key. 2: in the units of each token, for SAEs that
normalise tokens. 3: never at a text's first token, whatever its opening; the space behind an opening is kept.
"""


class RunSteerer:
    """A :class:`Steerer`. ``load`` gives the causal language model, its tokenizer and the SAE, when the first
    text is asked for.
    """

    def __init__(
        self, store: CodesStore, load: Callable[[], tuple[Any, Any, LoadedSae]], *, dtype: str | None = None
    ) -> None:
        self.settings = live_settings(store, dtype) | {"push": PUSH}
        self._store, self._load = store, load
        self._busy = threading.Lock()
        self._loaded: tuple[Any, Any, LoadedSae] | None = None

    async def write(
        self,
        feature: int,
        amount: float,
        openings: Sequence[str],
        *,
        random: int | None = None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """One text per opening, in a worker thread, while what a code of ``amount`` contributes to each token
        is added: so many times the feature's decoder row, and the token's deviation where the SAE normalises
        by it. With ``random``, a random direction of that number and of the same length instead."""
        return await anyio.to_thread.run_sync(
            lambda: self._write(feature, amount, openings, random, max_tokens, temperature, seed)
        )

    def _write(
        self,
        feature: int,
        amount: float,
        openings: Sequence[str],
        random: int | None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        with self._busy:
            if self._loaded is None:
                self._loaded = self._checked()
            model, tokenizer, sae = self._loaded
            row = sae.sae.W_dec[feature].float()
            if random is not None:
                row = random_directions(len(row), random + 1, seed=seed)[random].to(row.device) * row.norm()
            vector: torch.Tensor | None = None if amount == 0 else amount * row
            return write(
                model,
                tokenizer,
                sae.hook,
                vector,
                openings,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                units=sae.sae.units,
            )

    def _checked(self) -> tuple[Any, Any, LoadedSae]:
        model, tokenizer, sae = self._load()
        check_sae(self._store, sae)
        recorded = self._store.meta["model"]
        check_same_weights(model.base_model, recorded["name"], recorded, "the run's codes")
        return model, tokenizer, sae
