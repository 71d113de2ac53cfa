"""SAELens: folders of ``cfg.json`` + ``sae_weights.safetensors``, and ``saelens:RELEASE/ID`` through its
package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import DownloadError, FeatureInterpError, IncompatibleError, UnknownNameError
from featureinterp.files import content_key, write_atomic, write_json
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.layouts.checkpoint import (
    ROUNDED,
    Checkpoint,
    Folder,
    check_finite,
    check_shapes,
    fingerprint,
    row_norms,
    scaled_codes,
    unit_rows,
)
from featureinterp.sae.layouts.saelens_config import KINDS, SaeLensConfig, read_config
from featureinterp.sae.layouts.tensors import load_tensors, read_header
from featureinterp.sae.layouts.untrusted import listed, read_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
PREFIX = "saelens:"
OLDEST = (6, 18)
READ_AS = 2
"""Part of the fingerprint of SAEs whose codes are other ones than the file's plain tensors give: codes of
both are not mixed.
"""
FINE_TUNED = ("scaling_factor", "finetuning_scaling_factor")
_VECTORS = {
    "relu": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


def read_saelens(folder: Path) -> Checkpoint:
    """An SAE as SAELens saves it. Raises ``IncompatibleError`` for what cannot be encoded the same way
    here.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    config = read_json(path)
    if not weights.exists():
        raise UnknownNameError(f"the SAELens folder {folder} has no {WEIGHTS}")
    said = read_config(config, path)
    check_tensors({name: entry.shape for name, entry in read_header(weights).items()}, said, weights)
    return _checkpoint(said, load_tensors(weights), weights, fingerprint(path, weights))


def save_saelens(folder: Path, sae: SparseAutoencoder, *, hook: str, model: str, **notes: Any) -> None:
    """Writes an SAE as SAELens loads it with ``SAE.load_from_disk``, float32. BatchTopK becomes a JumpReLU
    with one threshold for all features, as SAELens saves its own; ``notes`` go into the metadata.
    ``cfg.json`` is written last."""
    from safetensors.torch import save

    t = {name: tensor.detach().cpu().float() for name, tensor in sae.tensors.items()}
    kind, centred, extra = sae.architecture, True, {}
    centred_model = (
        {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
        if sae.normalize == "center"
        else {}
    )
    if kind == "batch_topk":
        kind, t["threshold"] = "jumprelu", t["threshold"].expand(sae.d_sae)
    elif kind == "jumprelu":
        centred = False
    elif kind == "gated":
        t |= {"b_gate": t["gate_bias"], "b_mag": t["mag_bias"]}
    elif kind == "topk":
        extra = {"k": sae.options["k"], "rescale_acts_by_decoder_norm": False}
    config = {
        "architecture": {ours: theirs for theirs, ours in KINDS.items()}[kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "normalize_activations": "none" if sae.normalize == "center" else sae.normalize,
        "reshape_activations": "none",
        **extra,
        "metadata": {"model_name": model, "hook_name": hook, **centred_model, **notes},
    }
    write_atomic(
        folder / WEIGHTS, save({name: t[name].contiguous() for name in _shapes(kind, sae.d_in, sae.d_sae)})
    )
    write_json(folder / CONFIG, config)


def load_release(name: str) -> Checkpoint:
    """``saelens:RELEASE/ID`` through the package, which knows where each release lies. Raises
    ``UnknownNameError`` without it, or when it knows none of that name."""
    release, _, sae_id = name.removeprefix(PREFIX).partition("/")
    if not release or not sae_id:
        raise UnknownNameError(f"{name!r} names no SAE of SAELens: write saelens:RELEASE/ID")
    try:
        import sae_lens
    except ImportError as error:
        raise UnknownNameError(
            f"{name!r} needs the package sae-lens: install featureinterp[saelens]"
        ) from error
    _check_version(getattr(sae_lens, "__version__", None), name)
    try:
        sae = sae_lens.SAE.from_pretrained(release, sae_id, device="cpu")
    except (ValueError, KeyError) as error:
        raise UnknownNameError(f"SAELens knows no {name!r}: {str(error).splitlines()[0]}") from error
    except FeatureInterpError:
        raise
    except Exception as error:  # whatever its many loaders raise
        raise DownloadError(
            f"SAELens could not load {name!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    tensors, place = {k: v.detach() for k, v in sae.state_dict().items()}, Path(name)
    said = read_config(sae.cfg.to_dict(), place)
    check_tensors({k: tuple(v.shape) for k, v in tensors.items()}, said, place)
    return _checkpoint(
        said,
        tensors,
        place,
        content_key([name, {k: float(v.double().abs().sum()) for k, v in tensors.items()}]),
    )


def _check_version(version: object, name: str) -> None:
    """Older versions of the package read TopK SAEs as ReLU ones."""
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        raise UnknownNameError(
            f"{name!r} needs sae-lens {OLDEST[0]}.{OLDEST[1]} or later, and {version} is installed: older "
            "ones read TopK SAEs as "
            "ReLU ones; run pip install -U sae-lens",
        )


def check_tensors(found: Mapping[str, tuple[int, ...]], said: SaeLensConfig, weights: Path) -> None:
    """Raises ``IncompatibleError`` when a tensor is missing, of another shape, or not known: it would be read
    by SAELens.
    """
    wanted = _shapes(said.kind, said.d_in, said.d_sae)
    check_shapes(found, wanted, weights)
    if unknown := set(found) - set(wanted) - set(FINE_TUNED):
        raise IncompatibleError(
            f"{weights} holds the tensor {listed(unknown)}, which an SAE of the kind {said.kind!r} does "
            "not have: it does not encode as its configuration says",
        )
    for name in FINE_TUNED:
        if name in found and found[name] != (said.d_sae,):
            raise IncompatibleError(
                f"the tensor {name!r} of {weights} is {list(found[name])} instead of [{said.d_sae}]"
            )


def _shapes(kind: str, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    return {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        **dict.fromkeys(_VECTORS[kind], (d_sae,)),
    }


def _checkpoint(
    said: SaeLensConfig, tensors: Mapping[str, torch.Tensor], weights: Path, digest: str
) -> Checkpoint:
    kept = {name: tensors[name].float() for name in _shapes(said.kind, said.d_in, said.d_sae)}
    check_finite(kept, weights)
    kept["W_dec"] = _fine_tuned(said, tensors, kept["W_dec"], weights)
    settings: dict[str, Any] = {"normalize": said.normalize, **({} if said.k is None else {"k": said.k})}
    notes = said.notes
    norms = row_norms(kept["W_dec"])
    if said.kind == "topk" and said.rescaled:
        if float(norms.min()) == 0:
            raise IncompatibleError(
                f"the decoder row {int(norms.argmin())} of {weights} is zero: its codes cannot be rescaled"
            )
        kept = scaled_codes(kept, norms, said.kind)
    plain = ours = _centred(said.kind, kept, said.centred)
    if said.kind != "topk":
        ours = unit_rows(plain, weights, said.kind)
    elif not said.rescaled and float((norms - 1).abs().max()) > ROUNDED:
        span = f"{float(norms.min()):.3g} to {float(norms.max()):.3g}"
        notes += (
            f"its decoder rows have norms of {span}, so that codes of different features are in different "
            "units",
        )
    others = said.fine_tuned or said.normalize == "center" or ours["W_dec"] is not plain["W_dec"]
    known = content_key([digest, READ_AS]) if others else digest
    return Checkpoint(
        said.kind, ours, settings, said.hook, said.model, said.config, known, said.prepend_bos, notes
    )


def _fine_tuned(
    said: SaeLensConfig, tensors: Mapping[str, torch.Tensor], decoder: torch.Tensor, weights: Path
) -> torch.Tensor:
    """The decoder with the factor of each feature that fine-tuning left beside it. All ones is what older
    versions wrote.
    """
    factors = [tensors[name].float() for name in FINE_TUNED if name in tensors]
    if said.fine_tuned and not factors:
        raise IncompatibleError(
            f"{weights} has none of the factors of fine-tuning that its configuration announces"
        )
    for factor in factors:
        if bool((factor == 1).all()):
            continue
        if not said.fine_tuned:
            raise IncompatibleError(
                f"{weights} holds factors of fine-tuning, and its configuration says "
                "finetuning_scaling_factor = false: one of them is of another SAE",
            )
        check_finite({"scaling_factor": factor}, weights)
        decoder = decoder * factor[:, None]
    return decoder


def _centred(kind: str, t: dict[str, torch.Tensor], centred: bool) -> dict[str, torch.Tensor]:
    """Our names, and biases for this project's formulas, in which JumpReLU does not subtract ``b_dec`` from
    its input and all others do.
    """
    shift = t["b_dec"] @ t["W_enc"]
    base = {name: t[name] for name in ("W_enc", "W_dec", "b_dec")}
    if kind == "jumprelu":
        return {**base, "b_enc": t["b_enc"] - shift if centred else t["b_enc"], "threshold": t["threshold"]}
    if kind == "gated":
        extra = torch.zeros_like(shift) if centred else shift
        return {
            **base,
            "r_mag": t["r_mag"],
            "gate_bias": t["b_gate"] + extra,
            "mag_bias": t["b_mag"] + t["r_mag"].exp() * extra,
        }
    return {**base, "b_enc": t["b_enc"] if centred else t["b_enc"] + shift}


LAYOUT = Folder(lambda folder: (folder / CONFIG).exists(), read_saelens)
