"""Where a recipe's training rows come from: a store that is extracted first, or the model itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.claims import EXTRACTION, claim, owned
from featureinterp.codes.collect import windows_request
from featureinterp.corpus.windows import WindowTable, build_windows
from featureinterp.errors import IncompatibleError, InputError
from featureinterp.training.batches import Batches, OnlineBatches, Share, StoreBatches
from featureinterp.training.evaluate import check_apart
from featureinterp.training.extract import Extracted, window_splits
from featureinterp.training.parts import Parts, Steps
from featureinterp.training.ranks import Ranks
from featureinterp.training.settings import Recipe
from featureinterp.training.store import METADATA


@dataclass(frozen=True)
class Rows:
    """Where training rows come from. ``key``: what they depend on; ``n_rows``: of the store."""

    batches: Batches
    key: str
    n_rows: int | None
    extracted: Extracted | None

    @property
    def source(self) -> dict[str, Any] | None:
        """Which model, corpus and tokens the stored rows are of."""
        return self.extracted.train.meta["source"] if self.extracted and self.extracted.train else None


def activations_of(recipe: Recipe, out: Path) -> Path:
    """Where the activations of a run in ``out`` lie."""
    return recipe.store.folder or out / "activations"


def _how(folder: Path, out: Path, replace: bool) -> dict[str, Any]:
    """How activations are extracted into ``folder`` for a run in ``out``. Only what lies below the run's
    folder is the run's own, to be replaced with it.
    """
    place, run = folder.resolve(), out.resolve()
    if run in place.parents:
        return {"replace": replace}
    anew = (
        "delete what lies there yourself ('featureinterp train --replace' deletes nothing outside of its run)"
    )
    return {"anew": anew, "held": place == run}


def rows_of(recipe: Recipe, out: Path, parts: Parts, steps: Steps, ranks: Ranks, replace: bool) -> Rows:
    """Activations or the model itself; the first process extracts, the others wait for it. ``replace``: an
    extraction of another request is deleted where it lies below ``out``.
    """
    table = recipe.training
    folder = activations_of(recipe, out)
    how = _how(folder, out, replace)
    share = Share(ranks.rank, ranks.world)
    share.of(table.batch)
    if table.online:
        return _online(recipe, folder, parts, steps, ranks, share, how)
    if ranks.leads and not (recipe.store.folder and (folder / "train" / METADATA).exists()):
        recipe.sae.width(parts.subject.d_model)
        parts.extract(folder, steps, **how)
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
    return Rows(batches, found.train.key, len(found.train), found)


def _online(
    recipe: Recipe,
    folder: Path,
    parts: Parts,
    steps: Steps,
    ranks: Ranks,
    share: Share,
    how: dict[str, Any],
) -> Rows:
    table = recipe.training
    held = None
    if ranks.leads:
        recipe.sae.width(parts.subject.d_model)
        if recipe.corpus.held_out:
            held = parts.extract(folder, steps, parts.extract_settings(only_held_out=True), **how)
        else:
            with nullcontext() if how.pop("held", False) else owned(folder, "train"):
                asked = windows_request(parts.corpus, parts.subject, parts.policy)
                claim(folder, EXTRACTION, asked, about={"corpus": recipe.corpus.name}, **how)
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
    return Rows(batches, key, None, held)
