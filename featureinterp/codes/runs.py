"""Writing a codes store in bounded memory: codes arrive in order of windows, are written as sorted runs, and
the runs are merged. An interrupted collection goes on from its last run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer, UInt

from featureinterp.codes.store import FORMAT, MARKER, positive, remedy_for
from featureinterp.errors import IncompleteStoreError, StorageError
from featureinterp.files import explained_storage
from featureinterp.stored.arrays import mapped, read_whole, rising
from featureinterp.stored.sums import (
    SummedFile,
    Sums,
    block_for,
    described,
    read_marker,
    sealed,
    write_marker,
)

FLUSH_NONZEROS = 1_000_000
_FLOAT16_MAX = 65504.0
_FLOAT16_TINY = np.float16(6e-8)
_FLOAT16_NORMAL = 2.0**-14
"""Smaller values have fewer digits."""
_ENOUGH = 64
"""So many values of a batch are all of its kind."""


def narrow_values(
    values: Float[np.ndarray, " nonzero"], dtype: np.dtype[Any]
) -> Float[np.ndarray, " nonzero"]:
    """Values in the store's dtype. A value too large for float16, or not finite, is an error; a positive one
    too small stays positive.
    """
    if not np.isfinite(values).all():
        raise StorageError(
            "an activation is not finite, so nothing was stored of it: the SAE's weights or the model's "
            "dtype cannot hold it"
        )
    if dtype == np.float32:
        return values.astype(np.float32, copy=False)
    if len(values) and not float(values.max()) <= _FLOAT16_MAX:
        raise StorageError(
            f"the activation {float(values.max()):g} does not fit float16 (at most {_FLOAT16_MAX:g}): "
            "collect with --value-dtype float32"
        )
    if len(values) >= _ENOUGH and float(values.max()) < _FLOAT16_NORMAL:
        raise StorageError(
            f"the activations are so small (at most {float(values.max()):.3g}) that float16 would round them "
            "to few values: collect with --value-dtype float32"
        )
    return np.maximum(values.astype(np.float16), _FLOAT16_TINY)


class RunWriter:
    """Takes codes in order of windows, in bounded memory, and writes them as runs that a later process can go
    on from.

    A run is a folder ``runs/00012`` with the codes of a range of windows sorted by feature and position; it
    appears by one rename. ``finish`` merges the runs into the store.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n_features: int,
        n_positions: int,
        value_dtype: str,
        flush_nonzeros: int = FLUSH_NONZEROS,
    ) -> None:
        self.folder = folder
        self.n_features = n_features
        self.position_dtype = np.dtype(np.uint32 if n_positions <= 2**32 else np.uint64)
        self.value_dtype = np.dtype(value_dtype)
        self.flush_nonzeros = flush_nonzeros
        self.next_window, self.n_scored, self.n_runs = self._resume()
        self._first_window = self.next_window
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._unscored_pending: list[np.ndarray] = []
        self._n_pending = self._scored_pending = 0

    def _resume(self) -> tuple[int, int, int]:
        runs = self.folder / "runs"
        with explained_storage(runs):
            runs.mkdir(parents=True, exist_ok=True)
            for half in runs.glob("*.part"):
                shutil.rmtree(half)
            window = scored = number = 0
            while (path := runs / f"{number:05d}" / "run.json").exists():
                meta = read_marker(path, _again(path.parent)).value
                with described(path, _again(path.parent)):
                    if meta["first_window"] != window:
                        raise IncompleteStoreError(
                            f"{path} does not follow the run before it: {remedy_for(self.folder)}"
                        )
                    window, scored, number = meta["end_window"], scored + meta["n_scored"], number + 1
            for after in runs.iterdir():  # of a run that was deleted
                if after.name.isdecimal() and int(after.name) >= number:
                    shutil.rmtree(after)
        return window, scored, number

    def add(
        self,
        positions: Integer[np.ndarray, " nonzero"],
        features: Integer[np.ndarray, " nonzero"],
        values: Float[np.ndarray, " nonzero"],
        *,
        n_scored: int,
        end_window: int,
        unscored: Integer[np.ndarray, " unscored"] | None = None,
    ) -> None:
        """Codes in any order, each pair (position, feature) once; ``unscored``: positions of tokens that were
        left out; ``end_window``: all windows before it are now complete."""
        if unscored is not None and len(unscored):
            self._unscored_pending.append(unscored.astype(self.position_dtype))
        self._pending.append(
            (
                positions.astype(self.position_dtype),
                features.astype(np.uint32),
                narrow_values(values, self.value_dtype),
            )
        )
        self._n_pending += len(values)
        self._scored_pending += n_scored
        at_boundary = end_window > self.next_window
        self.next_window = end_window
        if at_boundary and self._n_pending >= self.flush_nonzeros:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as a run."""
        if self.next_window == self._first_window:
            return
        positions, features, values = (np.concatenate(column) for column in zip(*self._pending, strict=True))
        unscored = np.sort(np.concatenate([np.zeros(0, self.position_dtype), *self._unscored_pending]))
        order = np.argsort((features.astype(np.uint64) << np.uint64(40)) + positions)
        offsets = np.zeros(self.n_features + 1, np.int64)
        np.cumsum(np.bincount(features, minlength=self.n_features), out=offsets[1:])
        final = self.folder / "runs" / f"{self.n_runs:05d}"
        half = final.with_suffix(".part")
        with explained_storage(half):
            try:
                half.mkdir()
                arrays = {
                    "offsets": offsets,
                    "positions": positions[order],
                    "values": values[order],
                    "unscored": unscored,
                }
                files = {
                    f"{name}.bin": _written(half / f"{name}.bin", [array]) for name, array in arrays.items()
                }
                meta = {
                    "first_window": self._first_window,
                    "end_window": self.next_window,
                    "n_scored": self._scored_pending,
                }
                (half / "run.json").write_text(json.dumps(sealed(meta, files)))
                os.replace(half, final)
            except BaseException:
                shutil.rmtree(half, ignore_errors=True)
                raise
        self.n_scored += self._scored_pending
        self.n_runs += 1
        self._first_window = self.next_window
        self._pending, self._unscored_pending, self._n_pending, self._scored_pending = [], [], 0, 0

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Merges all runs into the feature-major files, writes ``codes.json`` last, and removes the runs."""
        self.flush()
        runs = [_Run.open(self.folder / "runs" / f"{i:05d}", self) for i in range(self.n_runs)]
        offsets = np.zeros(self.n_features + 1, np.int64)
        for run in runs:
            offsets += run.offsets
        scales = np.zeros(self.n_features, np.float32)
        block = block_for(int(offsets[-1]) * self.position_dtype.itemsize)
        with explained_storage(self.folder):
            with (
                (self.folder / "positions.bin").open("wb") as positions_to,
                (self.folder / "values.bin").open("wb") as values_to,
            ):
                positions_out, values_out = (
                    SummedFile(positions_to, Sums(block)),
                    SummedFile(values_to, Sums(block)),
                )
                for a, b in feature_blocks(offsets, self.flush_nonzeros):
                    positions, values = self._merge_block(runs, offsets, a, b)
                    scales[a:b] = block_maxima(values, offsets[a : b + 1] - offsets[a])
                    positions_out.write(positions.data.cast("B"))
                    values_out.write(values.data.cast("B"))
                for out in (positions_to, values_to):
                    out.flush()
                    os.fsync(out.fileno())
            files = {"positions.bin": positions_out.sums, "values.bin": values_out.sums}
            unscored = [run.unscored for run in runs]  # runs follow each other in position
            for name, arrays in (("offsets", [offsets]), ("scales", [scales]), ("unscored", unscored)):
                files[f"{name}.bin"] = _written(self.folder / f"{name}.bin", arrays)
        write_marker(
            self.folder / MARKER,
            {
                "format": FORMAT,
                **meta,
                "n_features": self.n_features,
                "n_nonzeros": int(offsets[-1]),
                "n_scored": self.n_scored,
                "n_unscored": sum(map(len, unscored)),
                "position_dtype": self.position_dtype.name,
                "value_dtype": self.value_dtype.name,
            },
            files,
        )
        shutil.rmtree(self.folder / "runs", ignore_errors=True)

    def _merge_block(
        self, runs: Sequence[_Run], offsets: np.ndarray, a: int, b: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and values of the features a … b − 1 from all runs; runs follow each other in position,
        so that each feature's slices only have to be laid end to end."""
        n = int(offsets[b] - offsets[a])
        positions, values = np.empty(n, self.position_dtype), np.empty(n, self.value_dtype)
        free = offsets[a:b] - offsets[a]
        for run in runs:
            start, end = int(run.offsets[a]), int(run.offsets[b])
            counts = np.diff(run.offsets[a : b + 1])
            target = np.repeat(free - (run.offsets[a:b] - start), counts) + np.arange(end - start)
            positions[target] = run.positions[start:end]
            values[target] = run.values[start:end]
            free = free + counts
        return positions, values


@dataclass(frozen=True)
class _Run:
    """A run on disk."""

    offsets: Int64[np.ndarray, " edge"]
    positions: UInt[np.ndarray, " nonzero"]
    values: Float[np.ndarray, " nonzero"]
    unscored: UInt[np.ndarray, " unscored"]

    @classmethod
    def open(cls, folder: Path, of: RunWriter) -> _Run:
        """Raises ``DamagedStoreError`` for one that is not what was written."""
        remedy = _again(folder)
        files = read_marker(folder / "run.json", remedy).files
        mark = "run.json"
        offsets = read_whole(folder / "offsets.bin", np.int64, (of.n_features + 1,), files, mark, remedy)
        rising(offsets, folder / "offsets.bin", remedy, first=0)
        n, path = int(offsets[-1]), folder / "unscored.bin"
        with explained_storage(path):
            n_unscored = path.stat().st_size // of.position_dtype.itemsize
        unscored = read_whole(path, of.position_dtype, (n_unscored,), files, mark, remedy)
        positions = mapped(folder / "positions.bin", of.position_dtype, (n,), files, mark, remedy)
        values = mapped(folder / "values.bin", of.value_dtype, (n,), files, mark, remedy, positive)
        return cls(offsets, positions, values, unscored)


def _again(run: Path) -> str:
    """What to do about a damaged run of an unfinished collection."""
    return (
        f"delete {run} and run the same 'featureinterp collect' again, which goes on from the run before it"
    )


def _written(path: Path, arrays: Sequence[np.ndarray]) -> Sums:
    """Writes arrays one after the other; the sums of the file."""
    with path.open("wb") as file:
        out = SummedFile(file, Sums(block_for(sum(a.nbytes for a in arrays))))
        for array in arrays:
            if len(array):
                out.write(np.ascontiguousarray(array).data.cast("B"))
    return out.sums


def feature_blocks(offsets: Int64[np.ndarray, " edge"], budget: int) -> list[tuple[int, int]]:
    """Consecutive ranges of features with at most ``budget`` nonzeros each (one feature may have more)."""
    blocks, a, f = [], 0, len(offsets) - 1
    while a < f:
        b = int(np.searchsorted(offsets, offsets[a] + budget, side="right")) - 1
        b = min(max(b, a + 1), f)
        blocks.append((a, b))
        a = b
    return blocks


def block_maxima(
    values: Float[np.ndarray, " nonzero"], offsets: Int64[np.ndarray, " edge"]
) -> Float32[np.ndarray, " edge-1"]:
    """The largest value between each pair of offsets; 0 where they enclose nothing."""
    out = np.zeros(len(offsets) - 1, np.float32)
    full = np.flatnonzero(np.diff(offsets))
    if len(full):
        out[full] = np.maximum.reduceat(values, offsets[full])
    return out
