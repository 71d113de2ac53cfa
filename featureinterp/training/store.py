"""Activations on disk: shards of one plain 2-D array each, and for every row the token that it belongs to.

``shard-00000.bin`` …: ``[row, d_model]`` in the store's dtype (float16 or float32); ``documents.bin``,
``windows.bin``, ``offsets.bin``, ``tokens.bin``: int32 ``[row]``, the row's document, window, place in the
window and token id; ``metadata.json`` is written last and marks the store complete. It holds the numbers of
rows and shards, what the rows depend on (model, hook, corpus, tokenizer, mask), how many tokens were left
out, by cause, and the checksums of the other files. While a store is being written, ``shard-00000.sums`` has
those of a shard that is full.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from featureinterp.errors import (
    FeatureInterpError,
    IncompatibleError,
    IncompleteStoreError,
    InputError,
    UnknownNameError,
)
from featureinterp.files import content_key, explained_storage
from featureinterp.stored.arrays import mapped
from featureinterp.stored.sums import Marker, Sums, described, read_marker, write_marker

FORMAT = 1
METADATA = "metadata.json"
TRAIN, TEST = "train", "test"
"""Names of the stores of an extraction."""
SHARD_BYTES = 64 * 2**20
SHARD_BLOCK = 1 << 20
SIDES = ("documents", "windows", "offsets", "tokens")
DTYPES = {"float16": np.float16, "float32": np.float32}
SMALLEST_NORMAL = 2.0**-14
"""Smaller numbers have fewer digits in float16."""


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A complete store, memory-mapped. ``documents``, ``windows``, ``offsets``, ``tokens``:
    of each row. All are checked where they are read. ``files``: their checksums,
    None for a store of an earlier version."""

    folder: Path
    meta: dict[str, Any]
    shards: tuple[Float[np.ndarray, "_row d_model"], ...]
    documents: Int32[np.ndarray, " row"]
    windows: Int32[np.ndarray, " row"]
    offsets: Int32[np.ndarray, " row"]
    tokens: Int32[np.ndarray, " row"]
    files: Mapping[str, Sums] | None = None

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Raises ``UnknownNameError`` when there is no store, ``IncompleteStoreError`` when its writing never
        finished, and ``DamagedStoreError`` when a file is not as long as it must be, or when what is read is
        not what was written."""
        folder = Path(folder)
        marker = _read(folder)
        meta, remedy = marker.value, remedy_for(folder)
        n, width, dtype = meta["n_rows"], meta["d_model"], DTYPES[meta["dtype"]]
        known = (marker.files, METADATA, remedy)
        sizes = enumerate(meta["shards"])
        shards = tuple(mapped(shard_path(folder, i), dtype, (rows, width), *known) for i, rows in sizes)
        sides = {
            name: mapped(folder / f"{name}.bin", np.int32, (n,), *known, _not_negative) for name in SIDES
        }
        return cls(folder, meta, shards, **sides, files=marker.files)

    def __len__(self) -> int:
        return int(self.meta["n_rows"])

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return int(self.meta["d_model"])

    @property
    def key(self) -> str:
        """A hash of what the rows depend on."""
        return str(self.meta["key"])

    @cached_property
    def edges(self) -> np.ndarray:
        """First row of every shard, and the end: int64 ``[shard + 1]``."""
        return np.concatenate([[0], np.cumsum(self.meta["shards"], dtype=np.int64)])

    def read(self, rows: Int64[np.ndarray, " row"]) -> Float32[np.ndarray, "row d_model"]:
        """The given rows in their order. Raises ``InputError`` for a row that is not there, and
        ``FeatureInterpError`` when a value is not finite.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            outside = int(rows.min() if rows.min() < 0 else rows.max())
            raise InputError(f"{self.folder} has no row {outside}: it has rows 0 to {len(self) - 1}")
        if len(rows) and (np.diff(rows) == 1).all():
            return self._span(int(rows[0]), int(rows[-1]) + 1)
        out = np.empty((len(rows), self.d_model), np.float32)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], self.edges)
        for shard, (a, b) in enumerate(pairwise(cuts)):
            if b > a:
                out[order[a:b]] = self.shards[shard][rows[order[a:b]] - self.edges[shard]]
        self.check_finite(out)
        return out

    def check(self) -> None:
        """Reads all. Raises ``DamagedStoreError`` for what is not what was written."""
        for array in (*self.shards, *(getattr(self, name) for name in SIDES)):
            np.asarray(array)

    def check_finite(self, rows: np.ndarray) -> None:
        """Raises ``FeatureInterpError`` when a value of these rows is not finite. Rows with checksums were
        when they were written, and are not looked at again."""
        if self.files is None and not np.isfinite(rows).all():
            mend = "extract it again, with a model in float32 or bfloat16"
            raise FeatureInterpError(f"{self.folder} holds activations that are not finite: {mend}")

    def blocks(self, rows: int = 8192) -> Iterator[np.ndarray]:
        """All rows in their order, float32, in pieces."""
        for start in range(0, len(self), rows):
            yield self._span(start, min(start + rows, len(self)))

    def _span(self, start: int, stop: int) -> Float32[np.ndarray, "row d_model"]:
        """The rows from ``start`` to before ``stop``."""
        out = np.empty((stop - start, self.d_model), np.float32)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self.edges, at, "right")) - 1
            first, end = int(self.edges[shard]), min(stop, int(self.edges[shard + 1]))
            rows: Any = self.shards[shard]
            rows.copy_rows(at - first, end - first, out[at - start : end - start])
            at = end
        self.check_finite(out)
        return out

    def sample(
        self, n: int, *, seed: int = 0, n_shards: int | None = None
    ) -> Float32[np.ndarray, "row d_model"]:
        """``n`` rows drawn evenly from up to ``n_shards`` shards (all when None), float32; all rows when
        there are fewer.
        """
        rng = np.random.default_rng([seed, 1])
        shards = np.arange(len(self.shards))
        if n_shards is not None and n_shards < len(shards):
            shards = np.sort(rng.choice(shards, n_shards, replace=False))
        rows = np.concatenate([np.arange(self.edges[s], self.edges[s + 1]) for s in shards])
        return self.read(rows if n >= len(rows) else np.sort(rng.choice(rows, n, replace=False)))

    def _repr_html_(self) -> str:
        from html import escape

        return (
            f"<b>{len(self):,}</b> activations of width {self.d_model} at "
            f"<code>{escape(self.meta['hook'])}</code> of {escape(self.meta['model']['name'])}"
        )


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a complete store. Raises as :meth:`ActivationStore.open`."""
    return _read(folder).value


def remedy_for(folder: Path) -> str:
    """What brings a damaged store back."""
    return (
        f"delete {folder} and run the same 'featureinterp extract' (or train, or merge) again, which "
        "writes it anew"
    )


def _read(folder: Path) -> Marker:
    path = folder / METADATA
    if not path.exists():
        if (folder / "train" / METADATA).exists():
            raise UnknownNameError(
                f"{folder} holds several stores: name one of them, such as {folder / 'train'}"
            )
        if shard_path(folder, 0).exists():
            again = "run the same 'featureinterp extract' again"
            raise IncompleteStoreError(
                f"the store {folder} was never finished ({METADATA} is missing): {again}"
            )
        raise UnknownNameError(
            f"there is no activation store in {folder}: make one with 'featureinterp extract'"
        )
    marker = read_marker(path, remedy_for(folder))
    meta = marker.value
    with described(path, remedy_for(folder)):
        counts = [meta["n_rows"], meta["d_model"], *meta["shards"]]
        whole = all(type(n) is int and n >= 0 for n in counts)
        good = (
            whole
            and meta["format"] == FORMAT
            and meta["n_rows"] == sum(meta["shards"])
            and meta["d_model"] > 0
        )
        dtype = str(meta["dtype"])
    if dtype not in DTYPES:
        only = f"it must be {' or '.join(DTYPES)}; cast it when it is written"
        raise IncompatibleError(f"the store {folder} has dtype {dtype!r}: {only}")
    if not good:
        raise IncompleteStoreError(
            f"{path} contradicts itself or is of another version: extract the store again"
        )
    return marker


def _not_negative(values: np.ndarray) -> bool:
    return int(values.min()) >= 0


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05}.bin"


class StoreWriter:
    """Appends rows to preallocated shards. The owner of the writer keeps how many rows were on disk after a
    :meth:`sync`, and the :attr:`sums` of them, and passes both to go on from there; sums that are not passed
    are those of the files."""

    def __init__(
        self,
        folder: Path,
        d_model: int,
        dtype: str,
        *,
        n_rows: int = 0,
        shard_rows: int | None = None,
        sums: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"activations cannot be stored as {dtype!r}: choose {' or '.join(DTYPES)}")
        self.folder, self.d_model, self.dtype = folder, d_model, np.dtype(DTYPES[dtype])
        self.shard_rows = shard_rows or max(1, SHARD_BYTES // (d_model * self.dtype.itemsize))
        self.n_rows = n_rows
        with explained_storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._sides = {name: (folder / f"{name}.bin").open("r+b" if n_rows else "wb") for name in SIDES}
            for file in self._sides.values():
                file.seek(4 * n_rows)
            sizes = dict.fromkeys(SIDES, 4 * n_rows) | {"shard": n_rows % self.shard_rows * self._row}
            held = {
                **{name: folder / f"{name}.bin" for name in SIDES},
                "shard": shard_path(folder, n_rows // self.shard_rows),
            }
            if sums is None:
                self._sums = {name: Sums.of(held[name], SHARD_BLOCK, size) for name, size in sizes.items()}
            else:
                with described(folder, remedy_for(folder)):
                    self._sums = {name: Sums.from_json(sums[name]) for name in sizes}
            if any(self._sums[name].size != size for name, size in sizes.items()):
                raise IncompleteStoreError(
                    f"{folder} has not the rows that its state counts: {remedy_for(folder)}"
                )
        self._shard: IO[bytes] | None = None

    def append(self, rows: Float[np.ndarray, "row d_model"], **sides: Int32[np.ndarray, " row"]) -> None:
        """``rows``, and the arrays of ``SIDES``. Raises ``FeatureInterpError``
        for a value that the dtype cannot hold.
        """
        with np.errstate(over="ignore"):
            kept = np.asarray(rows).astype(self.dtype)
        if not np.isfinite(kept).all():
            raise FeatureInterpError(
                "an activation does not fit float16: store them as float32 (store.dtype of a recipe, "
                "--store-dtype of extract)"
            )
        if self.dtype == np.float16 and len(kept) and 0 < float(np.abs(rows).max()) < SMALLEST_NORMAL:
            raise FeatureInterpError(
                f"the activations are so small (at most {float(np.abs(rows).max()):.3g}) that float16 would "
                "round them to few values: store them as float32 (store.dtype of a recipe, --store-dtype of "
                "extract)"
            )
        done = 0
        with explained_storage(self.folder):
            while done < len(kept):
                number, start = divmod(self.n_rows, self.shard_rows)
                if self._shard is None or start == 0:
                    self._shard = self._open(number, start)
                n = min(self.shard_rows - start, len(kept) - done)
                self._put("shard", self._shard, kept[done : done + n])
                done += n
                self.n_rows += n
                if self.n_rows % self.shard_rows == 0:
                    write_marker(_sums_path(self.folder, number), self._sums["shard"].to_json())
                    self._sums["shard"] = Sums(SHARD_BLOCK)
            for name, file in self._sides.items():
                self._put(name, file, np.asarray(sides[name], np.int32))

    def _put(self, name: str, file: IO[bytes], array: np.ndarray) -> None:
        data = array.tobytes()
        file.write(data)
        self._sums[name].add(data)

    @property
    def sums(self) -> dict[str, Any]:
        """The checksums of the rows so far, without those of shards that are full: to go on from."""
        return {name: sums.to_json() for name, sums in self._sums.items()}

    @property
    def _row(self) -> int:
        return self.d_model * self.dtype.itemsize

    def _open(self, number: int, start: int) -> IO[bytes]:
        """The shard's file at its full length, its space reserved, so that a full disk shows now; at the row
        ``start`` of it.
        """
        self._close()
        path, row = shard_path(self.folder, number), self._row
        file = path.open("r+b" if path.exists() else "wb")
        try:
            os.posix_fallocate(file.fileno(), 0, self.shard_rows * row)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                file.close()
                raise
            file.truncate(self.shard_rows * row)
        file.seek(start * row)
        return file

    def _close(self) -> None:
        if self._shard is not None:
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
            self._shard = None

    def flush(self) -> None:
        """All rows so far are with the system."""
        with explained_storage(self.folder):
            for file in (self._shard, *self._sides.values()):
                if file is not None:
                    file.flush()

    def sync(self) -> None:
        """All rows that were flushed are on disk. Another thread may append meanwhile."""
        with explained_storage(self.folder):
            for file in (self._shard, *self._sides.values()):
                if file is not None:
                    with suppress(ValueError):  # it was closed meanwhile, and synced then
                        os.fsync(file.fileno())

    def finish(self, meta: Mapping[str, Any]) -> ActivationStore:
        """Cuts the last shard to its rows and writes the metadata."""
        with explained_storage(self.folder):
            self._close()
        n_shards = -(-self.n_rows // self.shard_rows)
        sizes = [min(self.shard_rows, self.n_rows - i * self.shard_rows) for i in range(n_shards)]
        with explained_storage(self.folder):
            for file in self._sides.values():
                file.truncate(4 * self.n_rows)
                file.close()
            if sizes:
                os.truncate(shard_path(self.folder, n_shards - 1), sizes[-1] * self._row)
            with suppress(FileNotFoundError):  # one that was begun before a crash
                shard_path(self.folder, n_shards).unlink()
        about = {"n_rows": self.n_rows, "d_model": self.d_model, "dtype": self.dtype.name, "shards": sizes}
        write_marker(self.folder / METADATA, {"format": FORMAT, **about, **meta}, self._all_sums(n_shards))
        for path in self.folder.glob("shard-*.sums"):
            path.unlink()
        return ActivationStore.open(self.folder)

    def _all_sums(self, n_shards: int) -> dict[str, Sums]:
        """Those of every file. A full shard of an earlier version's unfinished store has none yet."""
        found = {f"{name}.bin": self._sums[name] for name in SIDES}
        for number in range(n_shards):
            path, sums = shard_path(self.folder, number), _sums_path(self.folder, number)
            if number == n_shards - 1 and self._sums["shard"].size:
                found[path.name] = self._sums["shard"]
            elif sums.exists():
                with described(sums, remedy_for(self.folder)):
                    found[path.name] = Sums.from_json(read_marker(sums, remedy_for(self.folder)).value)
            else:
                found[path.name] = Sums.of(path, SHARD_BLOCK)
        return found


def _sums_path(folder: Path, number: int) -> Path:
    return shard_path(folder, number).with_suffix(".sums")


def store_key(meta: Mapping[str, Any]) -> str:
    """A hash of what a store's rows are."""
    return content_key({name: meta[name] for name in ("source", "split", "part", "dtype")})
