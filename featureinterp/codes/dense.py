"""The dense twin of a run's codes: the activations that the SAE read, for the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from featureinterp.codes.collect import Progress, check_subject, positions_of
from featureinterp.codes.store import CodesStore
from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.machine.accelerator import to_host
from featureinterp.stored.arrays import mapped
from featureinterp.stored.sums import Sums, block_for, described, read_marker, write_marker
from featureinterp.subject.load import Subject
from featureinterp.subject.reading import BATCH_TOKENS, read_windows

_MARK = "dense.json"


def dense_twin(
    store: CodesStore,
    run: Path,
    load: Callable[[], Subject],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Float32[np.ndarray, "token d_model"]:
    """The activations at the SAE's hook of every scored token of a run, memory-mapped.

    They are kept in ``run/dense``; what is there of the same codes is used, and what is unfinished is gone on
    with. ``load`` is called only when something is missing. Raises ``IncompatibleError`` when the subject is
    not the run's, and ``DamagedStoreError`` where what is read is not what was written.
    """
    folder, n = run / "dense", len(store.scored_positions)
    mark, path = folder / _MARK, folder / "activations.bin"
    remedy = f"delete {folder} and run the same 'featureinterp probe' again, which reads the tokens anew"
    state: dict[str, Any] = {"codes": store.fingerprint, "width": 0, "next_window": 0}
    sums: Sums | None = Sums(block_for(n * 4096))
    if (
        mark.exists()
        and path.exists()
        and (found := read_marker(mark, remedy)).value.get("codes") == store.fingerprint
    ):
        state, sums = found.value, None if found.files is None else found.files.get(path.name)
        _check_state(state, mark, remedy)
    if state["next_window"] < len(store.windows):
        subject = load()
        check_subject(store, subject)
        state["width"] = subject.d_model
        rows_before = store.scored_positions.searchsorted
        sums = sums or Sums.of(
            path, size=rows_before(state["next_window"] * store.windows.length) * subject.d_model * 4
        )
        with explained_storage(path):
            folder.mkdir(parents=True, exist_ok=True)
            mode: Literal["r+", "w+"] = "r+" if path.exists() and state["next_window"] else "w+"
            out = np.memmap(path, np.float32, mode, shape=(n, subject.d_model))
            done = int(np.sum(store.windows.lengths[: state["next_window"]]))
            for batch, values in read_windows(
                subject,
                [store.meta["sae"]["hook"]],
                store.windows,
                lambda _, found: to_host(found[0].float())[0],
                first=state["next_window"],
                batch_tokens=batch_tokens,
            ):
                places = store.row_of_position[positions_of(store.windows, batch.rows, batch.length)]
                out[places[places >= 0]] = values[places >= 0]
                done += batch.n_tokens
                if batch.through is not None:
                    out.flush()
                    edges = (
                        rows_before(w * store.windows.length) for w in (state["next_window"], batch.through)
                    )
                    sums.add(np.asarray(out[slice(*edges)]).data)
                    state["next_window"] = batch.through
                    write_marker(mark, state, {path.name: sums})
                if progress:
                    progress(done, store.windows.n_tokens)
            del out
    files = None if sums is None else {path.name: sums}
    return mapped(path, np.float32, (n, int(state["width"])), files, _MARK, remedy, _finite)


def check_dense(run: Path, store: CodesStore) -> None:
    """Raises ``IncompatibleError`` when a run's dense twin is of other codes."""
    mark, remedy = run / "dense" / _MARK, f"delete {run / 'dense'} and run 'featureinterp probe' again"
    if mark.exists() and read_marker(mark, remedy).value.get("codes") != store.fingerprint:
        raise IncompatibleError(f"{run / 'dense'} is of other codes than {run / 'codes'}: {remedy}")


def _check_state(state: Mapping[str, Any], mark: Path, remedy: str) -> None:
    with described(mark, remedy):
        if any(type(state[name]) is not int or state[name] < 0 for name in ("width", "next_window")):
            raise ValueError("a count is no whole number of at least 0")


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())
