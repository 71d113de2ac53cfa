"""Where training batches come from: a store whose shards are mixed, or the model itself through a bounded
shuffle buffer.

Both give the same rows at the same step whatever happened before, so that an interrupted run goes on where it
was; the order depends on the seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import InputError
from featureinterp.subject.load import Subject
from featureinterp.training.extract import read_scored
from featureinterp.training.store import ActivationStore


class Batches(Protocol):
    """Training rows, step by step, without an end."""

    @property
    def d_model(self) -> int:
        """Width of a row."""
        ...

    def sample(self, n: int, *, seed: int, n_shards: int | None) -> Float32[np.ndarray, "row d_model"]:
        """About ``n`` rows to prepare the training by."""
        ...

    def next(self) -> Float32[np.ndarray, "row d_model"]:
        """This process's share of the next batch."""
        ...

    @property
    def cursor(self) -> dict[str, int]:
        """Where it stands; given back to :meth:`seek`, the following batches are the same."""
        ...

    def seek(self, cursor: dict[str, int]) -> None:
        """Goes to where a cursor was taken."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    def of(self, batch: int) -> int:
        """Rows per process of a joint batch. Raises ``InputError`` when it cannot be divided."""
        if batch % self.world:
            raise InputError(
                f"a batch of {batch} rows cannot be divided among {self.world} processes: choose a multiple"
            )
        return batch // self.world


class StoreBatches:
    """Rows of a store. Each epoch goes through the shards in a new random order, ``mix`` at a time, whose
    rows are shuffled together in memory. Batches go on from one epoch into the next, so that no row is left
    out."""

    def __init__(
        self, store: ActivationStore, batch: int, *, mix: int = 10, seed: int = 0, share: Share = Share()
    ) -> None:
        if mix < 1:
            raise InputError(f"{mix} shards cannot be mixed: give at least 1")
        if batch > len(store):
            raise InputError(
                f"a batch of {batch:,} rows is larger than the store, which has {len(store):,}: choose a "
                "smaller batch or extract more"
            )
        self.store, self.batch, self.mix, self.seed, self.share = store, batch, mix, seed, share
        self._per = share.of(batch)
        self._at = 0
        self._held: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def d_model(self) -> int:
        return self.store.d_model

    def sample(self, n: int, *, seed: int, n_shards: int | None) -> Float32[np.ndarray, "row d_model"]:
        return self.store.sample(n, seed=seed, n_shards=n_shards)

    @property
    def cursor(self) -> dict[str, int]:
        return {"row": self._at}

    def seek(self, cursor: dict[str, int]) -> None:
        self._at = cursor["row"]

    def next(self) -> Float32[np.ndarray, "row d_model"]:
        start = self._at + self.share.rank * self._per
        self._at += self.batch
        return self.rows(start, self._per)

    def rows(self, start: int, n: int) -> Float32[np.ndarray, "{n} d_model"]:
        """``n`` rows of the endless stream from its row ``start`` on."""
        parts = []
        while n:
            epoch, place = divmod(start, len(self.store))
            group, first, size = self._group(epoch, place)
            held = self._rows_of(epoch, group)
            took = held[place - first : place - first + min(n, first + size - place)]
            parts.append(took)
            start, n = start + len(took), n - len(took)
        found = np.concatenate(parts).astype(np.float32)
        self.store.check_finite(found)
        return found

    def _order(self, epoch: int) -> list[np.ndarray]:
        """The shards of an epoch, in the groups that are mixed."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.store.shards))
        return [shards[i : i + self.mix] for i in range(0, len(shards), self.mix)]

    def _group(self, epoch: int, place: int) -> tuple[int, int, int]:
        """Which group of an epoch holds its row ``place``: (its number, its first row in the epoch, its
        rows).
        """
        sizes = np.diff(self.store.edges)
        first = 0
        for number, shards in enumerate(self._order(epoch)):
            size = int(sizes[shards].sum())
            if place < first + size:
                return number, first, size
            first += size
        raise IndexError(place)

    def _rows_of(self, epoch: int, group: int) -> np.ndarray:
        """The rows of a group, shuffled, in the store's dtype; the last one asked for is kept."""
        if self._held is None or self._held[0] != (epoch, group):
            shards = self._order(epoch)[group]
            order = np.random.default_rng([self.seed, epoch, group]).permutation(
                sum(len(self.store.shards[s]) for s in shards)
            )
            self._held = None  # before the next is read
            held = np.empty((len(order), self.d_model), self.store.shards[0].dtype)
            places, first = np.argsort(order), 0
            for s in shards:
                rows = self.store.shards[s]
                held[places[first : first + len(rows)]] = rows
                first += len(rows)
            self._held = ((epoch, group), held)
        return self._held[1]


class OnlineBatches:
    """Rows straight from the model. Windows are read in a new random order in each epoch; about ``buffer``
    rows at a time are shuffled together. Each process reads its own windows of an order that all share. What
    is kept in memory is one buffer, whatever the corpus."""

    def __init__(
        self,
        subject: Subject,
        hook: str,
        windows: WindowTable,
        rows: np.ndarray,
        batch: int,
        *,
        buffer: int = 131_072,
        batch_tokens: int = 2048,
        seed: int = 0,
        share: Share = Share(),
    ) -> None:
        if buffer < batch:
            raise InputError(
                f"a shuffle buffer of {buffer:,} rows is smaller than a batch of {batch:,}: choose a "
                "larger buffer"
            )
        if not len(rows):
            raise InputError("there are no windows to train on: hold out less")
        self.subject, self.hook, self.windows, self.rows, self.share = (
            subject,
            hook,
            windows,
            np.asarray(rows),
            share,
        )
        self.batch, self.buffer, self.batch_tokens, self.seed = batch, buffer, batch_tokens, seed
        self._per = share.of(batch)
        self._at = {"epoch": 0, "window": 0, "row": 0}
        self._next = (0, 0)
        self._held: np.ndarray | None = None

    @property
    def d_model(self) -> int:
        return self.subject.d_model

    def sample(self, n: int, *, seed: int, n_shards: int | None) -> Float32[np.ndarray, "row d_model"]:
        order = np.random.default_rng([seed, 1]).permutation(self.rows)
        return self._read(order, 0, n)[0]

    @property
    def cursor(self) -> dict[str, int]:
        return dict(self._at)

    def seek(self, cursor: dict[str, int]) -> None:
        self._at, self._held = dict(cursor), None

    def next(self) -> Float32[np.ndarray, "row d_model"]:
        parts, n = [], self._per
        while n:
            held = self._rows()
            took = held[self._at["row"] : self._at["row"] + n]
            parts.append(took)
            n -= len(took)
            self._at["row"] += len(took)
            if self._at["row"] == len(held):
                self._at = {"epoch": self._next[0], "window": self._next[1], "row": 0}
                self._held = None
        return np.concatenate(parts)

    def _rows(self) -> np.ndarray:
        """The buffer that begins where the cursor says, shuffled."""
        if self._held is None:
            epoch, window = self._at["epoch"], self._at["window"]
            order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)[
                self.share.rank :: self.share.world
            ]
            held, end = self._read(order, window, self.buffer // self.share.world)
            self._held = np.random.default_rng([self.seed, epoch, window]).permutation(held)
            self._next = (epoch, end) if end < len(order) else (epoch + 1, 0)
        return self._held

    def _read(self, order: np.ndarray, first: int, n: int) -> tuple[np.ndarray, int]:
        """At least ``n`` rows from a place in an order of windows on, or what is left of it; and the place
        behind them.
        """
        parts: list[np.ndarray] = []
        end = first
        for batch, (values, _) in read_scored(
            self.subject, self.hook, self.windows, order, first, self.batch_tokens, torch.float32
        ):
            parts.append(values)
            end = batch.through if batch.through is not None else end
            if batch.through is not None and sum(map(len, parts)) >= n:
                break
        found = np.concatenate(parts)
        if not len(found):
            raise InputError("no token of the training windows is scored: check the model and the corpus")
        return found, end


def as_tensor(rows: np.ndarray, device: torch.device) -> Float32[Tensor, "row d_model"]:
    """Rows on a device."""
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device, torch.float32)
