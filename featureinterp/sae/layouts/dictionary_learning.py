"""Folders of the package dictionary_learning, as SAEBench publishes them: ``ae.pt`` + ``config.json``."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.layouts.checkpoint import FETCH_AGAIN, Checkpoint, check_finite, check_shapes, fingerprint, read_json, size_of, unit_rows

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
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_NAMES = {
    "relu": {**_LINEAR, "bias": "b_dec"},
    "topk": {**_LINEAR, "b_dec": "b_dec"},
    "batch_topk": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "matryoshka_batch_topk": {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
    "gated": {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec", **{n: n for n in ("r_mag", "gate_bias", "mag_bias")}},
    "jumprelu": {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
}
"""The tensors of each architecture in the file, and what they are called here."""


def read_dictionary_learning(weights: Path, config_file: Path, *, expected: Mapping[str, Any] | None = None) -> Checkpoint:
    """``expected``: what the SAE's name promises of ``activation_dim``, ``dict_size``, ``layer``, ``lm_name`` and ``architecture``.

    Raises ``IncompatibleError`` when the files contradict it, themselves, or need code to be read.
    """
    config = read_json(config_file)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise IncompatibleError(f"{config_file} has no table 'trainer': it is not a configuration of dictionary_learning")
    architecture = CLASSES.get(str(trainer.get("trainer_class")))
    if architecture is None:
        raise IncompatibleError(f"{config_file} names the trainer {trainer.get('trainer_class')!r}: known are {', '.join(CLASSES)}")
    said = {"architecture": architecture, **{key: trainer.get(key) for key in ("activation_dim", "dict_size", "layer", "lm_name")}}
    for key, value in (expected or {}).items():
        if said[key] != value and not (key == "dict_size" and said[key] is None):
            raise IncompatibleError(f"{config_file} gives {key} = {said[key]!r} where the name promises {value!r}: the repository holds another SAE under it")
    d_in = size_of(trainer, "activation_dim", config_file)
    d_sae = size_of({"dict_size": (expected or {}).get("dict_size"), **{k: v for k, v in trainer.items() if v is not None}}, "dict_size", config_file)
    layer, model = trainer.get("layer"), trainer.get("lm_name")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 or not isinstance(model, str):
        raise IncompatibleError(f"{config_file} says layer = {layer!r} and lm_name = {model!r}: it must name a layer and a model")
    kind = ENCODES_AS.get(architecture, architecture)
    raw = _read(weights, _shapes(architecture, d_in, d_sae))
    tensors = {ours: raw[theirs].T if theirs.endswith(".weight") else raw[theirs] for theirs, ours in _names(architecture).items()}
    check_finite(tensors, weights)
    tensors = unit_rows(tensors, weights, rescale=kind == "relu")
    settings = {"k": int(raw["k"])} if kind == "topk" else {}
    return Checkpoint(kind, tensors, settings, f"blocks.{layer}.hook_resid_post", model, config, fingerprint(config_file, weights))


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


def _read(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a file of ``torch.save``: no code in it is run, and their shapes are known before they are read."""
    modern = zipfile.is_zipfile(path)
    damaged = f"{path} cannot be read as tensors: it was cut or damaged; {FETCH_AGAIN}"
    try:
        with explained_storage(path):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=modern)
    except pickle.UnpicklingError as error:
        if not modern and not _begins_as_pickle(path):
            raise IncompatibleError(damaged) from error
        raise IncompatibleError(f"{path} would run code when it is read, so it was not: it holds more than tensors; convert it to safetensors") from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise IncompatibleError(damaged) from error
    if not isinstance(value, dict) or not all(isinstance(v, torch.Tensor) for v in value.values()):
        raise IncompatibleError(f"{path} holds no table of tensors")
    check_shapes({k: tuple(v.shape) for k, v in value.items()}, wanted, path)
    for name in wanted:
        if name != "k" and not value[name].is_floating_point():
            raise IncompatibleError(f"the tensor {name!r} of {path} is {value[name].dtype} instead of a float")
    return {name: value[name].clone() for name in wanted}


def _begins_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"
