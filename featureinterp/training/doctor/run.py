"""A training run and its result: what its log, its settings and its figures say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.errors import FeatureInterpError
from featureinterp.stored.sums import read_marker
from featureinterp.training.doctor.check import Sheet
from featureinterp.training.loop import LOG, read_log
from featureinterp.training.recipe import ABOUT, AGAIN, METRICS, RECIPE
from featureinterp.training.settings import BY_COUNT, Recipe, load_recipe
from featureinterp.training.store import ActivationStore

TOO_GOOD = 0.95
STUCK = 0.5
MANY = 1.5
"""So many times the wanted number of codes are too many."""
Line = dict[str, Any]


def look_at_run(sheet: Sheet, folder: Path, train: ActivationStore | None) -> Recipe | None:
    """The settings and the log of a run; its recipe."""
    held: list[Recipe] = []

    def load() -> None:
        held.append(load_recipe(folder / RECIPE))

    if not sheet.attempt("its settings are there", load):
        return None
    recipe = held[0]
    sheet.passed("its settings are there", f"{recipe.sae.architecture}, seed {recipe.training.seed}")
    read: list[Line] = []
    if (folder / ABOUT).exists() and not sheet.attempt(
        "it left a log", lambda: read.append(read_marker(folder / ABOUT, AGAIN).value)
    ):
        return recipe
    about = read[0] if read else None
    log: list[Line] = []
    if not sheet.attempt("it left a log", lambda: log.extend(read_log(folder / LOG))):
        return recipe
    if not about or not log:
        sheet.fail(
            "it left a log",
            f"{len(log)} lines",
            "the run never began: run the same 'featureinterp train' again",
        )
        return recipe
    name(sheet, folder.resolve().name, recipe, about)
    if train is not None:
        good = about.get("data") == train.key
        sheet.judge(
            "it was trained on these activations",
            good,
            "hashes match" if good else "the run names other data",
            "name the activations that it was trained on",
        )
    schedule(sheet, recipe, about, log)
    curves(sheet, recipe, log)
    return recipe


def name(sheet: Sheet, text: str, recipe: Recipe, about: Line) -> None:
    """Every setting that the run's name claims is what it ran with."""
    claims = list(claimed(text))
    wrong = []
    for key, wanted in claims:
        table, _, setting = key.partition(".")
        found = (
            about["d_sae"]
            if key == "sae.d_sae"
            else about["aux_k"]
            if key == "sae.aux_k"
            else getattr(getattr(recipe, table), setting)
        )
        if wanted is True:
            good = bool(found)
        elif isinstance(wanted, float) and isinstance(found, int | float):
            good = abs(float(found) - wanted) <= 1e-9 * max(1.0, abs(wanted))
        else:
            good = found == wanted
        if not good:
            wrong.append(
                f"the name says {key} {'on' if wanted is True else f'= {wanted}'}, and it ran with {found}"
            )
    sheet.judge(
        "its name says what it is",
        not wrong,
        "; ".join(wrong) or f"{len(claims)} settings named",
        "the flag was never passed on: train again, or rename the folder",
    )


_NUMBERS = {
    "k": "sae.k",
    "d": "sae.d_sae",
    "x": "sae.expansion",
    "lr": "training.lr",
    "mix": "training.mix",
    "presample": "training.presample",
}
_NUMBERS |= {
    "warmup": "training.warmup",
    "clip": "training.clip",
    "seed": "training.seed",
    "batch": "training.batch",
    "aux": "sae.aux_k",
    "auxk": "sae.aux_k",
}
_WORDS = {
    "bf16": ("training.precision", "bfloat16"),
    "auxk": ("sae.aux_k", True),
    "online": ("training.online", True),
    "layernorm": ("sae.normalize", "token"),
    "pertoken": ("sae.normalize", "token"),
    "nonorm": ("sae.normalize", "none"),
    "constant": ("training.decay", "constant"),
    "cosine": ("training.decay", "cosine"),
    "topk": ("sae.architecture", "topk"),
    "batchtopk": ("sae.architecture", "batch_topk"),
    "matryoshka": ("sae.architecture", "matryoshka_batch_topk"),
    "jumprelu": ("sae.architecture", "jumprelu"),
    "gated": ("sae.architecture", "gated"),
}


def claimed(text: str) -> list[tuple[str, Any]]:
    """The settings in a name such as ``topk-k32-d4608-auxk-lr1e-3``, by their place in the recipe."""
    found: list[tuple[str, Any]] = []
    for part in re.split(r"[_.,]+|-(?!\d)", text.lower()):
        if part in _WORDS:
            found.append(_WORDS[part])
        elif (match := re.fullmatch(r"([a-z]+)(\d[\d.]*(?:e-?\d+)?)", part)) and match[1] in _NUMBERS:
            found.append((_NUMBERS[match[1]], float(match[2])))
    return found


def schedule(sheet: Sheet, recipe: Recipe, about: Line, log: list[Line]) -> None:
    """The learning rate comes to its end with the last step."""
    t, steps = recipe.training, about["steps"]
    last = log[-1]
    if last["step"] < steps:
        sheet.warn(
            "it is finished",
            f"step {last['step']:,} of {steps:,}",
            "run the same 'featureinterp train' again to finish it",
        )
    else:
        sheet.passed("it is finished", f"{steps:,} steps")
    horizon = about.get("decay_steps", steps)
    rate = last["lr"]
    wanted = t.lr if t.decay == "constant" else t.lr_end
    ended = last["step"] < steps or abs(rate - wanted) <= 0.01 * t.lr
    sheet.judge(
        "the learning rate ends with the run",
        horizon == steps and ended,
        f"decay over {horizon:,} of {steps:,} steps; {rate:.2g} at the last one, {wanted:.2g} planned",
        "a decay that is longer than the run leaves the rate high, a shorter one wastes the rest: plan "
        "both from the same number of steps",
    )


def curves(sheet: Sheet, recipe: Recipe, log: list[Line]) -> None:
    """Loss falls, FVU is below one, dead features come back, and a number of codes that was asked for is
    reached.
    """
    values = {
        key: np.array([line.get(key, np.nan) for line in log], float) for key in ("loss", "fvu", "dead", "l0")
    }
    if not np.isfinite(values["loss"]).all():
        sheet.fail(
            "the loss is finite",
            "it is not",
            "training diverged: lower training.lr, raise training.warmup, and look for NaN in the "
            "activations",
        )
        return
    loss, fvu, dead = values["loss"], values["fvu"], values["dead"]
    n = max(1, len(log) // 4)
    first, end = float(loss[:n].mean()), float(loss[-n:].mean())
    sheet.judge(
        "the loss falls",
        len(log) < 4 or end < first,
        f"{first:.4g} in the first quarter, {end:.4g} in the last",
        "lower training.lr, or check the data",
    )
    sheet.judge(
        "it explains more than the mean",
        fvu[-1] < 1,
        f"FVU {fvu[-1]:.4g}",
        "it reconstructs worse than a constant: check pre-bias, normalisation and learning rate",
    )
    half = dead[len(dead) // 2 :]
    stuck = float(half.min()) > STUCK and dead[-1] > 0.9 * float(half.max())
    advice = (
        "they do not come back: raise sae.aux_k or its coefficient, lower the learning rate, or make "
        "the dictionary smaller"
    )
    sheet.judge(
        "dead features come back",
        not stuck,
        f"{dead[-1]:.1%} dead at the end, {float(dead.max()):.1%} at most",
        advice,
    )
    if recipe.sae.architecture in (*BY_COUNT, "jumprelu"):
        l0, k = float(values["l0"][-1]), recipe.sae.k
        sheet.judge(
            "its codes are as few as asked for",
            l0 <= MANY * k,
            f"L0 {l0:.1f}, k {k}",
            "train longer, or raise sae.penalty",
            otherwise="warn",
        )


def look_at_result(sheet: Sheet, folder: Path) -> None:
    """The figures of the evaluation, and the files of the SAE."""
    held: list[Line] = []
    if not (folder / METRICS).exists():
        why = "there is no metrics.json: no document was held out, or the run is not finished"
        sheet.skipped("it was evaluated", why)
    elif sheet.attempt("it was evaluated", lambda: held.append(read_marker(folder / METRICS, AGAIN).value)):
        figures(sheet, held[0])
    files(sheet, folder)


def figures(sheet: Sheet, m: Line) -> None:
    """Variance explained that is too good, or that no code had to explain."""
    raw, zero, normal = m["sae"]["raw"], m["zero"]["raw"], m["sae"]["normalised"]
    sheet.judge(
        "its codes do the explaining",
        not (zero > 0.3 or (m["l0"] < 0.5 and raw > 0.3)),
        f"{raw:.3f} with {m['l0']:.1f} codes per token, {zero:.3f} with none",
        "most of the raw variance is explained without a single code (undoing a per-token normalisation is "
        "free): judge by the normalised figure",
    )
    causes = (
        "look at norms, sinks, dead features and normalisation; compare raw with normalised, and with PCA"
    )
    sheet.judge(
        "it is not too good",
        raw <= TOO_GOOD,
        f"{raw:.3f} of the raw variance, {normal:.3f} normalised",
        f"above {TOO_GOOD:.0%} is suspect: {causes}",
        otherwise="warn",
    )
    if m["pca"]:
        good = raw > m["pca"]["raw"] or m["l0"] < m["pca_k"]
        sheet.judge(
            "it beats PCA",
            good,
            f"{raw:.3f} against {m['pca']['raw']:.3f} with {m['pca_k']} components",
            "train longer, or with a higher learning rate",
            otherwise="warn",
        )
    sheet.judge(
        "features fire",
        m["dead"] < STUCK,
        f"{m['dead']:.1%} never do",
        "raise sae.aux_k, or make the dictionary smaller",
    )
    if m.get("loss"):
        _readable(sheet, m["loss"])


def _readable(sheet: Sheet, loss: Line) -> None:
    """Whether the model gets on with the reconstruction, where its cross-entropy can tell."""
    recovered = loss["recovered"]
    if recovered is None:
        sheet.skipped("the model can read it", loss.get("undefined") or "zeros cost the model nothing")
        return
    sheet.judge(
        "the model can read it",
        recovered > 0,
        f"{recovered:.3f} of the cross-entropy recovered",
        "its reconstruction is worse than zeros for the model: check the hook and the normalisation",
    )


def files(sheet: Sheet, folder: Path) -> None:
    """The exported SAE loads, and both layouts encode alike."""
    from featureinterp.sae.load import load_sae

    if not (folder / "sae").exists():
        sheet.skipped("the exported SAE loads", "it is not written yet")
        return

    def both() -> None:
        own = load_sae(str(folder / "sae"))
        figure = f"{own.n_features:,} features"
        if (folder / "saelens").exists():
            other = load_sae(str(folder / "saelens"))
            x = (
                torch.randn(64, own.sae.d_in, generator=torch.Generator().manual_seed(0))
                * own.sae.b_dec.norm().clamp_min(1)
                / own.sae.d_in**0.5
            )
            a, b = own.sae.encode(x).to_dense(), other.sae.encode(x).to_dense()
            off = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
            if off > 1e-3:
                raise FeatureInterpError(
                    f"sae and saelens encode the same input differently (by {off:.2g}): export them again"
                )
            figure += ", both layouts encode alike"
        sheet.passed("the exported SAE loads", figure)

    sheet.attempt("the exported SAE loads", both)
