"""One pass of a subject model and an SAE over a corpus, into a codes store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from featureinterp.claims import CODES, check_free, claim, owned
from featureinterp.codes.fit import check_fit
from featureinterp.codes.runs import RunWriter
from featureinterp.codes.store import MARKER, CodesStore, remedy_for
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.windows import (
    WindowPolicy,
    WindowTable,
    build_windows,
    check_documents,
    copy_windows,
)
from featureinterp.domain.record import SPLITS
from featureinterp.errors import FeatureInterpError, IncompatibleError, InputError
from featureinterp.files import content_key
from featureinterp.machine import DTYPES, choice
from featureinterp.machine.accelerator import to_device, to_host
from featureinterp.sae.load import LoadedSae
from featureinterp.stored.sums import read_marker
from featureinterp.subject.load import (
    PrependToken,
    SkipFirst,
    Subject,
    check_same_model,
    weights_fingerprint,
)
from featureinterp.subject.reading import BATCH_TOKENS, Batch, read_windows

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

MANY_TOKENS = 5000
"""A text of so many tokens should have documents for every split."""
SINK_FACTOR = 10.0


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
    replace: bool = False,
) -> CodesStore:
    """Runs the model up to the SAE's hook over the corpus's windows and stores every positive code in
    ``run``.

    A complete store for the same request is reused; an unfinished one is gone on with; one for another
    request is refused with ``IncompatibleError``, or with ``replace`` deleted. Memory does not grow with the
    corpus. Position 0 (the attention sink) is never scored. Raises ``FolderInUseError`` when another process
    works in ``run``.
    """
    options: dict[str, Any] = {
        "value_dtype": value_dtype,
        "batch_tokens": batch_tokens,
        "progress": progress,
        "replace": replace,
    }
    return collect_shared(subject, [(sae, run)], corpus, policy, n_splits=len(SPLITS), **options)[0]


def collect_shared(
    subject: Subject,
    targets: Sequence[tuple[LoadedSae, Path]],
    corpus: Corpus,
    policy: WindowPolicy,
    *,
    value_dtype: str = "float16",
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    replace: bool = False,
    n_splits: int = 1,
) -> list[CodesStore]:
    """The same for several SAEs, each into a run folder of its own: the model runs once for all SAEs at one
    hook, and the text is cut once. What is known already is not computed again; SAEs that were interrupted at
    different places are gone on with one after the other. ``n_splits``: a large text of fewer documents is
    refused, since nothing could be held out of it."""
    if value_dtype not in ("float16", "float32"):
        raise InputError(f"codes cannot be stored as {value_dtype!r}: choose float16 or float32")
    for sae, run in targets:
        check_fit(subject, sae)
        check_free(run)
    with ExitStack() as held:
        requests = [request_of(subject, sae, corpus, policy, value_dtype) for sae, _ in targets]
        for (_, run), asked in zip(targets, requests, strict=True):
            held.enter_context(owned(run, "collect"))
            claim(
                run,
                CODES,
                asked,
                about=_names(subject, corpus),
                replace=replace,
                earlier=partial(_earlier, run, asked),
                options={"dtype": "--dtype {}"},
                alike=partial(in_dtype_of, subject),
            )
        windows = build_windows(corpus, subject.encoder, policy, targets[0][1] / "windows")
        check_documents(windows, n_splits, MANY_TOKENS)
        for _, run in targets[1:]:
            copy_windows(windows, run / "windows")
        pairs = zip(targets, requests, strict=True)
        found = [
            _target(subject, sae, run, corpus, windows, value_dtype, asked) for (sae, run), asked in pairs
        ]
        _encode_targets(
            subject, [target for target in found if target is not None], windows, batch_tokens, progress
        )
        return [CodesStore.open(run) for _, run in targets]


def _encode_targets(
    subject: Subject,
    open_targets: Sequence[_Target],
    windows: WindowTable,
    batch_tokens: int,
    progress: Progress | None,
) -> None:
    """Runs the model over the windows that targets lack, and finishes them."""
    groups: dict[tuple[str, int], list[_Target]] = {}
    for target in open_targets:
        groups.setdefault((target.sae.hook, target.writer.next_window), []).append(target)
    total = windows.n_tokens * max(1, len(groups))
    for number, ((_, start), group) in enumerate(groups.items()):
        done, through = windows.n_tokens * number + int(np.sum(windows.lengths[:start])), start

        def encode(
            batch: Batch,
            found: list[torch.Tensor],
            saes: Sequence[LoadedSae] = [target.sae for target in group],
        ) -> Encoded:
            return encode_windows(subject, saes, windows, batch.rows, found[0])

        for batch, (codes, unscored) in read_windows(
            subject, [group[0].sae.hook], windows, encode, first=start, batch_tokens=batch_tokens
        ):
            through = through if batch.through is None else batch.through
            for target, (positions, features, values) in zip(group, codes, strict=True):
                n_scored = batch.n_tokens - len(unscored)
                target.writer.add(
                    positions, features, values, n_scored=n_scored, end_window=through, unscored=unscored
                )
            done += batch.n_tokens
            if progress:
                progress(min(done, total), total)
        for target in group:
            target.writer.finish(target.meta)
    if progress:
        progress(total, total)


@dataclass(frozen=True)
class _Target:
    """An SAE whose codes are being written. ``meta``: what the store will say of itself."""

    sae: LoadedSae
    writer: RunWriter
    meta: dict[str, Any]


def windows_request(corpus: Corpus, subject: Subject, policy: WindowPolicy) -> dict[str, Any]:
    """All that windows depend on."""
    return {"corpus": corpus.fingerprint, "window": asdict(policy), "tokenizer": subject.encoder.fingerprint}


def request_of(
    subject: Subject, sae: LoadedSae, corpus: Corpus, policy: WindowPolicy, value_dtype: str
) -> dict[str, Any]:
    """All that codes depend on, for :func:`featureinterp.claims.claim`."""
    return {
        **windows_request(corpus, subject, policy),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "model": subject.fingerprint,
        "SAE": sae.fingerprint,
        "hook": sae.hook,
        "mask": mask_of(subject),
        "value dtype": value_dtype,
    }


def in_dtype_of(subject: Subject, found: Mapping[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A request with the model of the one that was ``found``, when ``subject`` can be that in its dtype: the
    hash of weights depends on their dtype. Weights that were rounded when they were loaded can be any.
    """
    dtype = DTYPES.get(str(found.get("dtype")))
    if dtype is None or dtype == subject.dtype:
        return wanted
    if subject.dtype == torch.float32 and found.get("model") != weights_fingerprint(subject.model, dtype):
        return wanted
    return {**wanted, "model": found.get("model")}


def _earlier(run: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The request of complete codes that carry its key."""
    marker = run / "codes" / MARKER
    if not marker.exists():
        return None
    key = read_marker(marker, remedy_for(marker.parent)).value.get("key")
    return asked if key == content_key(asked) else None


def _names(subject: Subject, corpus: Corpus) -> dict[str, str]:
    """Names that may change while the codes stay."""
    return {"model": subject.name, "corpus": corpus.name}


def _target(
    subject: Subject,
    sae: LoadedSae,
    run: Path,
    corpus: Corpus,
    windows: WindowTable,
    value_dtype: str,
    asked: dict[str, Any],
) -> _Target | None:
    """Where the codes of an SAE go on; None when they are complete. The folder is claimed for the request
    already.
    """
    folder = run / "codes"
    if (folder / MARKER).exists():
        return None
    model = {"name": subject.name, "fingerprint": subject.fingerprint, "dtype": asked["dtype"]}
    provenance = {
        "model": model,
        "sae": {
            "name": sae.name,
            "fingerprint": sae.fingerprint,
            "hook": sae.hook,
            "architecture": sae.sae.architecture,
        },
        "corpus": {"name": corpus.name, "windows": windows.fingerprint},
        "mask": mask_of(subject),
    }
    n_positions = len(windows) * windows.length
    writer = RunWriter(folder, n_features=sae.n_features, n_positions=n_positions, value_dtype=value_dtype)
    made_on = choice(asked["dtype"], str(subject.device))
    del made_on["why"]  # the dtype is resolved by now, and whoever asked for it is not known here
    return _Target(
        sae,
        writer,
        {"key": content_key(asked), **provenance, "window_length": windows.length, "made_on": made_on},
    )


def check_sae(store: CodesStore, sae: LoadedSae) -> None:
    """Raises ``IncompatibleError`` when ``sae`` is not the one that made the store's codes."""
    if store.meta["sae"]["fingerprint"] != sae.fingerprint:
        raise IncompatibleError(
            f"the run's codes were made with another SAE than {sae.name!r} is, or with an older reading of "
            "its files: "
            f"give the one that it names, {store.meta['sae']['name']!r}, or collect again",
        )


def check_subject(store: CodesStore, subject: Subject) -> None:
    """Raises ``IncompatibleError`` when ``subject`` is not the model that made the store's codes."""
    check_same_model(subject, store.meta["model"], "the run's codes")


def mask_of(subject: Subject) -> dict[str, Any]:
    """Which tokens are not scored, as a store records it."""
    match subject.sink:
        case PrependToken(token_id):
            return {"first": "bos", "token_id": token_id, "sink_factor": SINK_FACTOR}
        case SkipFirst():
            return {"first": "skipped", "sink_factor": SINK_FACTOR}


Encoded = tuple[
    list[
        tuple[Int64[np.ndarray, " nonzero"], Int64[np.ndarray, " nonzero"], Float32[np.ndarray, " nonzero"]]
    ],
    Int64[np.ndarray, " unscored"],
]
"""For each SAE the positions, features and values of the codes; and the positions of the tokens that are not
scored.
"""


@torch.inference_mode()
def encode_windows(
    subject: Subject,
    saes: Sequence[LoadedSae],
    windows: WindowTable,
    rows: Int64[np.ndarray, " window"],
    residual: Float[Tensor, "window token d_model"],
) -> Encoded:
    """The codes of windows of one length by SAEs at one hook, from their ``residual``."""
    scored = scored_on_host(residual, subject)
    place = positions_of(windows, rows, residual.shape[1])
    kept, at = rows_where(residual, scored), place[scored]
    found = []
    for sae in saes:
        codes = sae.sae.encode(kept)
        token, features, values = to_host(codes.rows, codes.features, codes.values.float())
        found.append((at[token], features, values))
    return found, place[~scored]


def rows_where(
    residual: Float[Tensor, "window token d_model"], wanted: Bool[np.ndarray, "window token"]
) -> Float[Tensor, "row d_model"]:
    """The activations of the tokens that are wanted, in order. Their number is known on the host, so that
    nobody waits for a GPU to count them.
    """
    index = to_device(torch.from_numpy(np.flatnonzero(wanted)), residual.device)
    return residual.reshape(-1, residual.shape[-1]).index_select(0, index)


def positions_of(
    windows: WindowTable, rows: Int64[np.ndarray, " window"], length: int
) -> Int64[np.ndarray, "window {length}"]:
    """The positions of the first ``length`` tokens of some windows."""
    return np.asarray(rows[:, None] * windows.length + np.arange(length))


def scored_tokens(
    residual: Float[Tensor, "window token d_model"], subject: Subject
) -> Bool[Tensor, "window token"]:
    """Which tokens of ``residual`` are scored.

    Not scored: position 0 of a model without BOS, and attention sinks further on, whose norm exceeds
    ``SINK_FACTOR`` times the median of their window and who would stand at the top of every feature.
    """
    norms = residual.float().norm(dim=-1)
    check_finite(bool(torch.isfinite(norms).all()), subject)
    return scored_by_norm(norms, subject)


def scored_on_host(
    residual: Float[Tensor, "window token d_model"], subject: Subject
) -> Bool[np.ndarray, "window token"]:
    """The same as an array, with one wait for a GPU."""
    norms = residual.float().norm(dim=-1)
    scored, finite = to_host(scored_by_norm(norms, subject), torch.isfinite(norms).all())
    check_finite(bool(finite), subject)
    return scored


def check_finite(finite: bool, subject: Subject) -> None:
    """Raises ``FeatureInterpError`` when a subject's activations are not ``finite``."""
    if not finite:
        raise FeatureInterpError(
            f"{subject.name} gives activations that are not finite: run it in float32 or bfloat16 "
            "(--dtype, or subject.dtype of a recipe)"
        )


def scored_by_norm(norms: Float[Tensor, "window token"], subject: Subject) -> Bool[Tensor, "window token"]:
    """The same from the residuals' norms."""
    scored = norms <= SINK_FACTOR * norms.median(dim=1, keepdim=True).values
    if isinstance(subject.sink, SkipFirst):
        scored[:, 0] = False
    return scored
