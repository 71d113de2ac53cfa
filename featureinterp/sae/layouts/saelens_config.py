"""What a configuration of SAELens says, of every version: each key that changes a code is obeyed or
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureinterp.errors import IncompatibleError
from featureinterp.sae.base import Normalize
from featureinterp.sae.layouts.checkpoint import hook_after_block, size_of
from featureinterp.sae.layouts.untrusted import shown
from featureinterp.sae.models import has_layer_norm

KINDS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
"""How each of its architectures is called here."""
_FOLDED = frozenset({"fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"})
"""What TransformerLens does to weights without a change to the residual stream after a block."""
_HARMLESS = frozenset(
    {"dtype", "torch_dtype", "device", "device_map", "n_devices", "move_to_device", "low_cpu_mem_usage"}
) | {
    *_FOLDED,
    "default_prepend_bos",
    "default_padding_side",
    "use_auth_token",
    "token",
    "cache_dir",
    "local_files_only",
}


@dataclass(frozen=True)
class SaeLensConfig:
    """What a configuration says of how its SAE encodes. ``centred``: whether ``b_dec`` is taken from the
    input; ``rescaled``: whether codes are in units of decoder rows; ``fine_tuned``: whether each feature has
    a factor after it."""

    kind: str
    d_in: int
    d_sae: int
    hook: str
    model: str
    normalize: Normalize
    centred: bool
    k: Any
    rescaled: bool
    fine_tuned: bool
    prepend_bos: bool | None
    notes: tuple[str, ...]
    config: Mapping[str, Any]


def read_config(config: Mapping[str, Any], path: Path) -> SaeLensConfig:
    """Raises ``IncompatibleError`` for what is contradictory, not known, or would be encoded otherwise
    here.
    """
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise IncompatibleError(f"{path} gives metadata = {shown(metadata)}: it must be a table")
    said = {**config, **{key: value for key, value in metadata.items() if value is not None}}
    kind, k = _kind(said, path)
    model = said.get("model_name")
    if not isinstance(model, str | None):
        raise IncompatibleError(f"{path} gives model_name = {shown(model)}: it must be a text")
    normalize = _normalize(said, path)
    if _centred_model(said, model, path) and normalize == "none":
        normalize = "center"
    bos = said.get("prepend_bos")
    return SaeLensConfig(
        kind,
        size_of(config, "d_in", path),
        size_of(config, "d_sae", path),
        _hook(said, path),
        model or "",
        normalize,
        _flag(said, "apply_b_dec_to_input", path, default=True),
        k,
        _flag(said, "rescale_acts_by_decoder_norm", path),
        _flag(said, "finetuning_scaling_factor", path),
        None if bos is None else _flag(said, "prepend_bos", path),
        _notes(said, normalize),
        config,
    )


def _flag(said: Mapping[str, Any], key: str, path: Path, *, default: bool = False) -> bool:
    value = said.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise IncompatibleError(f"{path} gives {key} = {shown(value)}: it must be true or false")
    return value


def _kind(said: Mapping[str, Any], path: Path) -> tuple[str, Any]:
    """How it encodes, and the ``k`` of TopK. The activation has stood under two keys."""
    architecture, options = said.get("architecture", "standard"), said.get("activation_fn_kwargs") or {}
    activations = {
        said[key] for key in ("activation_fn", "activation_fn_str") if isinstance(said.get(key), str)
    }
    others = [
        said[key]
        for key in ("activation_fn", "activation_fn_str")
        if not isinstance(said.get(key, ""), str | None)
    ]
    if not isinstance(options, dict):
        raise IncompatibleError(f"{path} gives activation_fn_kwargs = {shown(options)}: it must be a table")
    if len(activations) > 1 or others or not activations <= {"relu", "topk"}:
        raise IncompatibleError(
            f"{path} gives the activation {shown(sorted(activations) or others)}: known are relu and topk"
        )
    if architecture == "standard" and activations == {"topk"}:
        architecture = "topk"
    if not isinstance(architecture, str) or architecture not in KINDS:
        raise IncompatibleError(
            f"{path} names the architecture {shown(architecture)}: known are {', '.join(KINDS)}"
        )
    if activations == {"topk"} and architecture != "topk":
        raise IncompatibleError(
            f"{path} says architecture = {architecture!r} and the activation topk: they exclude each other"
        )
    if architecture != "topk":
        return KINDS[architecture], None
    ks = [value for value in (said.get("k"), options.get("k")) if value is not None]
    if len(ks) > 1 and ks[0] != ks[1]:
        raise IncompatibleError(
            f"{path} says k = {shown(ks[0])} and k = {shown(ks[1])}: one of them is wrong"
        )
    return "topk", ks[0] if ks else None


def _hook(said: Mapping[str, Any], path: Path) -> str:
    """The hook by its usual name. Before version 3 it stood under ``hook_point``."""
    hook = said.get("hook_name") or said.get("hook_point")
    if not isinstance(hook, str):
        raise IncompatibleError(f"{path} does not say which hook the SAE reads (hook_name is {shown(hook)})")
    for key in ("hook_head_index", "hook_point_head_index"):
        if said.get(key) is not None:
            raise IncompatibleError(
                f"{path} says {key} = {shown(said[key])}: SAEs of one attention head are not supported"
            )
    outputs = [said.get(key) for key in ("hook_name_out", "out_hook_point", "hook_point_out")]
    if said.get("is_transcoder") or any(out not in (None, hook) for out in outputs):
        raise IncompatibleError(
            f"{path} is a transcoder, which writes at another hook than it reads: only SAEs are supported"
        )
    if said.get("reshape_activations") not in (None, "none"):
        raise IncompatibleError(
            f"{path} says reshape_activations = {shown(said['reshape_activations'])}, which is not "
            "supported: "
            "only SAEs of the residual stream after a block can be used",
        )
    return hook_after_block(hook, path)


def _normalize(said: Mapping[str, Any], path: Path) -> Normalize:
    """Before version 3 it was true or false."""
    value = said.get("normalize_activations")
    if value is None or value is False or value == "none":
        return "none"
    if value == "layer_norm":
        return "layer_norm"
    named = "expected_average_only_in" if value is True else value
    raise IncompatibleError(
        f"{path} says normalize_activations = {shown(named)}, which is not supported: fold it into the "
        "weights, or save an SAE without it",
    )


def _centred_model(said: Mapping[str, Any], model: object, path: Path) -> bool:
    """Whether the SAE was trained on a residual stream without its mean, as TransformerLens makes it on
    request.
    """
    options = said.get("model_from_pretrained_kwargs") or {}
    if not isinstance(options, dict):
        raise IncompatibleError(
            f"{path} gives model_from_pretrained_kwargs = {shown(options)}: it must be a table"
        )
    active = {
        key: value for key, value in options.items() if value not in (None, False) and key not in _HARMLESS
    }
    if active.get("revision") == "main":
        active.pop("revision")
    centred = active.pop("center_writing_weights", False)
    if active:
        key, value = next(iter(active.items()))
        raise IncompatibleError(
            f"{path} was trained on a model loaded with {shown(key)} = {shown(value)} "
            "(model_from_pretrained_kwargs): "
            "its activations are other ones than those of the published model",
        )
    if not centred:
        return False
    known = has_layer_norm(model) if isinstance(model, str) else None
    if centred is not True or known is None:
        raise IncompatibleError(
            f"{path} says center_writing_weights = {shown(centred)} of the model {shown(model)}: that "
            "changes its residual stream "
            "in a way that is only known for models with a layer norm, such as gpt2-small",
        )
    return known


def _notes(said: Mapping[str, Any], normalize: str) -> tuple[str, ...]:
    """What the reader of results should know, though nothing is wrong."""
    found = []
    if not said.get("model_name"):
        found.append(
            "it does not say which model it was trained on, so that only the width and the hook were compared"
        )
    if normalize == "center":
        found.append(
            "it was trained on a residual stream without its mean, so the mean of every token is taken "
            "away first"
        )
    if said.get("seqpos_slice") not in (None, [None], [None, None], [None, None, None]):
        found.append(
            f"it was trained on a part of the positions alone (seqpos_slice = {shown(said['seqpos_slice'])})"
        )
    return tuple(found)
