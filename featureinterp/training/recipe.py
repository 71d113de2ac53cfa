"""The whole path in one call: extract what is missing, train, export, evaluate. Every step reuses what an
earlier call finished.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.claims import claim, owned
from featureinterp.codes.collect import windows_request
from featureinterp.corpus.text import Corpus, load_corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.errors import IncompatibleError, InputError
from featureinterp.files import explained_storage, write_atomic
from featureinterp.machine import AUTO, pick_device, this_machine
from featureinterp.sae.load import LoadedSae, load_sae, save_sae, save_saelens
from featureinterp.stored.sums import Sums, read_marker, write_marker
from featureinterp.subject.load import Subject, as_subject, check_same_model, load_causal_lm
from featureinterp.training.architectures import as_sae
from featureinterp.training.batches import Batches, OnlineBatches, Share, StoreBatches
from featureinterp.training.evaluate import check_apart, evaluate, held_out_windows, loss_recovered
from featureinterp.training.extract import PARTS, Extracted, ExtractSettings, extract, window_splits
from featureinterp.training.loop import (
    CHECKPOINT,
    LOG,
    OnLine,
    Trainer,
    planned_steps,
    prepare,
    read_log,
    resume,
    run,
)
from featureinterp.training.ranks import Ranks, joined, own_device
from featureinterp.training.settings import Recipe, load_recipe, recipe_toml
from featureinterp.training.store import METADATA, read_metadata
from featureinterp.training.trackers import check_tracker, open_tracker

Steps = Callable[[str, int, int], None]
RECIPE, ABOUT, METRICS = "recipe.toml", "run.json", "metrics.json"
RUN_PARTS = (RECIPE, ABOUT, METRICS, CHECKPOINT, LOG, "sae", "saelens", "training.html", "figures")
"""What a run's folder holds beside its activations, which are claimed on their own."""
SILENT = ("log_every", "checkpoint_every", "batch_tokens")
"""Settings of training that nothing depends on."""
AGAIN = "run the same 'featureinterp train' again, which writes it anew and goes on from the checkpoint"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Trained:
    """A finished run. ``about``: what ``run.json`` says; ``metrics`` is None when no document was held out;
    ``leads``: whether this process writes the files."""

    folder: Path
    recipe: Recipe
    sae: LoadedSae
    about: dict[str, Any]
    metrics: dict[str, Any] | None
    log: list[dict[str, Any]] = field(repr=False)
    leads: bool = True

    def _repr_html_(self) -> str:
        from html import escape

        found = self.metrics
        figures = (
            f"variance explained {found['sae']['raw']:.3f}, L0 {found['l0']:.1f}, dead {found['dead']:.1%}"
            if found
            else "not evaluated"
        )
        return (
            f"<b>{escape(self.recipe.sae.architecture)}</b> of {self.sae.n_features:,} features: "
            f"{figures}; <code>{escape(str(self.folder))}</code>"
        )


class Parts:
    """What a recipe needs of the subject, loaded when it is first asked for."""

    def __init__(self, recipe: Recipe, device: str | None) -> None:
        self.recipe, self.device = recipe, own_device(pick_device(device))
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def model(self) -> tuple[Any, Any]:
        """The whole model, and its tokenizer."""
        if self._model is None:
            table = self.recipe.subject
            self._model, self._tokenizer = load_causal_lm(
                table.model, device=str(self.device), dtype=table.dtype
            )
        return self._model, self._tokenizer

    @property
    def subject(self) -> Subject:
        """The model up to its head."""
        return as_subject(self.recipe.subject.model, *self.model)

    @property
    def policy(self) -> WindowPolicy:
        """How the corpus is cut."""
        c = self.recipe.corpus
        return WindowPolicy(c.window, min(c.min_window, c.window), c.max_tokens, c.max_per_document)

    def extract_settings(self, *, only_held_out: bool = False) -> ExtractSettings:
        """How activations are stored."""
        r = self.recipe
        return ExtractSettings(
            r.corpus.held_out,
            r.store.dtype,
            r.store.shuffle,
            r.store.shard_rows,
            only_held_out,
            seed=r.training.seed,
        )

    @property
    def corpus(self) -> Corpus:
        """The text."""
        return load_corpus(
            self.recipe.corpus.name,
            text_field=self.recipe.corpus.text_field,
            document_separator=self.recipe.corpus.document_separator,
        )

    def extract(
        self, folder: Path, steps: Steps, settings: ExtractSettings | None = None, *, replace: bool = False
    ) -> Extracted:
        """The extraction in ``folder``, made, gone on with or reused; ``replace``: one of another request is
        deleted.
        """
        corpus = self.corpus
        return extract(
            self.subject,
            self.recipe.subject.hook,
            corpus,
            folder,
            self.policy,
            settings or self.extract_settings(),
            batch_tokens=self.recipe.training.batch_tokens,
            progress=lambda done, total: steps("tokens", done, total),
            replace=replace,
        )


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str | None = None,
    steps: Steps = lambda *_: None,
    on_line: OnLine = lambda _: None,
    replace: bool = False,
) -> Trained:
    """Runs a recipe in the folder ``out``: activations (unless ``store.folder`` has them, or
    ``training.online``), training, ``sae/`` and ``saelens/``, ``metrics.json``. The same call goes on with
    what was interrupted; a run of another recipe is refused, or with ``replace`` deleted. Started by
    ``torchrun``, all processes train together.

    Raises ``InputError`` for what cannot work, before anything is computed, and ``FolderInUseError`` when
    another process works in ``out``.
    """
    check_tracker(recipe.tracking)
    writable(out)
    if recipe.training.samples is not None or recipe.training.online:
        planned_steps(recipe.training, None)
    given, source = recipe.store.folder, None
    if given is not None and (given / "train" / METADATA).exists():
        source = read_metadata(given / "train")["source"]
        recipe = fitted(recipe, source)
    recipe = resolved(recipe, device, made_in=source["model"]["dtype"] if source else None)
    parts = Parts(recipe, device)
    if source is not None and recipe.subject.model != source["model"]["name"]:
        check_same_model(parts.subject, source["model"], "the activations")
    with joined(parts.device) as ranks, ExitStack() as held:
        if ranks.leads:
            held.enter_context(owned(out, "train"))
            earlier = partial(_earlier, out, ranks)
            claim(
                out,
                "a training run",
                request_of(recipe, ranks),
                parts=RUN_PARTS,
                replace=replace,
                earlier=earlier,
            )
        ranks.barrier()
        found = _data(recipe, out, parts, steps, ranks, replace)
        trainer = prepare(found.batches, recipe.sae, recipe.training, parts.device, found.n_rows, ranks)
        key = {"data": found.key, **_settings_that_matter(recipe, ranks)}
        resume(trainer, out, key)
        if ranks.leads:
            if not (out / RECIPE).exists():
                write_atomic(out / RECIPE, recipe_toml(recipe))
            write_marker(out / ABOUT, _about(recipe, trainer, found, ranks), {RECIPE: Sums.of(out / RECIPE)})
        with open_tracker(recipe.tracking, out, recipe, ranks.leads) as track:

            def tell(line: dict[str, Any]) -> None:
                track(line)
                on_line(line)
                steps("training", line["step"], line["steps"])

            run(trainer, out, key, on_line=tell)
        metrics = None
        if ranks.leads:
            metrics = _finish(recipe, out, parts, trainer, found, steps)
        ranks.barrier()
        about = read_marker(out / ABOUT, AGAIN).value
        return Trained(
            out, recipe, load_sae(str(out / "sae")), about, metrics, read_log(out / LOG), ranks.leads
        )


@dataclass(frozen=True)
class _Data:
    """Where training rows come from. ``key``: what they depend on; ``n_rows``: of the store."""

    batches: Batches
    key: str
    n_rows: int | None
    extracted: Extracted | None

    @property
    def source(self) -> dict[str, Any] | None:
        """Which model, corpus and tokens the stored rows are of."""
        return self.extracted.train.meta["source"] if self.extracted and self.extracted.train else None


def _data(recipe: Recipe, out: Path, parts: Parts, steps: Steps, ranks: Ranks, replace: bool) -> _Data:
    """Activations or the model itself; the first process extracts, the others wait for it."""
    table = recipe.training
    folder = recipe.store.folder or out / "activations"
    share = Share(ranks.rank, ranks.world)
    share.of(table.batch)
    if table.online:
        return _online(recipe, folder, parts, steps, ranks, share, replace)
    if ranks.leads and not (recipe.store.folder and (folder / "train" / METADATA).exists()):
        recipe.sae.width(parts.subject.d_model)
        parts.extract(folder, steps, replace=replace)
    ranks.barrier()
    found = Extracted.open(folder)
    if found.train is None:
        raise InputError(
            f"{folder} holds only held-out activations: give an extraction with training ones, or set "
            "training.online"
        )
    if found.test is not None:
        check_apart(found.train, found.test)
    batches = StoreBatches(found.train, table.batch, mix=table.mix, seed=table.seed, share=share)
    return _Data(batches, found.train.key, len(found.train), found)


def _online(
    recipe: Recipe, folder: Path, parts: Parts, steps: Steps, ranks: Ranks, share: Share, replace: bool
) -> _Data:
    table = recipe.training
    held = None
    if ranks.leads:
        recipe.sae.width(parts.subject.d_model)
        if recipe.corpus.held_out:
            held = parts.extract(folder, steps, parts.extract_settings(only_held_out=True), replace=replace)
        else:
            with owned(folder, "train"):
                asked = windows_request(parts.corpus, parts.subject, parts.policy)
                claim(
                    folder,
                    "an extraction",
                    asked,
                    parts=PARTS,
                    about={"corpus": recipe.corpus.name},
                    replace=replace,
                )
                build_windows(parts.corpus, parts.subject.encoder, parts.policy, folder / "windows")
    ranks.barrier()
    windows = held.windows if held else WindowTable.open(folder / "windows")
    rows = np.flatnonzero(window_splits(windows, parts.extract_settings()) == 0)
    if held is not None and held.test is not None and np.isin(rows, np.asarray(held.test.windows)).any():
        raise IncompatibleError(
            f"{folder} holds out other documents than this version does: give another folder, or start "
            "anew with --replace"
        )
    batches = OnlineBatches(
        parts.subject,
        recipe.subject.hook,
        windows,
        rows,
        table.batch,
        buffer=table.buffer,
        batch_tokens=table.batch_tokens,
        seed=table.seed,
        share=share,
    )
    key = f"{windows.fingerprint} {parts.subject.fingerprint} {recipe.subject.hook}"
    return _Data(batches, key, None, held)


def fitted(recipe: Recipe, source: dict[str, Any]) -> Recipe:
    """The recipe with the model and hook of activations that were given, where it names none itself. Raises
    ``IncompatibleError`` where it names another hook or dtype; a model may lie elsewhere now, and run in
    another dtype where this machine lacks theirs."""
    theirs = {"hook": source["hook"], "model": source["model"]["name"], "dtype": source["model"]["dtype"]}
    named = {name: getattr(recipe.subject, name) for name in recipe.subject.model_fields_set}
    if named.get("dtype") == AUTO:
        del named["dtype"]
    for name in ("hook", "dtype"):
        if named.get(name, theirs[name]) != theirs[name]:
            raise IncompatibleError(
                f"the activations are of the {name} {theirs[name]!r}, and the recipe says {named[name]!r}: "
                "change one of them"
            )
    return recipe.model_copy(
        update={"subject": recipe.subject.model_copy(update={**theirs, "dtype": AUTO, **named})}
    )


def resolved(recipe: Recipe, device: str | None, made_in: str | None = None) -> Recipe:
    """The recipe with what ``auto`` stands for on this machine; where activations are given that were
    ``made_in`` a dtype, in that if the device has it.
    """
    machine, training = this_machine(), recipe.training
    subject = recipe.subject.model_copy(
        update={"dtype": machine.dtype(recipe.subject.dtype, device, made_in=made_in)}
    )
    precision = machine.dtype(training.precision, device)
    return recipe.model_copy(
        update={"subject": subject, "training": training.model_copy(update={"precision": precision})}
    )


def request_of(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """All settings that a run's files depend on, for :func:`featureinterp.claims.claim`. Where model, corpus
    and activations lie may change: what is in them is part of the extraction's request and of the
    checkpoint's key."""
    tables = recipe.model_dump(mode="json", exclude={"tracking"})
    for table, name in (("store", "folder"), ("subject", "model"), ("corpus", "name")):
        tables[table].pop(name)
    for name in SILENT:
        tables["training"].pop(name)
    return {**tables, **({"processes": ranks.world} if recipe.training.online else {})}


def _earlier(out: Path, ranks: Ranks) -> dict[str, Any] | None:
    """The request of a run whose recipe is all that it wrote down."""
    return request_of(resolved(load_recipe(out / RECIPE), None), ranks) if (out / RECIPE).exists() else None


def _settings_that_matter(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """What the weights depend on."""
    training = recipe.training.model_dump(mode="json", exclude=set(SILENT))
    return {
        "sae": recipe.sae.model_dump(mode="json", exclude={"dtype"}),
        "training": training,
        **({"world": ranks.world} if recipe.training.online else {}),
    }


def _about(recipe: Recipe, trainer: Trainer, found: _Data, ranks: Ranks) -> dict[str, Any]:
    """What the run is, beside its settings."""
    from featureinterp import __version__

    return {
        "featureinterp": __version__,
        "torch": torch.__version__,
        "steps": trainer.steps,
        "decay_steps": trainer.steps,
        "d_in": trainer.model.d_in,
        "d_sae": trainer.model.d_sae,
        "n_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "aux_k": trainer.model.aux_k,
        "normalize": {"kind": trainer.normalizer.kind, "scale": trainer.normalizer.scale},
        "variance": trainer.model.variance,
        "n_rows": found.n_rows,
        "data": found.key,
        "source": found.source,
        "activations": str(found.extracted.folder.resolve()) if found.extracted else None,
        "notes": found.extracted.notes if found.extracted else [],
        "processes": ranks.world,
        "device": str(trainer.device),
    }


def _finish(
    recipe: Recipe, out: Path, parts: Parts, trainer: Trainer, found: _Data, steps: Steps
) -> dict[str, Any] | None:
    """Writes the SAE in both layouts, and judges what was written."""
    sae = as_sae(trainer.model, trainer.normalizer)
    names = {"hook": recipe.subject.hook, "model": recipe.subject.model}
    dtype = DTYPES[recipe.sae.dtype]
    settings = json.loads(recipe.model_dump_json(exclude_none=True, exclude={"store": {"folder"}}))
    provenance = {"recipe": settings, "data": found.key, "source": found.source}
    save_sae(out / "sae", sae, dtype=dtype, provenance=provenance, **names)
    written = load_sae(str(out / "sae"), device=parts.device)
    metrics = None
    extracted = found.extracted
    if extracted is not None and extracted.test is not None:
        table = recipe.evaluation
        sample = found.batches.sample(max(20_000, 20 * table.pca), seed=recipe.training.seed, n_shards=None)
        dead = float(trainer.dead.double().mean())
        judged = evaluate(
            written.sae,
            extracted.test,
            sample,
            max_rows=table.max_rows,
            pca=table.pca,
            dead_in_training=dead,
            seed=recipe.training.seed,
            progress=lambda done, total: steps("evaluating", done, total),
        )
        if table.ce_windows:
            model, tokenizer = parts.model
            rows = held_out_windows(extracted.test, table.ce_windows, recipe.training.seed)
            loss = loss_recovered(
                model,
                tokenizer,
                recipe.subject.hook,
                written.sae,
                extracted.windows,
                rows,
                progress=lambda done, total: steps("cross-entropy", done, total),
            )
            judged = replaced(judged, loss=loss)
        metrics = judged.to_json()
        write_marker(out / METRICS, metrics, {LOG: Sums.of(out / LOG)})
        save_sae(
            out / "sae",
            written.sae,
            dtype=dtype,
            provenance=provenance,
            metrics=short_metrics(metrics),
            **names,
        )
    save_saelens(out / "saelens", written.sae, **names)
    return metrics


def short_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures that go into an SAE's own configuration."""
    loss = metrics["loss"]
    found = {
        "explained_variance": metrics["sae"]["raw"],
        "explained_variance_normalised": metrics["sae"]["normalised"],
        "explained_variance_of_zero_codes": metrics["zero"]["raw"],
        "explained_variance_of_pca": metrics["pca"] and metrics["pca"]["raw"],
        "pca_components": metrics["pca_k"],
        "l0": metrics["l0"],
        "dead_share": metrics["dead"],
        "loss_recovered": loss and loss["recovered"],
        "n_tokens": metrics["n_rows"],
        "n_documents": metrics["n_documents"],
    }
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in found.items()
        if value is not None
    }


def writable(out: Path) -> None:
    """Raises ``StorageError`` when nothing can be written into a folder. Several processes may ask at
    once.
    """
    with explained_storage(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
