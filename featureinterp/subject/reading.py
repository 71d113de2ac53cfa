"""The one way in which windows of a corpus are read through a subject model: batches of one length, as large
as they fit.

On a GPU the next batch is begun before the present one is handed over, so that the model computes while the
host writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.corpus.windows import WindowTable
from featureinterp.machine.accelerator import fit_of, on_gpu, queues
from featureinterp.subject.load import Subject

BATCH_TOKENS = 2048
"""Tokens that a CPU reads at once."""
CHUNK_TOKENS = 16_384
"""Tokens of which windows of one length are put together; a GPU tries to read all of them at once."""

T = TypeVar("T")
Finish = Callable[["Batch", list[Float[Tensor, "window token d_model"]]], T]
"""Makes of a batch and its activations at every hook what is handed over. It runs in inference mode.
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of one length. ``rows``: which; ``through``: the place in the order before which all windows
    are done when this batch is; None while others of its chunk are missing."""

    rows: np.ndarray
    length: int
    through: int | None

    @property
    def n_tokens(self) -> int:
        """Tokens in it."""
        return len(self.rows) * self.length

    def cut(self, n: int) -> tuple[Batch, Batch | None]:
        """Its first ``n`` windows, and the rest."""
        if n >= len(self.rows):
            return self, None
        return Batch(self.rows[:n], self.length, None), Batch(self.rows[n:], self.length, self.through)


def read_windows(
    subject: Subject,
    hooks: Sequence[str],
    windows: WindowTable,
    finish: Finish[T],
    *,
    order: np.ndarray | None = None,
    first: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[Batch, T]]:
    """Windows in ``order`` (all, as they come, when None) from ``order[first:]`` on, batch by batch: (the
    batch, what ``finish`` made of it).

    ``batch_tokens``: tokens at once; the default stands for as many as a GPU holds there. Batches that do not
    fit are halved. The order of the windows depends on ``batch_tokens`` and not on what fits. Raises
    ``DeviceMemoryError`` when a single window does not fit.
    """
    order = np.arange(len(windows)) if order is None else order
    wanted = CHUNK_TOKENS if batch_tokens == BATCH_TOKENS and on_gpu(subject.device) else batch_tokens
    groups = groups_of(windows, order, first, batch_tokens)
    fit, waiting = fit_of(subject.model, "reading windows"), list[Batch]()

    def begin() -> tuple[Batch, list[torch.Tensor]] | None:
        """Sends off the next batch."""
        while (group := waiting.pop() if waiting else next(groups, None)) is not None:
            batch, rest = group.cut(fit.rows(windows.length, wanted))
            try:
                begun = subject.residuals(
                    torch.from_numpy(np.array(windows.tokens[batch.rows, : batch.length], np.int64)), hooks
                )
            except RuntimeError as error:
                fit.less(len(batch.rows), windows.length, error, subject.device)
                waiting.append(group)
                continue
            if rest is not None:
                waiting.append(rest)
            return batch, begun
        return None

    now = begin()
    while now is not None:
        (batch, begun), now = now, None
        try:
            with torch.inference_mode():
                found = finish(batch, begun)
        except RuntimeError as error:
            fit.less(len(batch.rows), windows.length, error, subject.device)
            waiting.append(batch)
            del begun
            now = begin()
            continue
        del begun
        now = begin() if queues(subject.device) else None
        yield batch, found
        now = begin() if now is None else now


def groups_of(windows: WindowTable, order: np.ndarray, first: int, batch_tokens: int) -> Iterator[Batch]:
    """All windows of one length in a chunk of the order, the longest first."""
    at_once = max(1, batch_tokens // windows.length)
    chunk = max(at_once, CHUNK_TOKENS // windows.length // at_once * at_once)
    for start in range(first, len(order), chunk):
        rows = order[start : start + chunk]
        lengths = np.asarray(windows.lengths)[rows]
        present = np.unique(lengths)[::-1]
        for length in present:
            through = start + len(rows) if length == present[-1] else None
            yield Batch(rows[lengths == length], int(length), through)
