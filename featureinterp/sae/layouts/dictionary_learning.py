"""Folders of the package dictionary_learning, as SAEBench publishes them: ``ae.pt`` + ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.sae.layouts.checkpoint import (
    MAX_BLOCKS,
    Checkpoint,
    Folder,
    check_finite,
    fingerprint,
    size_of,
    unit_rows,
)
from featureinterp.sae.layouts.torch_file import read_torch
from featureinterp.sae.layouts.untrusted import read_json, shown

WEIGHTS = "ae.pt"
CLASSES = {
    "BatchTopKTrainer": "batch_topk",
    "MatryoshkaBatchTopKTrainer": "matryoshka_batch_topk",
    "MatroyshkaBatchTopKTrainer": "matryoshka_batch_topk",
    "GatedSAETrainer": "gated",
    "JumpReluTrainer": "jumprelu",
    "TopKTrainer": "topk",
    "StandardTrainer": "relu",
    "StandardTrainerAprilUpdate": "relu",
    "PAnnealTrainer": "p_anneal",
}
"""The architecture of each class of trainer."""
ENCODES_AS = {"matryoshka_batch_topk": "batch_topk", "p_anneal": "relu"}
"""Architectures that encode like another one; what is different about them is how they were trained."""
_BLOCK_OUTPUT = re.compile(
    r"(?:resid_post_layer_|resid_out_layer|(?:gpt_neox\.layers|model\.layers|transformer\.h)\.)([0-9]{1,5})"
)
"""What those who train call the output of a block: by their own names, or as the module of the model."""
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_NAMES = {
    "relu": {**_LINEAR, "bias": "b_dec"},
    "topk": {**_LINEAR, "b_dec": "b_dec"},
    "batch_topk": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "matryoshka_batch_topk": {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
    "gated": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        **{n: n for n in ("r_mag", "gate_bias", "mag_bias")},
    },
    "jumprelu": {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
}
"""The tensors of each architecture in the file, and what they are called here."""


def read_dictionary_learning(
    weights: Path, config_file: Path, *, expected: Mapping[str, Any] | None = None
) -> Checkpoint:
    """``expected``: what the SAE's name promises of ``activation_dim``, ``dict_size``, ``layer``, ``lm_name``
    and ``architecture``.

    Raises ``IncompatibleError`` when the files contradict it, themselves, or need code to be read, and when
    they do not say that it reads the residual stream after a block.
    """
    config = read_json(config_file)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise IncompatibleError(
            f"{config_file} has no table 'trainer': it is not a configuration of dictionary_learning"
        )
    named = trainer.get("trainer_class")
    architecture = CLASSES.get(named) if isinstance(named, str) else None
    if architecture is None:
        raise IncompatibleError(
            f"{config_file} names the trainer {shown(named)}: known are {', '.join(CLASSES)}"
        )
    said = {
        "architecture": architecture,
        **{key: trainer.get(key) for key in ("activation_dim", "dict_size", "layer", "lm_name")},
    }
    for key, value in (expected or {}).items():
        if said[key] != value and not (key == "dict_size" and said[key] is None):
            raise IncompatibleError(
                f"{config_file} gives {key} = {shown(said[key])} where the name promises {value!r}: the "
                "repository holds another SAE under it",
            )
    d_in = size_of(trainer, "activation_dim", config_file)
    sizes = {
        "dict_size": (expected or {}).get("dict_size"),
        **{k: v for k, v in trainer.items() if v is not None},
    }
    d_sae = size_of(sizes, "dict_size", config_file)
    layer, model = trainer.get("layer"), trainer.get("lm_name")
    if type(layer) is not int or not 0 <= layer < MAX_BLOCKS or not isinstance(model, str | None):
        raise IncompatibleError(
            f"{config_file} says layer = {shown(layer)} and lm_name = {shown(model)}: it must name a layer "
            "and a model",
        )
    _check_site(config, layer, d_in, config_file, weights, named=expected is not None)
    raw = _read(weights, architecture, d_in, d_sae, named=expected is not None)
    check_finite({name: tensor for name, tensor in raw.items() if name != "k"}, weights)
    kind = ENCODES_AS.get(architecture, architecture)
    settings = {"k": _k(raw["k"], trainer.get("k"), weights, config_file)} if kind == "topk" else {}
    tensors = {
        ours: raw[theirs].T.contiguous() if theirs.endswith(".weight") else raw[theirs].clone()
        for theirs, ours in _names(architecture).items()
    }
    tensors = unit_rows(tensors, weights, kind, rescale=kind == "relu")
    hook, digest = f"blocks.{layer}.hook_resid_post", fingerprint(config_file, weights)
    return Checkpoint(kind, tensors, settings, hook, model or "", config, digest)


def _check_site(
    config: Mapping[str, Any], layer: int, d_in: int, path: Path, weights: Path, *, named: bool
) -> None:
    """Raises ``IncompatibleError`` unless the configuration, its folder or a published name says that the SAE
    reads the output of block ``layer``. The same width is no proof: what an MLP adds has it too."""
    found = config.get("buffer")
    buffer = found if isinstance(found, dict) else {}
    site, io = config["trainer"].get("submodule_name"), buffer.get("io")
    only = "only SAEs of the residual stream after a block can be used"
    if io not in (None, "out"):
        raise IncompatibleError(
            f"{path} says that the SAE reads what goes {shown(io)} of its module (buffer.io): {only}"
        )
    width = buffer.get("d_submodule")
    if width not in (None, d_in):
        raise IncompatibleError(
            f"{path} says that its module puts out {shown(width)} values and that the SAE reads {d_in}"
        )
    if site is None:
        place = next(
            (
                part
                for part in reversed(weights.absolute().parts[:-1])
                if part.startswith("resid_post_layer_")
            ),
            None,
        )
        site = place or (f"resid_post_layer_{layer}" if named else None)
    if site is None:
        raise IncompatibleError(
            f"{path} does not say what the SAE reads: when it is the output of block {layer}, write "
            f'"submodule_name": "resid_post_layer_{layer}" into its trainer; {only}',
        )
    match = _BLOCK_OUTPUT.fullmatch(site) if isinstance(site, str) else None
    if match is None or int(match[1]) != layer:
        raise IncompatibleError(f"{path} says that the SAE reads {shown(site)} of layer {layer}: {only}")


def _read(path: Path, architecture: str, d_in: int, d_sae: int, *, named: bool) -> dict[str, torch.Tensor]:
    wanted = _shapes(architecture, d_in, d_sae)
    try:
        return read_torch(path, wanted, named=named)
    except IncompatibleError as error:
        if "has no tensor 'threshold'" in str(error) and wanted["threshold"] == ():
            raise IncompatibleError(
                f"{path} has no threshold, which {architecture} needs outside of training: an older "
                "version of its trainer saved "
                "none; use a checkpoint that has one",
            ) from error
        raise


def _k(tensor: torch.Tensor, said: object, weights: Path, path: Path) -> int:
    """The number of codes that is kept, an integer; the file and its configuration agree about it."""
    if tensor.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        raise IncompatibleError(
            f"the tensor 'k' of {weights} is {tensor.dtype} {shown(tensor.item())} instead of an integer"
        )
    k = int(tensor)
    if said is not None and (type(said) is not int or said != k):
        raise IncompatibleError(
            f"{path} says k = {shown(said)}, and {weights} says {k}: one of them is of another SAE"
        )
    return k


def _names(architecture: str) -> dict[str, str]:
    return _NAMES["relu" if architecture == "p_anneal" else architecture]


def _shapes(architecture: str, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    ours: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes = {}
    for theirs, name in _names(architecture).items():
        shape = ours.get(name, (d_sae,))
        shapes[theirs] = shape[::-1] if theirs.endswith(".weight") else shape
    if "threshold" in shapes and architecture != "jumprelu":
        shapes["threshold"] = ()
    return shapes | ({"k": ()} if architecture == "topk" else {})


LAYOUT = Folder(
    lambda folder: (folder / WEIGHTS).exists(),
    lambda folder: read_dictionary_learning(folder / WEIGHTS, folder / "config.json"),
)
