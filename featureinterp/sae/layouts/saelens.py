"""SAELens: folders of ``cfg.json`` + ``sae_weights.safetensors``, and ``saelens:RELEASE/ID`` through its package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import DownloadError, FeatureInterpError, IncompatibleError, UnknownNameError
from featureinterp.files import content_key, explained_storage, write_atomic, write_json
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.layouts.checkpoint import Checkpoint, check_finite, check_shapes, fingerprint, read_json, size_of
from featureinterp.sae.layouts.tensors import read_header

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
PREFIX = "saelens:"
_KINDS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_VECTORS = {"relu": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}


def read_saelens(folder: Path) -> Checkpoint:
    """An SAE as SAELens saves it. Raises ``IncompatibleError`` for what cannot be encoded the same way here."""
    path, weights = folder / CONFIG, folder / WEIGHTS
    config = read_json(path)
    if not weights.exists():
        raise UnknownNameError(f"the SAELens folder {folder} has no {WEIGHTS}")
    header, _ = read_header(weights)
    kind, d_in, d_sae = _kind(config, path), size_of(config, "d_in", path), size_of(config, "d_sae", path)
    check_shapes({name: tuple(entry["shape"]) for name, entry in header.items()}, _shapes(kind, d_in, d_sae), weights)
    from safetensors.torch import load_file

    with explained_storage(weights):
        tensors = load_file(weights)
    return _checkpoint(config, tensors, path, weights, fingerprint(path, weights))


def save_saelens(folder: Path, sae: SparseAutoencoder, *, hook: str, model: str, **notes: Any) -> None:
    """Writes an SAE as SAELens loads it with ``SAE.load_from_disk``, float32. BatchTopK becomes a JumpReLU with one threshold for all features, as SAELens
    saves its own; ``notes`` go into the metadata. ``cfg.json`` is written last."""
    from safetensors.torch import save

    t = {name: tensor.detach().cpu().float() for name, tensor in sae.tensors.items()}
    kind, centred, extra = sae.architecture, True, {}
    if kind == "batch_topk":
        kind, t["threshold"] = "jumprelu", t["threshold"].expand(sae.d_sae)
    elif kind == "jumprelu":
        centred = False
    elif kind == "gated":
        t |= {"b_gate": t["gate_bias"], "b_mag": t["mag_bias"]}
    elif kind == "topk":
        extra = {"k": sae.options["k"], "rescale_acts_by_decoder_norm": False}
    config = {
        "architecture": {ours: theirs for theirs, ours in _KINDS.items()}[kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
        **extra,
        "metadata": {"model_name": model, "hook_name": hook, **notes},
    }
    write_atomic(folder / WEIGHTS, save({name: t[name].contiguous() for name in _shapes(kind, sae.d_in, sae.d_sae)}))
    write_json(folder / CONFIG, config)


def load_release(name: str) -> Checkpoint:
    """``saelens:RELEASE/ID`` through the package, which knows where each release lies. Raises ``UnknownNameError`` without it, or when it knows none
    of that name."""
    release, _, sae_id = name.removeprefix(PREFIX).partition("/")
    if not release or not sae_id:
        raise UnknownNameError(f"{name!r} names no SAE of SAELens: write saelens:RELEASE/ID")
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise UnknownNameError(f"{name!r} needs the package sae-lens: install featureinterp[saelens]") from error
    try:
        sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except (ValueError, KeyError) as error:
        raise UnknownNameError(f"SAELens knows no {name!r}: {str(error).splitlines()[0]}") from error
    except FeatureInterpError:
        raise
    except Exception as error:  # whatever its many loaders raise
        raise DownloadError(
            f"SAELens could not load {name!r} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    tensors, config = {k: v.detach() for k, v in sae.state_dict().items()}, sae.cfg.to_dict()
    place = Path(name)
    return _checkpoint(config, tensors, place, place, content_key([name, {k: float(v.double().abs().sum()) for k, v in tensors.items()}]))


def _kind(config: Mapping[str, Any], path: Path) -> str:
    """How it encodes here. Raises ``IncompatibleError`` for what is not the same here."""
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and config.get("activation_fn_str", config.get("activation_fn", "relu")) == "topk":
        architecture = "topk"
    if architecture not in _KINDS:
        raise IncompatibleError(f"{path} names the architecture {architecture!r}: known are {', '.join(_KINDS)}")
    for key, plain in (("normalize_activations", ("none", "layer_norm")), ("reshape_activations", ("none",)), ("activation_fn_str", ("relu", "topk"))):
        if config.get(key, plain[0]) not in plain:
            raise IncompatibleError(f"{path} says {key} = {config[key]!r}, which is not supported: fold it into the weights, or save an SAE without it")
    return _KINDS[architecture]


def _shapes(kind: str, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    return {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,), **dict.fromkeys(_VECTORS[kind], (d_sae,))}


def _checkpoint(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path, weights: Path, digest: str) -> Checkpoint:
    kind = _kind(config, path)
    d_in, d_sae = size_of(config, "d_in", path), size_of(config, "d_sae", path)
    wanted = _shapes(kind, d_in, d_sae)
    check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, wanted, weights)
    kept = {name: tensors[name].float() for name in wanted}
    check_finite(kept, weights)
    metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    hook, model = (metadata.get(key) or config.get(key) for key in ("hook_name", "model_name"))
    if not isinstance(hook, str) or not isinstance(model, str):
        raise IncompatibleError(f"{path} does not say which hook of which model the SAE reads (hook_name {hook!r}, model_name {model!r})")
    settings: dict[str, Any] = {"normalize": config.get("normalize_activations", "none")}
    if kind == "topk":
        settings["k"] = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        if config.get("rescale_acts_by_decoder_norm"):
            norms = kept["W_dec"].norm(dim=1)
            kept |= {"W_dec": kept["W_dec"] / norms[:, None], "W_enc": kept["W_enc"] * norms, "b_enc": kept["b_enc"] * norms}
    return Checkpoint(kind, _centred(kind, kept, bool(config.get("apply_b_dec_to_input", True))), settings, _usual(hook), model, config, digest)


def _centred(kind: str, t: dict[str, torch.Tensor], centred: bool) -> dict[str, torch.Tensor]:
    """Our names, and biases for this project's formulas, in which JumpReLU does not subtract ``b_dec`` from its input and all others do."""
    shift = t["b_dec"] @ t["W_enc"]
    base = {name: t[name] for name in ("W_enc", "W_dec", "b_dec")}
    if kind == "jumprelu":
        return {**base, "b_enc": t["b_enc"] - shift if centred else t["b_enc"], "threshold": t["threshold"]}
    if kind == "gated":
        extra = torch.zeros_like(shift) if centred else shift
        return {**base, "r_mag": t["r_mag"], "gate_bias": t["b_gate"] + extra, "mag_bias": t["b_mag"] + t["r_mag"].exp() * extra}
    return {**base, "b_enc": t["b_enc"] if centred else t["b_enc"] + shift}


def _usual(hook: str) -> str:
    """``blocks.{i+1}.hook_resid_pre`` is the residual stream after block i."""
    parts = hook.split(".")
    if len(parts) == 3 and parts[2] == "hook_resid_pre" and parts[1].isdecimal() and int(parts[1]) > 0:
        return f"blocks.{int(parts[1]) - 1}.hook_resid_post"
    return hook
