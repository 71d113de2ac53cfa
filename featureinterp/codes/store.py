"""The codes store: every positive code of a corpus, sorted by feature and then by position, memory-mapped.

Files: ``offsets.bin`` int64 ``[F + 1]``; ``positions.bin`` uint32 (uint64 for very large corpora)
``[nonzero]``, where position = row of the window · window length + offset in it; ``values.bin`` float16
(float32 on request) ``[nonzero]``, raw SAE units, > 0; ``scales.bin`` float32 ``[F]``, each feature's largest
value (0 when it never fires); ``unscored.bin``, the positions of tokens that have no codes because they were
not scored (attention sinks), ascending. ``codes.json`` is written last, marks the store complete, names the
windows and holds the checksums of the other files. It is written by
:class:`featureinterp.codes.runs.RunWriter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt

from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import FeatureRangeError, IncompatibleError, IncompleteStoreError
from featureinterp.files import content_key
from featureinterp.stored.arrays import mapped, read_whole, rising, within
from featureinterp.stored.sums import Marker, described, read_marker

FORMAT = 2
MARKER = "codes.json"
VALUE_DTYPES = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class FeatureCodes:
    """All positive codes of one feature: ``positions`` ascending, ``values`` > 0. Views of the
    mapped files.
    """

    positions: UInt[np.ndarray, " nonzero"]
    values: Float[np.ndarray, " nonzero"]


@dataclass(frozen=True)
class CodesStore:
    """A complete store with its windows."""

    folder: Path
    meta: Mapping[str, Any]
    windows: WindowTable
    offsets: Int64[np.ndarray, " edge"]
    positions: UInt[np.ndarray, " nonzero"]
    values: Float[np.ndarray, " nonzero"]
    scales: Float32[np.ndarray, " n_features"]
    unscored: UInt[np.ndarray, " unscored"]

    @property
    def fingerprint(self) -> str:
        """Changes when anything that the codes depend on does."""
        return content_key(dict(self.meta))

    @classmethod
    def open(cls, run: Path) -> CodesStore:
        """Opens the store of a run folder. Raises ``IncompleteStoreError`` when collecting never finished
        there, ``DamagedStoreError`` when a part is not what was written (positions and values are checked
        where they are read), and ``IncompatibleError`` when the windows are not those of the codes."""
        folder = run / "codes"
        if not (folder / MARKER).exists():
            unfinished = "an unfinished collection: run the same 'featureinterp collect' again to go on"
            none = "no codes: run 'featureinterp collect' first"
            raise IncompleteStoreError(f"{run} holds {unfinished if folder.exists() else none}")
        remedy = remedy_for(folder)
        marker = read_marker(folder / MARKER, remedy)
        meta = marker.value
        with described(folder / MARKER, remedy):
            if meta["format"] != FORMAT:
                another = "was made by another version of featureinterp"
                raise IncompleteStoreError(f"{folder} {another}: delete {folder} and collect again")
            windows = WindowTable.open(run / "windows")
            _check_windows(run, meta, windows)
            n_positions = len(windows) * windows.length
            arrays = _arrays(folder, marker, n_positions, remedy)
        rising(arrays["offsets"], folder / "offsets.bin", remedy, first=0, last=meta["n_nonzeros"])
        rising(arrays["unscored"], folder / "unscored.bin", remedy)
        within(arrays["unscored"], 0, n_positions, folder / "unscored.bin", remedy)
        return cls(folder, meta, windows, **arrays)

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return int(self.meta["n_features"])

    @property
    def n_scored(self) -> int:
        """Tokens whose codes were kept."""
        return int(self.meta["n_scored"])

    @cached_property
    def scored_positions(self) -> Int64[np.ndarray, " token"]:
        """The positions of the scored tokens, ascending."""
        there = np.arange(self.windows.length) < np.asarray(self.windows.lengths)[:, None]
        there.reshape(-1)[np.asarray(self.unscored, np.int64)] = False
        return np.flatnonzero(there)

    @cached_property
    def row_of_position(self) -> Int32[np.ndarray, " position"]:
        """The place of every position among the scored tokens, −1 where none is."""
        out = np.full(len(self.windows) * self.windows.length, -1, np.int32)
        out[self.scored_positions] = np.arange(len(self.scored_positions))
        return out

    def check_feature(self, index: int) -> None:
        """Raises ``FeatureRangeError`` when the dictionary has no such feature."""
        if not 0 <= index < self.n_features:
            raise FeatureRangeError(
                f"there is no feature {index}: the dictionary has features 0 to {self.n_features - 1}"
            )

    def feature(self, index: int) -> FeatureCodes:
        """The codes of one feature, without copying."""
        self.check_feature(index)
        a, b = int(self.offsets[index]), int(self.offsets[index + 1])
        return FeatureCodes(self.positions[a:b], self.values[a:b])

    def counts(self) -> Int64[np.ndarray, " n_features"]:
        """On how many tokens each feature fires."""
        return np.diff(self.offsets)

    def window_activations(
        self, index: int, rows: Sequence[int] | Int64[np.ndarray, " window"]
    ) -> Float32[np.ndarray, "window token"]:
        """Activations of one feature in some windows, zero after a short window's end."""
        rows = np.asarray(rows, np.int64)
        codes, length = self.feature(index), self.windows.length
        edges = np.searchsorted(
            codes.positions, (rows[:, None] * length + [0, length]).astype(codes.positions.dtype)
        )
        counts = edges[:, 1] - edges[:, 0]
        nonzeros = np.repeat(edges[:, 0] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        out = np.zeros((len(rows), length), np.float32)
        out[np.repeat(np.arange(len(rows)), counts), codes.positions[nonzeros].astype(np.int64) % length] = (
            codes.values[nonzeros]
        )
        return out


def remedy_for(folder: Path) -> str:
    """What brings damaged codes back."""
    return (
        f"delete {folder} and run the same 'featureinterp collect' again, which computes the codes anew "
        "and keeps the rest"
    )


def _arrays(folder: Path, marker: Marker, n_positions: int, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of a store. What is read by feature is checked where it is read, the others now."""
    meta, found = marker.value, {}
    n, f = meta["n_nonzeros"], meta["n_features"]
    if any(type(x) is not int or x < 0 for x in (n, f, meta["n_unscored"], meta["n_scored"])):
        raise ValueError("a count is no whole number of at least 0")
    at = np.dtype(meta["position_dtype"])
    if at not in (np.uint32, np.uint64) or meta["value_dtype"] not in VALUE_DTYPES:
        raise ValueError(f"there are no positions in {at} or values in {meta['value_dtype']}")
    for name, dtype, size in (
        ("offsets", np.int64, f + 1),
        ("scales", np.float32, f),
        ("unscored", at, meta["n_unscored"]),
    ):
        path = folder / f"{name}.bin"
        found[name] = read_whole(path, dtype, (size,), marker.files, marker=MARKER, remedy=remedy)

    def inside(positions: np.ndarray) -> bool:
        return int(positions.max()) < n_positions

    for name, dtype, valid in (
        ("positions", at, inside),
        ("values", np.dtype(meta["value_dtype"]), positive),
    ):
        path = folder / f"{name}.bin"
        found[name] = mapped(path, dtype, (n,), marker.files, marker=MARKER, remedy=remedy, valid=valid)
    return found


def positive(values: np.ndarray) -> bool:
    """Whether all values are finite and above 0, as codes are."""
    return bool(values.min() > 0 and np.isfinite(values.max()))


def _check_windows(run: Path, meta: Mapping[str, Any], windows: WindowTable) -> None:
    """Raises ``IncompatibleError`` when the codes were made from other windows than those beside them."""
    named = (
        meta["corpus"]["windows"] if "corpus" in meta else windows.fingerprint
    )  # codes of a caller's own name none
    if named != windows.fingerprint or meta.get("window_length", windows.length) != windows.length:
        raise IncompatibleError(
            f"{run / 'codes'} and {run / 'windows'} do not belong together (the codes were made from the "
            f"windows {named[:12]}, "
            f"not from {windows.fingerprint[:12]}): put back the folder that was there, or delete both and "
            "collect again"
        )
