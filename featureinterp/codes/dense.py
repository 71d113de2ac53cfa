"""The dense twin of a run's codes: the activations that the SAE read, for the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featureinterp.codes.collect import BATCH_TOKENS, Progress, batches_of, check_subject, positions_of, residual_of
from featureinterp.codes.store import CodesStore
from featureinterp.files import explained_storage, write_json
from featureinterp.subject.load import Subject

_MARK = "dense.json"


def dense_twin(store: CodesStore, run: Path, load: Callable[[], Subject], *, batch_tokens: int = BATCH_TOKENS, progress: Progress | None = None) -> np.ndarray:
    """The activations at the SAE's hook of every scored token of a run: float32 ``[token, d_model]``, memory-mapped.

    They are kept in ``run/dense``; what is there of the same codes is used, and what is unfinished is gone on with. ``load`` is called only when something is
    missing. Raises ``IncompatibleError`` when the subject is not the run's.
    """
    folder, n = run / "dense", len(store.scored_positions)
    mark, path = folder / _MARK, folder / "activations.bin"
    state = {"codes": store.fingerprint, "width": 0, "next_window": 0}
    if mark.exists() and path.exists() and (found := json.loads(mark.read_text()))["codes"] == store.fingerprint:
        state = found
    if state["next_window"] < len(store.windows):
        subject = load()
        check_subject(store, subject)
        state["width"] = subject.d_model
        with explained_storage(path):
            folder.mkdir(parents=True, exist_ok=True)
            mode = "r+" if path.exists() and state["next_window"] else "w+"
            out = np.memmap(path, np.float32, mode, shape=(n, subject.d_model))
            done = int(np.sum(store.windows.lengths[: state["next_window"]]))
            for length, rows, end in batches_of(store.windows, state["next_window"], batch_tokens):
                places = store.row_of_position[positions_of(store.windows, rows, length)]
                values = residual_of(subject, store.meta["sae"]["hook"], store.windows, rows, length).float().cpu().numpy()
                out[places[places >= 0]] = values[places >= 0]
                done += length * len(rows)
                if end != state["next_window"]:
                    out.flush()
                    state["next_window"] = end
                    write_json(mark, state)
                if progress:
                    progress(done, store.windows.n_tokens)
            del out
    return np.asarray(np.memmap(path, np.float32, "r", shape=(n, int(state["width"]))))
