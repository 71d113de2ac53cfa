"""From a corpus to activation stores: one pass of the subject model up to a hook, in bounded memory, gone on
with after an interruption.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.claims import EXTRACTION, claim, owned, reading
from featureinterp.codes.collect import in_dtype_of, mask_of, rows_where, scored_on_host
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows, copy_windows
from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.files import explained_storage
from featureinterp.machine.accelerator import to_host
from featureinterp.probing.splits import split_indices
from featureinterp.stored.sums import described, read_marker, write_marker
from featureinterp.subject.load import Subject
from featureinterp.subject.reading import BATCH_TOKENS, Batch, read_windows
from featureinterp.training.asked import DTYPE_OPTION, merged_request, recorded_request, request_of
from featureinterp.training.merging import merge_stores
from featureinterp.training.store import (
    METADATA,
    TEST,
    TRAIN,
    ActivationStore,
    StoreWriter,
    remedy_for,
    store_key,
)
from featureinterp.validation import check_seed

STATE = "extracting.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """``held_out``: share of the tokens whose documents go into a store of their own, for evaluation (0:
    none). ``dtype``: float16 or float32. ``shuffle``: windows are read in random order, so that every shard
    is a sample of the whole corpus. ``part``, ``parts``: this worker's number, counted from 0, and how many
    there are. ``shard_rows``: rows per shard; 64 MiB of them when None. ``only_held_out``: the training
    documents are left to be read while training."""

    held_out: float = 0.1
    dtype: str = "float16"
    shuffle: bool = True
    shard_rows: int | None = None
    only_held_out: bool = False
    part: int = 0
    parts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise InputError(
                f"a held-out share of {self.held_out:g} is not possible: choose one from 0 to below 1"
            )
        if self.dtype not in ("float16", "float32"):
            raise InputError(
                f"activations cannot be stored as {self.dtype!r} (numpy has no bfloat16): choose float16 "
                "or float32"
            )
        check_seed(self.seed)
        if not 0 <= self.part < self.parts:
            raise InputError(
                f"there is no part {self.part} of {self.parts}: parts are counted from 0 to {self.parts - 1}"
            )
        if self.shard_rows is not None and self.shard_rows < 1:
            raise InputError(f"shards of {self.shard_rows} rows are not possible: give at least 1")


@dataclass(frozen=True)
class Extracted:
    """What an extraction wrote into ``folder``. ``test`` is None when no document was held out, ``train``
    when only those were extracted.
    """

    folder: Path
    windows: WindowTable
    train: ActivationStore | None
    test: ActivationStore | None

    @classmethod
    def open(cls, folder: Path) -> Extracted:
        """Raises as :meth:`ActivationStore.open`."""
        stores = {
            name: ActivationStore.open(folder / name) if (folder / name).exists() else None
            for name in (TRAIN, TEST)
        }
        if stores[TRAIN] is None and stores[TEST] is None:
            raise UnknownNameError(
                f"there is no extraction in {folder}: make one with 'featureinterp extract'"
            )
        windows = WindowTable.open(folder / "windows")
        for store in filter(None, stores.values()):
            check_windows(store, windows)
        return cls(folder, windows, stores[TRAIN], stores[TEST])

    @property
    def notes(self) -> list[str]:
        """What a user should know of the text and of the split."""
        repeated = next(
            (
                store.meta["split"].get("n_repeated", 0)
                for store in (self.train, self.test)
                if store is not None
            ),
            0,
        )
        left_out = (
            f"{repeated:,} windows of held-out documents have the text of training windows and are left out"
        )
        return [*self.windows.notes, *([left_out] if repeated else [])]


def check_windows(store: ActivationStore, windows: WindowTable) -> None:
    """Raises ``IncompatibleError`` when a store's rows are not of these windows."""
    with described(store.folder / METADATA, remedy_for(store.folder)):
        named = str(store.meta["source"]["corpus"]["windows"])
    if named != windows.fingerprint:
        raise IncompatibleError(
            f"{store.folder} and {windows.folder} do not belong together (its rows are of the windows "
            f"{named[:12]}, "
            f"not of {windows.fingerprint[:12]}): put back the folder that was there, or delete both and "
            "extract again"
        )


def extract(
    subject: Subject,
    hook: str,
    corpus: Corpus,
    out: Path,
    policy: WindowPolicy,
    settings: ExtractSettings = ExtractSettings(),
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    replace: bool = False,
    anew: str = "start anew with --replace",
    held: bool = False,
) -> Extracted:
    """Writes the activations at ``hook`` of every scored token into ``out/train`` and ``out/test``; the text
    windows are in ``out/windows``.

    A complete extraction for the same request is reused, an unfinished one is gone on with, and one for
    another request is refused with ``IncompatibleError``, or with ``replace`` deleted; ``anew``: what to do
    to start anew there, where ``replace`` is not it. Position 0 and further attention sinks are left out, and
    counted. Raises ``FolderInUseError`` when another process works in ``out``; ``held``: the caller holds it.
    """
    subject.check_hook(hook)
    with nullcontext() if held else owned(out, "extract"):
        claim(
            out,
            EXTRACTION,
            request_of(subject, hook, corpus, policy, settings),
            about={"model": subject.name, "corpus": corpus.name},
            replace=replace,
            earlier=partial(recorded_request, out, settings.shard_rows),
            anew=anew,
            options=DTYPE_OPTION,
            alike=partial(in_dtype_of, subject),
        )
        return _extract(subject, hook, corpus, out, policy, settings, batch_tokens, progress)


def _extract(
    subject: Subject,
    hook: str,
    corpus: Corpus,
    out: Path,
    policy: WindowPolicy,
    settings: ExtractSettings,
    batch_tokens: int,
    progress: Progress | None,
) -> Extracted:
    """The same in a folder that is claimed for it."""
    target = _Target(out, subject, hook, corpus.name)
    windows = build_windows(corpus, subject.encoder, policy, out / "windows")
    splits = window_splits(windows, settings)
    repeated = int((splits == -1).sum())
    source = target.source(windows)
    names = [TRAIN, TEST] if settings.held_out else [TRAIN]
    order = window_order(windows, settings)
    if settings.only_held_out:
        names, order, splits = [TEST], order[splits[order] == 1], splits - 1
    if all((out / name / METADATA).exists() for name in names):
        return Extracted.open(out)
    state = target.state(names)
    writers = {
        name: StoreWriter(
            out / name,
            subject.d_model,
            settings.dtype,
            n_rows=state[name]["n_rows"],
            shard_rows=settings.shard_rows,
            sums=state[name].pop("sums", None),
        )
        for name in names
    }
    lengths = np.asarray(windows.lengths)[order]
    total, done = int(lengths.sum()), int(lengths[: state["next"]].sum())
    with _Commits(out / STATE, list(writers.values())) as commits:
        kept = torch.float16 if settings.dtype == "float16" else torch.float32
        for batch, (values, scored) in read_scored(
            subject, hook, windows, order, state["next"], batch_tokens, kept
        ):
            for number, name in enumerate(names):
                mine = splits[batch.rows] == number
                if mine.any():
                    _append(writers[name], state[name], windows, batch, values, scored, mine)
            done += batch.n_tokens
            if (end := batch.through) is not None:
                for name in names:
                    state[name] |= {"n_rows": writers[name].n_rows, "sums": writers[name].sums}
                state["next"] = end
                commits.put(state)
            if progress:
                progress(done, total)
    for number, name in enumerate(names):
        counts = {k: v for k, v in state[name].items() if k not in ("n_rows", "sums")}
        meta: dict[str, Any] = {
            "source": source,
            "split": {"name": name, "held_out": settings.held_out, "seed": settings.seed}
            | ({"n_repeated": repeated} if repeated else {}),
            "order": "shuffled" if settings.shuffle else "corpus",
        }
        meta |= {
            "part": {"number": settings.part, "of": settings.parts},
            "counts": counts,
            "dtype": settings.dtype,
        }
        meta |= {"hook": hook, "model": source["model"], "n_windows": int((splits[order] == number).sum())}
        writers[name].finish({**meta, "key": store_key(meta)})
    (out / STATE).unlink()
    return Extracted.open(out)


def merge(folders: list[Path], out: Path, *, replace: bool = False) -> Extracted:
    """One extraction from those of several workers: what one worker alone would have been asked for, which is
    written down. The same one is reused or gone on with. Raises as :func:`merge_stores`."""
    if not folders:
        raise InputError("there is nothing to merge: name the folders that the workers wrote")
    if out.resolve() in {folder.resolve() for folder in folders}:
        raise InputError(f"{out} is one of the folders to be merged: merge into another folder")
    parts = [Extracted.open(folder) for folder in folders]
    with owned(out, "extract"), ExitStack() as marks:
        for folder in folders:
            marks.enter_context(reading(folder, EXTRACTION, "extract"))
        if (asked := merged_request(folders)) is not None:
            known = partial(recorded_request, out, asked["settings"]["shard_rows"])
            claim(out, EXTRACTION, asked, about={"parts": len(folders)}, replace=replace, earlier=known)
        for name in (TRAIN, TEST):
            if (folders[0] / name).exists() and not (asked and (out / name / METADATA).exists()):
                merge_stores([f / name for f in folders], out / name)
        copy_windows(parts[0].windows, out / "windows")
        with explained_storage(out):
            (out / STATE).unlink(missing_ok=True)
        return Extracted.open(out)


def window_splits(windows: WindowTable, settings: ExtractSettings) -> np.ndarray:
    """0 for windows of training documents, 1 for held-out ones, −1 for windows of held-out documents whose
    text is in training, too, and which belong to neither: int8 ``[window]``. Documents of the same text are
    on the same side. Raises ``InputError`` when nothing could be held out."""
    found = np.zeros(len(windows), np.int8)
    if settings.held_out:
        try:
            documents = np.asarray(windows.documents)
            train, test = split_indices(
                len(windows), settings.held_out, settings.seed, documents, windows.contents
            )
        except InputError as error:
            raise InputError(
                f"no document can be held out ({error}); corpus.held_out = 0 (--held-out 0 of extract) "
                "keeps all for training"
            ) from error
        found[:] = -1
        found[train], found[test] = 0, 1
    return found


def window_order(windows: WindowTable, settings: ExtractSettings) -> np.ndarray:
    """The windows of this part in the order in which they are read, int64."""
    order = (
        np.random.default_rng([settings.seed, 2]).permutation(len(windows))
        if settings.shuffle
        else np.arange(len(windows))
    )
    cuts = np.linspace(0, len(order), settings.parts + 1).astype(int)
    mine = order[cuts[settings.part] : cuts[settings.part + 1]]
    if not len(mine):
        raise InputError(f"{len(windows)} windows are too few for {settings.parts} parts: use fewer")
    return mine


def read_scored(
    subject: Subject,
    hook: str,
    windows: WindowTable,
    order: np.ndarray,
    first: int,
    batch_tokens: int,
    dtype: torch.dtype,
) -> Iterator[tuple[Batch, tuple[np.ndarray, np.ndarray]]]:
    """Windows batch by batch, from ``order[first:]``: (the batch, (activations of its scored tokens ``[row,
    d_model]``, which tokens those are, bool ``[window, token]``))."""

    def finish(_: Batch, found: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        scored = scored_on_host(found[0], subject)
        return to_host(rows_where(found[0], scored).to(dtype))[0], scored

    return read_windows(subject, [hook], windows, finish, order=order, first=first, batch_tokens=batch_tokens)


def _append(
    writer: StoreWriter,
    counts: dict[str, int],
    windows: WindowTable,
    batch: Batch,
    values: np.ndarray,
    scored: np.ndarray,
    mine: np.ndarray,
) -> None:
    """Puts the scored tokens of the windows that are ``mine`` into a store, and counts the others.
    ``values``: of all scored tokens.
    """
    rows, length = batch.rows, batch.length
    mask = scored & mine[:, None]
    place = np.broadcast_to(np.arange(length), mask.shape)
    window = np.broadcast_to(rows[:, None], mask.shape)
    tokens = np.asarray(windows.tokens[rows, :length])
    documents = np.broadcast_to(np.asarray(windows.documents)[rows][:, None], mask.shape)
    values = values if mine.all() else values[mask[scored]]
    writer.append(
        values, documents=documents[mask], windows=window[mask], offsets=place[mask], tokens=tokens[mask]
    )
    left_out = mine[:, None] & ~mask
    counts["n_tokens"] += int(mine.sum()) * length
    counts["n_first"] += int(left_out[:, 0].sum())
    counts["n_sinks"] += int(left_out[:, 1:].sum())


class _Commits:
    """Brings rows to the disk, and then the state that counts them, beside the computation; one at a time."""

    def __init__(self, path: Path, writers: list[StoreWriter]) -> None:
        self.path, self.writers = path, writers
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Commits:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=True)
        if self._last is not None:
            self._last.result()

    def put(self, state: dict[str, Any]) -> None:
        """Waits for the state before, and begins with this one."""
        for writer in self.writers:
            writer.flush()
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._commit, copy.deepcopy(state))

    def _commit(self, state: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.sync()
        write_marker(self.path, state)


class _Target:
    """The folder of an extraction, and what it was asked for."""

    def __init__(self, out: Path, subject: Subject, hook: str, corpus: str) -> None:
        self.out, self.subject, self.hook, self.corpus = out, subject, hook, corpus

    def source(self, windows: WindowTable) -> dict[str, Any]:
        """What rows depend on."""
        subject = self.subject
        return {
            "model": {
                "name": subject.name,
                "fingerprint": subject.fingerprint,
                "dtype": str(subject.dtype).removeprefix("torch."),
            },
            "hook": self.hook,
            "corpus": {
                "name": self.corpus,
                "windows": windows.fingerprint,
                "n_documents": windows.meta["n_documents"],
            },
            "tokenizer": subject.encoder.fingerprint,
            "mask": mask_of(subject),
        }

    def state(self, names: list[str]) -> dict[str, Any]:
        """How far an unfinished extraction got."""
        path = self.out / STATE
        if path.exists():
            remedy = f"delete it to extract {self.out} from the start"
            found = read_marker(path, remedy).value
            with described(path, remedy):
                if any(
                    type(n) is not int for n in (found["next"], *(found[name]["n_rows"] for name in names))
                ):
                    raise ValueError("a place is no number")
            return found
        for name in names:
            shutil.rmtree(self.out / name, ignore_errors=True)
        return {
            "next": 0,
            **{name: {"n_rows": 0, "n_tokens": 0, "n_first": 0, "n_sinks": 0} for name in names},
        }
