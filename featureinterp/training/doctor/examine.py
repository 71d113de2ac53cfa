"""All checks that apply to what is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureinterp.claims import EXTRACTION, asked_in
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import FeatureInterpError, InputError
from featureinterp.files import parse_json
from featureinterp.stored.sums import read_marker
from featureinterp.subject.load import Subject
from featureinterp.training.asked import SOURCE, check_said
from featureinterp.training.doctor.activations import look_at_split, look_at_store, look_at_windows
from featureinterp.training.doctor.check import Check, Sheet
from featureinterp.training.doctor.model import look_at_corpus, look_at_environment, look_at_model
from featureinterp.training.doctor.run import look_at_result, look_at_run
from featureinterp.training.recipe import ABOUT, AGAIN
from featureinterp.training.settings import Recipe
from featureinterp.training.store import METADATA, ActivationStore, shard_path

Steps = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Patient:
    """What is examined; what is None is not. ``run``: a folder of 'train'; ``activations``: one of 'extract',
    or a single store.
    """

    model: str | None = None
    hook: str | None = None
    corpus: str | None = None
    activations: Path | None = None
    run: Path | None = None
    text_field: str = "text"
    document_separator: str | None = None
    window: int = 64
    device: str | None = None
    dtype: str | None = None


def patient_of(folder: Path) -> Patient:
    """A folder of a run or of activations. Raises ``InputError`` when it is neither."""
    if (folder / ABOUT).exists():
        about = read_marker(folder / ABOUT, AGAIN).value
        activations = about.get("activations")
        return Patient(
            run=folder, activations=Path(activations) if activations and Path(activations).exists() else None
        )
    if (
        any((folder / name).exists() for name in ("train", "test", "metadata.json"))
        or shard_path(folder, 0).exists()
        or asked_in(folder, EXTRACTION) is not None
    ):
        return Patient(activations=folder)
    raise InputError(
        f"{folder} is neither a run of 'featureinterp train' nor activations of 'featureinterp extract'"
    )


def examine(patient: Patient, *, seed: int = 0, steps: Steps = lambda *_: None) -> Iterator[Check]:
    """The checks as they are made. What is wrong is a finding, never an exception."""
    subject: Subject | None = None
    if patient.model is not None:
        sheet = Sheet("model")
        hook = patient.hook or "blocks.0.hook_resid_post"
        subject = look_at_model(
            sheet, patient.model, hook, device=patient.device, dtype=patient.dtype, window=patient.window
        )
        yield from sheet
    if patient.corpus is not None:
        sheet = Sheet("corpus")
        held = []
        options: dict[str, Any] = {
            "text_field": patient.text_field,
            "document_separator": patient.document_separator,
        }
        if sheet.attempt("it can be read", lambda: held.append(load_corpus(patient.corpus or "", **options))):
            look_at_corpus(sheet, held[0], subject, patient.window)
        yield from sheet
    train: ActivationStore | None = None
    if patient.activations is not None:
        for sheet, found in _stores(patient.activations, subject, seed):
            train = found or train
            yield from sheet
    recipe: Recipe | None = None
    if patient.run is not None:
        sheet = Sheet("training")
        recipe = look_at_run(sheet, patient.run, train)
        yield from sheet
        sheet = Sheet("result")
        look_at_result(sheet, patient.run)
        yield from sheet
    if recipe is not None:
        sheet = Sheet("environment")
        look_at_environment(sheet, recipe.tracking)
        yield from sheet


def _stores(
    folder: Path, subject: Subject | None, seed: int
) -> Iterator[tuple[Sheet, ActivationStore | None]]:
    """A sheet per store, with the training store, and one for both."""
    windows: WindowTable | None = None
    if (folder / "windows").exists():
        sheet, held = Sheet("windows"), []

        def open_windows() -> None:
            table = WindowTable.open(folder / "windows")
            table.check()
            held.append(table)

        if sheet.attempt("they are whole", open_windows):
            windows = held[0]
            sheet.passed("they are whole", f"{len(windows):,} windows, {windows.n_tokens:,} tokens")
            look_at_windows(sheet, windows)
        yield sheet, None
    names = [name for name in ("train", "test") if (folder / name).exists()]
    if not names:
        sheet = Sheet("activations")
        yield sheet, look_at_store(sheet, folder, windows, subject, seed=seed)
        return
    found = {}
    for name in names:
        sheet = Sheet("activations" if name == "train" else "held-out activations")
        store = look_at_store(sheet, folder / name, windows, subject, seed=seed)
        if store is not None:
            found[name] = store
        yield sheet, store if name == "train" else None
    if len(found) == 2:
        sheet = Sheet("split")
        look_at_split(sheet, found["train"], found["test"], windows)
        yield sheet, None


def recorded(activations: Path) -> dict[str, Any] | None:
    """What activations say that they were made of; None when they do not."""
    for folder in (activations / "train", activations / "test", activations):
        with suppress(OSError, ValueError, FeatureInterpError):
            meta = parse_json((folder / METADATA).read_text(encoding="utf-8"))
            check_said(meta, folder, SOURCE)
            return dict(meta["source"])
    return None
