"""Activations on disk: shards of one plain 2-D array each, and for every row the token that it belongs to.

``shard-00000.bin`` …: ``[row, d_model]`` in the store's dtype (float16 or float32); ``documents.bin``, ``windows.bin``, ``offsets.bin``, ``tokens.bin``: int32
``[row]``, the row's document, window, place in the window and token id; ``metadata.json`` is written last and marks the store complete. It holds the numbers
of rows and shards, what the rows depend on (model, hook, corpus, tokenizer, mask), and how many tokens were left out, by cause.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from featureinterp.errors import FeatureInterpError, IncompatibleError, IncompleteStoreError, InputError, UnknownNameError
from featureinterp.files import content_key, explained_storage, write_json

FORMAT = 1
METADATA = "metadata.json"
SHARD_BYTES = 64 * 2**20
SIDES = ("documents", "windows", "offsets", "tokens")
DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A complete store, memory-mapped. ``shards``: arrays ``[row, d_model]``; ``documents``, ``windows``, ``offsets``, ``tokens``: int32 ``[row]``."""

    folder: Path
    meta: dict[str, Any]
    shards: tuple[np.ndarray, ...]
    documents: np.ndarray
    windows: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Raises ``UnknownNameError`` when there is no store, and ``IncompleteStoreError`` when its writing never finished or a file is not as long as it must
        be."""
        folder = Path(folder)
        meta = read_metadata(folder)
        n, width, dtype = meta["n_rows"], meta["d_model"], DTYPES[meta["dtype"]]
        with explained_storage(folder):
            shards = tuple(_mapped(shard_path(folder, i), dtype, (rows, width)) for i, rows in enumerate(meta["shards"]))
            sides = {name: _mapped(folder / f"{name}.bin", np.int32, (n,)) for name in SIDES}
        return cls(folder, meta, shards, **sides)

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

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The given rows in their order, float32 ``[row, d_model]``. Raises ``FeatureInterpError`` when a value is not finite."""
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), self.d_model), np.float32)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], self.edges)
        for shard, (a, b) in enumerate(pairwise(cuts)):
            if b > a:
                out[order[a:b]] = self.shards[shard][rows[order[a:b]] - self.edges[shard]]
        check_finite(out, self.folder)
        return out

    def blocks(self, rows: int = 8192) -> Iterator[np.ndarray]:
        """All rows in their order, float32, in pieces."""
        for start in range(0, len(self), rows):
            yield self.read(np.arange(start, min(start + rows, len(self))))

    def sample(self, n: int, *, seed: int = 0, n_shards: int | None = None) -> np.ndarray:
        """``n`` rows drawn evenly from up to ``n_shards`` shards (all when None), float32; all rows when there are fewer."""
        rng = np.random.default_rng([seed, 1])
        shards = np.arange(len(self.shards))
        if n_shards is not None and n_shards < len(shards):
            shards = np.sort(rng.choice(shards, n_shards, replace=False))
        rows = np.concatenate([np.arange(self.edges[s], self.edges[s + 1]) for s in shards])
        return self.read(rows if n >= len(rows) else np.sort(rng.choice(rows, n, replace=False)))

    def _repr_html_(self) -> str:
        from html import escape

        return f"<b>{len(self):,}</b> activations of width {self.d_model} at <code>{escape(self.meta['hook'])}</code> of {escape(self.meta['model']['name'])}"


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a complete store. Raises as :meth:`ActivationStore.open`."""
    path = folder / METADATA
    if not path.exists():
        if (folder / "train" / METADATA).exists():
            raise UnknownNameError(f"{folder} holds several stores: name one of them, such as {folder / 'train'}")
        if shard_path(folder, 0).exists():
            raise IncompleteStoreError(f"the store {folder} was never finished ({METADATA} is missing): run the same 'featureinterp extract' again")
        raise UnknownNameError(f"there is no activation store in {folder}: make one with 'featureinterp extract'")
    with explained_storage(path):
        text = path.read_text(encoding="utf-8")
    try:
        meta = json.loads(text)
        good = meta["format"] == FORMAT and meta["n_rows"] == sum(meta["shards"]) and meta["d_model"] > 0
    except (ValueError, KeyError, TypeError) as error:
        raise IncompleteStoreError(f"{path} cannot be read ({error}): extract the store again") from error
    if meta["dtype"] not in DTYPES:
        raise IncompatibleError(f"the store {folder} has dtype {meta['dtype']!r}: it must be {' or '.join(DTYPES)}; cast it when it is written")
    if not good:
        raise IncompleteStoreError(f"{path} contradicts itself or is of another version: extract the store again")
    return dict(meta)


def check_finite(rows: np.ndarray, folder: Path) -> None:
    """Raises ``FeatureInterpError`` when a value of a store's rows is not finite."""
    if not np.isfinite(rows).all():
        raise FeatureInterpError(f"{folder} holds activations that are not finite: extract it again, with a model in float32 or bfloat16")


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05}.bin"


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.exists():
        raise IncompleteStoreError(f"{path} is missing: extract or merge the store again")
    if (size := path.stat().st_size) != wanted:
        raise IncompleteStoreError(f"{path} has {size:,} bytes instead of the {wanted:,} that {METADATA} declares: extract or merge the store again")
    return np.asarray(np.memmap(path, dtype, "r", shape=shape)) if wanted else np.empty(shape, dtype)


class StoreWriter:
    """Appends rows to preallocated shards. The owner of the writer keeps how many rows were on disk after a :meth:`sync`, and passes ``n_rows`` to go on from
    there."""

    def __init__(self, folder: Path, d_model: int, dtype: str, *, n_rows: int = 0, shard_rows: int | None = None) -> None:
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
        self._shard: IO[bytes] | None = None

    def append(self, rows: np.ndarray, **sides: np.ndarray) -> None:
        """``rows`` ``[row, d_model]``, and the arrays of ``SIDES`` ``[row]``. Raises ``FeatureInterpError`` for a value that the dtype cannot hold."""
        with np.errstate(over="ignore"):
            kept = np.asarray(rows).astype(self.dtype)
        if not np.isfinite(kept).all():
            raise FeatureInterpError("an activation does not fit float16: store them as float32 (store.dtype of a recipe, --store-dtype of extract)")
        done = 0
        with explained_storage(self.folder):
            while done < len(kept):
                number, start = divmod(self.n_rows, self.shard_rows)
                if self._shard is None or start == 0:
                    self._shard = self._open(number, start)
                n = min(self.shard_rows - start, len(kept) - done)
                self._shard.write(kept[done : done + n].tobytes())
                done += n
                self.n_rows += n
            for name, file in self._sides.items():
                file.write(np.ascontiguousarray(sides[name], np.int32).tobytes())

    def _open(self, number: int, start: int) -> IO[bytes]:
        """The shard's file at its full length, its space reserved, so that a full disk shows now; at the row ``start`` of it."""
        self._close()
        path, row = shard_path(self.folder, number), self.d_model * self.dtype.itemsize
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
                os.truncate(shard_path(self.folder, n_shards - 1), sizes[-1] * self.d_model * self.dtype.itemsize)
            with suppress(FileNotFoundError):  # one that was begun before a crash
                shard_path(self.folder, n_shards).unlink()
        write_json(
            self.folder / METADATA, {"format": FORMAT, "n_rows": self.n_rows, "d_model": self.d_model, "dtype": self.dtype.name, "shards": sizes, **meta}
        )
        return ActivationStore.open(self.folder)


def merge_stores(folders: Sequence[Path], out: Path) -> ActivationStore:
    """One store of the parts that several workers wrote (``meta["part"]``: which of how many), in the order of the parts. Shards are linked where the file
    system can, else copied.

    Raises ``IncompleteStoreError`` for a part that is missing or was never finished, and ``IncompatibleError`` for parts of different extractions.
    """
    stores = [ActivationStore.open(f) for f in folders]
    if not stores:
        raise InputError("there are no stores to merge: name the folders that the workers wrote")
    stores.sort(key=lambda s: s.meta["part"]["number"])
    first = stores[0].meta
    for store in stores:
        if any(store.meta[name] != first[name] for name in ("source", "split", "dtype")) or store.meta["part"]["of"] != first["part"]["of"]:
            raise IncompatibleError(f"{store.folder} and {stores[0].folder} come from different extractions: merge the parts of one")
    numbers = [s.meta["part"]["number"] for s in stores]
    of = first["part"]["of"]
    missing = sorted(set(range(of)) - set(numbers))
    if missing:
        raise IncompleteStoreError(f"part {missing[0]} of {of} is missing: name the store of every worker, those are {', '.join(map(str, range(of)))}")
    if len(numbers) != of:
        raise InputError(f"part {next(n for n in numbers if numbers.count(n) > 1)} is named twice: name the store of every worker once")
    if (out / METADATA).exists():
        raise InputError(f"{out} holds a store already: merge into another folder")
    with explained_storage(out):
        out.mkdir(parents=True, exist_ok=True)
        shards = [(shard_path(s.folder, i), rows) for s in stores for i, rows in enumerate(s.meta["shards"])]
        for number, (path, _) in enumerate(shards):
            target = shard_path(out, number)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        for name in SIDES:
            with (out / f"{name}.bin").open("wb") as file:
                for store in stores:
                    getattr(store, name).tofile(file)
    counts = {name: sum(s.meta["counts"][name] for s in stores) for name in first["counts"]}
    meta = {**first, "part": {"number": 0, "of": 1, "merged": of}, "counts": counts, "n_rows": sum(map(len, stores)), "shards": [rows for _, rows in shards]}
    write_json(out / METADATA, {**meta, "key": store_key(meta)})
    return ActivationStore.open(out)


def store_key(meta: Mapping[str, Any]) -> str:
    """A hash of what a store's rows are."""
    return content_key({name: meta[name] for name in ("source", "split", "part", "dtype")})
