"""The whole path in one call: extract what is missing, train, export, evaluate. Every step reuses what an
earlier call finished.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featureinterp.claims import EXTRACTION, TRAINING, claim, owned, reading
from featureinterp.files import write_atomic
from featureinterp.machine import AUTO
from featureinterp.sae.load import LoadedSae, load_sae, save_sae, save_saelens
from featureinterp.stored.sums import Sums, read_marker, write_marker
from featureinterp.subject.load import check_same_model
from featureinterp.training.architectures import as_sae
from featureinterp.training.asked import source_of
from featureinterp.training.evaluate import evaluate, held_out_windows, loss_recovered
from featureinterp.training.loop import (
    LOG,
    OnLine,
    Trainer,
    planned_steps,
    prepare,
    read_log,
    resume,
    run,
)
from featureinterp.training.parts import Parts, Steps, fitted, resolved, writable
from featureinterp.training.ranks import Ranks, joined
from featureinterp.training.settings import Recipe, load_recipe, recipe_toml
from featureinterp.training.sources import Rows, activations_of, rows_of
from featureinterp.training.store import METADATA
from featureinterp.training.trackers import check_tracker, open_tracker

RECIPE, ABOUT, METRICS = "recipe.toml", "run.json", "metrics.json"
SILENT = ("log_every", "checkpoint_every", "batch_tokens")
"""Settings of training that nothing depends on."""
AGAIN = "run the same 'featureinterp train' again, which writes it anew and goes on from the checkpoint"
DTYPE_OPTIONS = {
    "subject dtype": "--dtype {} (subject.dtype of a recipe)",
    "training precision": "--set training.precision={}",
}
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
    what was interrupted; a run of another recipe is refused, or with ``replace`` deleted, with what lies
    below its folder and nothing else. Started by ``torchrun``, all processes train together.

    Raises ``InputError`` for what cannot work, before anything is computed, and ``FolderInUseError`` when
    another process works in ``out``.
    """
    check_tracker(recipe.tracking)
    writable(out)
    if recipe.training.samples is not None or recipe.training.online:
        planned_steps(recipe.training, None)
    given, source = recipe.store.folder, None
    if given is not None and (given / "train" / METADATA).exists():
        source = source_of(given / "train")
        recipe = fitted(recipe, source)
    recipe = resolved(recipe, device, made_in=source["model"]["dtype"] if source else None)
    parts = Parts(recipe, device)
    if source is not None and recipe.subject.model != source["model"]["name"]:
        check_same_model(parts.subject, source["model"], "the activations")
    with joined(parts.device) as ranks, ExitStack() as held:
        if ranks.leads:
            held.enter_context(owned(out, "train"))
            claim(
                out,
                TRAINING,
                request_of(recipe, ranks),
                replace=replace,
                earlier=partial(_earlier, out, device, ranks),
                options=DTYPE_OPTIONS,
            )
        ranks.barrier()
        found = rows_of(recipe, out, parts, steps, ranks, replace)
        held.enter_context(reading(activations_of(recipe, out), EXTRACTION, "train"))
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


def _earlier(out: Path, device: str | None, ranks: Ranks) -> dict[str, Any] | None:
    """The request of a run whose recipe is all that it wrote down. What ``auto`` stood for is the dtype of
    its activations, where they say it, and else what it stands for on ``device``."""
    if not (out / RECIPE).exists():
        return None
    recipe = load_recipe(out / RECIPE)
    about = read_marker(out / ABOUT, AGAIN).value if (out / ABOUT).exists() else {}
    made_in = ((about.get("source") or {}).get("model") or {}).get("dtype")
    if recipe.subject.dtype == AUTO and made_in in DTYPES:
        subject = recipe.subject.model_copy(update={"dtype": made_in})
        recipe = recipe.model_copy(update={"subject": subject})
    return request_of(resolved(recipe, device), ranks)


def _settings_that_matter(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """What the weights depend on."""
    training = recipe.training.model_dump(mode="json", exclude=set(SILENT))
    return {
        "sae": recipe.sae.model_dump(mode="json", exclude={"dtype"}),
        "training": training,
        **({"world": ranks.world} if recipe.training.online else {}),
    }


def _about(recipe: Recipe, trainer: Trainer, found: Rows, ranks: Ranks) -> dict[str, Any]:
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
    recipe: Recipe, out: Path, parts: Parts, trainer: Trainer, found: Rows, steps: Steps
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
