"""One pass of a subject model and an SAE over a corpus, into a codes store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.codes.store import CodesStore, RunWriter
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.errors import FeatureInterpError, IncompatibleError, InputError
from featureinterp.files import content_key, write_json
from featureinterp.sae.codes import SparseCodes
from featureinterp.sae.load import LoadedSae
from featureinterp.sae.names import names_of_model
from featureinterp.subject.load import PrependToken, SkipFirst, Subject

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

BATCH_TOKENS = 2048
CHUNK_TOKENS = 16_384
SINK_FACTOR = 10.0


def check_fit(subject: Subject, sae: LoadedSae) -> None:
    """Raises ``UnknownNameError`` when the model lacks the SAE's hook and ``IncompatibleError`` when the widths differ, or when the model has another name
    than the one that the SAE was made for. A model from a folder may have any name."""
    if sae.sae.d_in != subject.d_model or not (Path(subject.name).is_dir() or Path(sae.model).is_dir() or _same_model(sae.model, subject.name)):
        fitting = names_of_model(subject.name)
        choose = f"choose an SAE of this model, such as {fitting[0]}" if fitting else "choose an SAE of this model"
        raise IncompatibleError(
            f"the SAE {sae.name} takes activations of width {sae.sae.d_in} (made for {sae.model}), but {subject.name} has width {subject.d_model}: {choose}"
        )
    subject.check_hook(sae.hook)


def collect(
    subject: Subject,
    sae: LoadedSae,
    corpus: Corpus,
    run: Path,
    policy: WindowPolicy,
    *,
    value_dtype: str = "float16",
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> CodesStore:
    """Runs the model up to the SAE's hook over the corpus's windows and stores every positive code in ``run``.

    A complete store for the same request is reused; an unfinished one is gone on with; one for another request is refused
    with ``IncompatibleError``. Memory does not grow with the corpus. Position 0 (the attention sink) is never scored.
    """
    if value_dtype not in ("float16", "float32"):
        raise InputError(f"codes cannot be stored as {value_dtype!r}: choose float16 or float32")
    check_fit(subject, sae)
    _check_owner(run, subject, sae)
    windows = build_windows(corpus, subject.encoder, policy, run / "windows")
    provenance = {
        "model": {"name": subject.name, "fingerprint": subject.fingerprint, "dtype": str(subject.dtype).removeprefix("torch.")},
        "sae": {"name": sae.name, "fingerprint": sae.fingerprint, "hook": sae.hook, "architecture": sae.sae.architecture},
        "corpus": {"name": corpus.name, "windows": windows.fingerprint},
        "mask": _mask(subject),
    }
    key = content_key({**provenance, "value_dtype": value_dtype})
    folder = run / "codes"
    if (folder / "codes.json").exists():
        if json.loads((folder / "codes.json").read_text())["key"] == key:
            return CodesStore.open(run)
        shutil.rmtree(folder)
    claim = folder / "collecting.json"
    if folder.exists() and (not claim.exists() or json.loads(claim.read_text()) != {"key": key}):
        shutil.rmtree(folder)
    write_json(claim, {"key": key})
    writer = RunWriter(folder, n_features=sae.n_features, n_positions=len(windows) * windows.length, value_dtype=value_dtype)
    done = int(np.sum(windows.lengths[: writer.next_window]))
    for batch in _encode_all(subject, sae, windows, writer.next_window, batch_tokens):
        positions, codes, n_scored, end_window = batch
        writer.add(
            positions,
            codes.features.cpu().numpy(),
            codes.values.float().cpu().numpy(),
            n_scored=n_scored,
            end_window=end_window,
        )
        done += codes.n_rows
        if progress:
            progress(min(done, windows.n_tokens), windows.n_tokens)
    if progress:
        progress(windows.n_tokens, windows.n_tokens)
    writer.finish({"key": key, **provenance, "window_length": windows.length})
    claim.unlink()
    return CodesStore.open(run)


def check_sae(store: CodesStore, sae: LoadedSae) -> None:
    """Raises ``IncompatibleError`` when ``sae`` is not the one that made the store's codes."""
    if store.meta["sae"]["fingerprint"] != sae.fingerprint:
        raise IncompatibleError(f"the run's codes were made with another SAE than {sae.name!r} is: give the one that it names, {store.meta['sae']['name']!r}")


def _same_model(one: str, other: str) -> bool:
    """Names of a hub, with or without their owner."""
    return one.rsplit("/", 1)[-1].lower() == other.rsplit("/", 1)[-1].lower()


def _check_owner(run: Path, subject: Subject, sae: LoadedSae) -> None:
    """Refuses to replace finished codes of another model or SAE."""
    done = run / "codes" / "codes.json"
    if not done.exists():
        return
    meta = json.loads(done.read_text())
    for what, ours, theirs in (("SAE", sae.fingerprint, meta["sae"]), ("model", subject.fingerprint, meta["model"])):
        if ours != theirs["fingerprint"]:
            raise IncompatibleError(f"{run} holds codes made with another {what} ({theirs['name']}): collect into another folder, or delete this one")


def _mask(subject: Subject) -> dict[str, Any]:
    match subject.sink:
        case PrependToken(token_id):
            return {"first": "bos", "token_id": token_id, "sink_factor": SINK_FACTOR}
        case SkipFirst():
            return {"first": "skipped", "sink_factor": SINK_FACTOR}


def _encode_all(subject: Subject, sae: LoadedSae, windows: WindowTable, first: int, batch_tokens: int) -> Iterator[tuple[np.ndarray, SparseCodes, int, int]]:
    """Batches of windows of one length, as (positions of the codes, codes, tokens scored, end of the finished windows)."""
    rows_at_once = max(1, batch_tokens // windows.length)
    chunk_rows = max(rows_at_once, CHUNK_TOKENS // windows.length // rows_at_once * rows_at_once)
    for start in range(first, len(windows), chunk_rows):
        end = min(start + chunk_rows, len(windows))
        lengths = np.asarray(windows.lengths[start:end])
        batches = []
        for length in np.unique(lengths)[::-1]:
            rows = start + np.flatnonzero(lengths == length)
            batches += [(int(length), rows[i : i + rows_at_once]) for i in range(0, len(rows), rows_at_once)]
        for number, (length, rows) in enumerate(batches, 1):
            positions, codes, scored = encode_windows(subject, sae, windows, rows, length)
            yield positions, codes, scored, end if number == len(batches) else start


@torch.inference_mode()
def encode_windows(subject: Subject, sae: LoadedSae, windows: WindowTable, rows: np.ndarray, length: int) -> tuple[np.ndarray, SparseCodes, int]:
    """Codes of windows of one length: (position of every code, codes, number of tokens scored)."""
    ids = torch.from_numpy(np.array(windows.tokens[rows, :length], np.int64))
    residual = subject.residual(ids, sae.hook)
    scored = scored_tokens(residual, subject)
    codes = sae.sae.encode(residual[scored])
    window, offset = (part.cpu().numpy() for part in torch.nonzero(scored, as_tuple=True))
    token = codes.rows.cpu().numpy()
    return rows[window[token]] * windows.length + offset[token], codes, len(window)


def scored_tokens(residual: torch.Tensor, subject: Subject) -> torch.Tensor:
    """Which tokens of ``residual [window, token, d_model]`` are scored, bool ``[window, token]``.

    Not scored: position 0 of a model without BOS, and attention sinks further on, whose norm exceeds ``SINK_FACTOR`` times the
    median of their window and who would stand at the top of every feature.
    """
    norms = residual.float().norm(dim=-1)
    if not bool(torch.isfinite(norms).all()):
        raise FeatureInterpError(f"{subject.name} gives activations that are not finite: run it with --dtype float32 or bfloat16")
    return scored_by_norm(norms, subject)


def scored_by_norm(norms: torch.Tensor, subject: Subject) -> torch.Tensor:
    """The same from the residuals' norms ``[window, token]``."""
    scored = norms <= SINK_FACTOR * norms.median(dim=1, keepdim=True).values
    if isinstance(subject.sink, SkipFirst):
        scored[:, 0] = False
    return scored
