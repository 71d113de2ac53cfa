"""One store from those of several workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featureinterp.errors import IncompatibleError, IncompleteStoreError, InputError
from featureinterp.files import explained_storage
from featureinterp.stored.sums import SummedFile, Sums, write_marker
from featureinterp.training.store import (
    METADATA,
    SHARD_BLOCK,
    SIDES,
    ActivationStore,
    shard_path,
    store_key,
)


def merge_stores(folders: Sequence[Path], out: Path) -> ActivationStore:
    """One store of the parts that several workers wrote (``meta["part"]``: which of how many), in the order
    of the parts. Shards are linked where the file system can, else copied.

    Raises ``IncompleteStoreError`` for a part that is missing or was never finished, and
    ``IncompatibleError`` for parts of different extractions.
    """
    stores = [ActivationStore.open(f) for f in folders]
    if not stores:
        raise InputError("there are no stores to merge: name the folders that the workers wrote")
    stores.sort(key=lambda s: s.meta["part"]["number"])
    first = stores[0].meta
    for store in stores:
        if (
            any(store.meta[name] != first[name] for name in ("source", "split", "dtype"))
            or store.meta["part"]["of"] != first["part"]["of"]
        ):
            raise IncompatibleError(
                f"{store.folder} and {stores[0].folder} come from different extractions: merge the parts "
                "of one"
            )
    numbers = [s.meta["part"]["number"] for s in stores]
    of = first["part"]["of"]
    missing = sorted(set(range(of)) - set(numbers))
    if missing:
        raise IncompleteStoreError(
            f"part {missing[0]} of {of} is missing: name the store of every worker, those are "
            f"{', '.join(map(str, range(of)))}"
        )
    if len(numbers) != of:
        raise InputError(
            f"part {next(n for n in numbers if numbers.count(n) > 1)} is named twice: name the store of "
            "every worker once"
        )
    if (out / METADATA).exists():
        raise InputError(f"{out} holds a store already: merge into another folder")
    with explained_storage(out):
        out.mkdir(parents=True, exist_ok=True)
        shards = [
            (s, shard_path(s.folder, i), rows) for s in stores for i, rows in enumerate(s.meta["shards"])
        ]
        files = {}
        for number, (store, path, _) in enumerate(shards):
            target = shard_path(out, number)
            files[target.name] = Sums.of(path, SHARD_BLOCK) if store.files is None else store.files[path.name]
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        for name in SIDES:
            with (out / f"{name}.bin").open("wb") as file:
                side = SummedFile(file, Sums(SHARD_BLOCK))
                for store in stores:
                    side.write(np.asarray(getattr(store, name)).tobytes())
            files[f"{name}.bin"] = side.sums
    counts = {name: sum(s.meta["counts"][name] for s in stores) for name in first["counts"]}
    meta = {
        **first,
        "part": {"number": 0, "of": 1, "merged": of},
        "counts": counts,
        "n_rows": sum(map(len, stores)),
        "shards": [rows for *_, rows in shards],
    }
    write_marker(out / METADATA, {**meta, "key": store_key(meta)}, files)
    return ActivationStore.open(out)
