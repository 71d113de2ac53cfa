"""The codes store: every positive code of a corpus, sorted by feature and then by position, memory-mapped.

Files: ``offsets.bin`` int64 ``[F + 1]``; ``positions.bin`` uint32 (uint64 for very large corpora) ``[nonzero]``, where position =
row of the window · window length + offset in it; ``values.bin`` float16 (float32 on request) ``[nonzero]``, raw SAE units, > 0;
``scales.bin`` float32 ``[F]``, each feature's largest value (0 when it never fires); ``unscored.bin``, the positions of tokens that have no codes
because they were not scored (attention sinks), ascending. ``codes.json`` is written last and marks
the store complete. Writing goes through runs: see :class:`RunWriter`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import FeatureRangeError, IncompleteStoreError, StorageError
from featureinterp.files import content_key, explained_storage, write_json

FORMAT = 2
FLUSH_NONZEROS = 1_000_000
_FLOAT16_MAX = 65504.0
_FLOAT16_TINY = np.float16(6e-8)


@dataclass(frozen=True, slots=True)
class FeatureCodes:
    """All positive codes of one feature: ``positions [nonzero]`` ascending, ``values [nonzero]`` > 0. Views of the mapped files."""

    positions: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class CodesStore:
    """A complete store with its windows."""

    folder: Path
    meta: Mapping[str, Any]
    windows: WindowTable
    offsets: np.ndarray
    positions: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    unscored: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Changes when anything that the codes depend on does."""
        return content_key(dict(self.meta))

    @classmethod
    def open(cls, run: Path) -> CodesStore:
        """Opens the store of a run folder. Raises ``IncompleteStoreError`` when collecting never finished there."""
        folder = run / "codes"
        if not (folder / "codes.json").exists():
            unfinished, none = "an unfinished collection: run the same 'featureinterp collect' again to go on", "no codes: run 'featureinterp collect' first"
            state = unfinished if folder.exists() else none
            raise IncompleteStoreError(f"{run} holds {state}")
        with explained_storage(folder):
            meta = json.loads((folder / "codes.json").read_text())
            if meta["format"] != FORMAT:
                raise IncompleteStoreError(f"{folder} was made by another version of featureinterp: delete {folder} and collect again")
            n, f = meta["n_nonzeros"], meta["n_features"]
            arrays = {}
            for name, dtype, size in (
                ("offsets", "int64", f + 1),
                ("positions", meta["position_dtype"], n),
                ("values", meta["value_dtype"], n),
                ("scales", "float32", f),
                ("unscored", meta["position_dtype"], meta["n_unscored"]),
            ):
                path = folder / f"{name}.bin"
                if path.stat().st_size != size * np.dtype(dtype).itemsize:
                    raise IncompleteStoreError(f"{path} has not the size that codes.json declares: delete {folder} and collect again")
                arrays[name] = np.asarray(np.memmap(path, dtype, "r", shape=(size,))) if size else np.zeros(0, dtype)
        return cls(folder, meta, WindowTable.open(run / "windows"), **arrays)

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return int(self.meta["n_features"])

    @property
    def n_scored(self) -> int:
        """Tokens whose codes were kept."""
        return int(self.meta["n_scored"])

    @cached_property
    def scored_positions(self) -> np.ndarray:
        """The positions of the scored tokens, ascending: int64 ``[token]``."""
        there = np.arange(self.windows.length) < np.asarray(self.windows.lengths)[:, None]
        there.reshape(-1)[np.asarray(self.unscored, np.int64)] = False
        return np.flatnonzero(there)

    @cached_property
    def row_of_position(self) -> np.ndarray:
        """The place of every position among the scored tokens, −1 where none is: int32 ``[position]``."""
        out = np.full(len(self.windows) * self.windows.length, -1, np.int32)
        out[self.scored_positions] = np.arange(len(self.scored_positions))
        return out

    def check_feature(self, index: int) -> None:
        """Raises ``FeatureRangeError`` when the dictionary has no such feature."""
        if not 0 <= index < self.n_features:
            raise FeatureRangeError(f"there is no feature {index}: the dictionary has features 0 to {self.n_features - 1}")

    def feature(self, index: int) -> FeatureCodes:
        """The codes of one feature, without copying."""
        self.check_feature(index)
        a, b = int(self.offsets[index]), int(self.offsets[index + 1])
        return FeatureCodes(self.positions[a:b], self.values[a:b])

    def counts(self) -> np.ndarray:
        """On how many tokens each feature fires, int64 ``[F]``."""
        return np.diff(self.offsets)

    def window_activations(self, index: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Activations of one feature in some windows: float32 ``[len(rows), window length]``, zero after a short window's end."""
        rows = np.asarray(rows, np.int64)
        codes, length = self.feature(index), self.windows.length
        edges = np.searchsorted(codes.positions, (rows[:, None] * length + [0, length]).astype(codes.positions.dtype))
        counts = edges[:, 1] - edges[:, 0]
        nonzeros = np.repeat(edges[:, 0] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        out = np.zeros((len(rows), length), np.float32)
        out[np.repeat(np.arange(len(rows)), counts), codes.positions[nonzeros].astype(np.int64) % length] = codes.values[nonzeros]
        return out


def narrow_values(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Values in the store's dtype. A value too large for float16 is an error; a positive one too small stays positive."""
    if dtype == np.float32:
        return values.astype(np.float32, copy=False)
    if len(values) and not float(values.max()) <= _FLOAT16_MAX:
        raise StorageError(f"the activation {float(values.max()):g} does not fit float16 (at most {_FLOAT16_MAX:g}): collect with --value-dtype float32")
    return np.maximum(values.astype(np.float16), _FLOAT16_TINY)


class RunWriter:
    """Takes codes in order of windows, in bounded memory, and writes them as runs that a later process can go on from.

    A run is a folder ``runs/00012`` with the codes of a range of windows sorted by feature and position; it appears by one
    rename. ``finish`` merges the runs into the store.
    """

    def __init__(self, folder: Path, *, n_features: int, n_positions: int, value_dtype: str, flush_nonzeros: int = FLUSH_NONZEROS) -> None:
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
                meta = json.loads(path.read_text())
                if meta["first_window"] != window:
                    raise IncompleteStoreError(f"{path} does not follow the run before it: delete {self.folder} and collect again")
                window, scored, number = meta["end_window"], scored + meta["n_scored"], number + 1
        return window, scored, number

    def add(
        self, positions: np.ndarray, features: np.ndarray, values: np.ndarray, *, n_scored: int, end_window: int, unscored: np.ndarray | None = None
    ) -> None:
        """Codes in any order, each pair (position, feature) once; ``unscored``: positions of tokens that were left out; ``end_window``: all windows before it
        are now complete."""
        if unscored is not None and len(unscored):
            self._unscored_pending.append(unscored.astype(self.position_dtype))
        self._pending.append((positions.astype(self.position_dtype), features.astype(np.uint32), narrow_values(values, self.value_dtype)))
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
                arrays = {"offsets": offsets, "positions": positions[order], "values": values[order], "unscored": unscored}
                for name, array in arrays.items():
                    (half / f"{name}.bin").write_bytes(memoryview(array).cast("B") if len(array) else b"")
                meta = {"first_window": self._first_window, "end_window": self.next_window, "n_scored": self._scored_pending}
                (half / "run.json").write_text(json.dumps(meta))
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
        runs = [self.folder / "runs" / f"{i:05d}" for i in range(self.n_runs)]
        with explained_storage(self.folder):
            run_offsets = [np.memmap(run / "offsets.bin", np.int64, "r") for run in runs]
            offsets = np.zeros(self.n_features + 1, np.int64)
            for own in run_offsets:
                offsets += own
            scales = np.zeros(self.n_features, np.float32)
            with (self.folder / "positions.bin").open("wb") as positions_out, (self.folder / "values.bin").open("wb") as values_out:
                for a, b in feature_blocks(offsets, self.flush_nonzeros):
                    positions, values = self._merge_block(runs, run_offsets, offsets, a, b)
                    scales[a:b] = block_maxima(values, offsets[a : b + 1] - offsets[a])
                    positions_out.write(memoryview(positions).cast("B"))
                    values_out.write(memoryview(values).cast("B"))
                for out in (positions_out, values_out):
                    out.flush()
                    os.fsync(out.fileno())
            (self.folder / "offsets.bin").write_bytes(memoryview(offsets).cast("B"))
            (self.folder / "scales.bin").write_bytes(memoryview(scales).cast("B"))
            unscored = b"".join((run / "unscored.bin").read_bytes() for run in runs)  # runs follow each other in position
            (self.folder / "unscored.bin").write_bytes(unscored)
        write_json(
            self.folder / "codes.json",
            {
                "format": FORMAT,
                **meta,
                "n_features": self.n_features,
                "n_nonzeros": int(offsets[-1]),
                "n_scored": self.n_scored,
                "n_unscored": len(unscored) // self.position_dtype.itemsize,
                "position_dtype": self.position_dtype.name,
                "value_dtype": self.value_dtype.name,
            },
        )
        shutil.rmtree(self.folder / "runs", ignore_errors=True)

    def _merge_block(self, runs: Sequence[Path], run_offsets: Sequence[np.ndarray], offsets: np.ndarray, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and values of the features a … b − 1 from all runs; runs follow each other in position, so that each
        feature's slices only have to be laid end to end."""
        n = int(offsets[b] - offsets[a])
        positions, values = np.empty(n, self.position_dtype), np.empty(n, self.value_dtype)
        free = offsets[a:b] - offsets[a]
        for run, own in zip(runs, run_offsets, strict=True):
            start, end = int(own[a]), int(own[b])
            counts = np.diff(own[a : b + 1])
            target = np.repeat(free - (own[a:b] - start), counts) + np.arange(end - start)
            for name, out in (("positions", positions), ("values", values)):
                with (run / f"{name}.bin").open("rb") as file:
                    file.seek(start * out.itemsize)
                    out[target] = np.frombuffer(file.read((end - start) * out.itemsize), out.dtype)
            free = free + counts
        return positions, values


def feature_blocks(offsets: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Consecutive ranges of features with at most ``budget`` nonzeros each (one feature may have more)."""
    blocks, a, f = [], 0, len(offsets) - 1
    while a < f:
        b = int(np.searchsorted(offsets, offsets[a] + budget, side="right")) - 1
        b = min(max(b, a + 1), f)
        blocks.append((a, b))
        a = b
    return blocks


def block_maxima(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The largest value between each pair of offsets, float32; 0 where they enclose nothing."""
    out = np.zeros(len(offsets) - 1, np.float32)
    full = np.flatnonzero(np.diff(offsets))
    if len(full):
        out[full] = np.maximum.reduceat(values, offsets[full])
    return out
