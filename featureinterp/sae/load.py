"""The project's own SAE folder: ``config.json`` + ``weights.safetensors``; and SAEs by name.

``config.json``: ``format`` (1), ``architecture``, ``d_in``, ``d_sae``, ``hook``, ``model``, the architecture's settings (``k``),
and free ``provenance`` and ``metrics``. Shapes and dtypes are checked against it from the file's header, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.files import explained_storage, write_atomic, write_json
from featureinterp.resources import data_folder
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.batch_topk import BatchTopK
from featureinterp.sae.gated import Gated
from featureinterp.sae.jumprelu import JumpReLU
from featureinterp.sae.relu import ReLU
from featureinterp.sae.topk import TopK

FORMAT = 1
ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {c.architecture: c for c in (TopK, BatchTopK, JumpReLU, ReLU, Gated)}
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_MAX_FEATURES = 1 << 24


@dataclass(frozen=True)
class LoadedSae:
    """An SAE with what is known about it. ``fingerprint``: SHA-256 of its configuration and weights."""

    name: str
    sae: SparseAutoencoder
    hook: str
    model: str
    config: Mapping[str, Any]
    fingerprint: str

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return self.sae.d_sae


def load_sae(name: str = "demo", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LoadedSae:
    """Loads an SAE: ``demo`` (embedded, of ``smollm2-135m-instruct``) or a folder in the project's own format.

    Raises ``UnknownNameError`` when there is none and ``IncompatibleError`` when its files contradict each other.
    """
    folder = data_folder() / "demo-sae" if name == "demo" else Path(name).expanduser()
    if not (folder / "config.json").exists():
        raise UnknownNameError(f"there is no SAE {name!r}: give 'demo' or a folder with config.json and weights.safetensors")
    config = _read_config(folder / "config.json")
    kind = ARCHITECTURES[config["architecture"]]
    weights = folder / "weights.safetensors"
    if not weights.exists():
        raise UnknownNameError(f"the SAE folder {folder} has no weights.safetensors")
    _check_header(weights, kind.shapes(config["d_in"], config["d_sae"]))
    from safetensors.torch import load_file

    with explained_storage(weights):
        tensors = load_file(weights)
        digest = hashlib.sha256((folder / "config.json").read_bytes() + weights.read_bytes()).hexdigest()
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise IncompatibleError(f"the tensor {key!r} of {weights} holds values that are not finite: the file is damaged or training diverged")
    sae = kind({k: v.to(device, dtype) for k, v in tensors.items()}, **{s: config.get(s) for s in kind.settings})
    return LoadedSae(name, sae, config["hook"], config["model"], config, digest)


def save_sae(folder: Path, sae: SparseAutoencoder, *, hook: str, model: str, dtype: torch.dtype = torch.float32, **notes: Any) -> None:
    """Writes an SAE in the project's own format; ``notes`` (provenance, metrics) go into ``config.json``, which is written last."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().to(dtype).contiguous() for k, v in sae.tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise IncompatibleError(f"the tensor {key!r} does not fit {dtype}: save with a wider dtype")
    config = {"format": FORMAT, "architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "hook": hook, "model": model}
    write_atomic(folder / "weights.safetensors", save(tensors))
    write_json(folder / "config.json", {**config, **sae.options, **notes})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with explained_storage(path):
            config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IncompatibleError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise IncompatibleError(f"{path} is not an SAE configuration of format {FORMAT}")
    if config.get("architecture") not in ARCHITECTURES:
        raise IncompatibleError(f"{path} names the architecture {config.get('architecture')!r}: known are {', '.join(ARCHITECTURES)}")
    for key in ("d_in", "d_sae"):
        if not isinstance(config.get(key), int) or not 1 <= config[key] <= _MAX_FEATURES:
            raise IncompatibleError(f"{path} gives {key} = {config.get(key)!r}: it must be a positive integer")
    for key in ("hook", "model"):
        if not isinstance(config.get(key), str):
            raise IncompatibleError(f"{path} has no text under {key!r}")
    return config


def _check_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names, shapes, dtypes and the file's size with what the configuration promises."""
    with explained_storage(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(size - 8, 1 << 20):
            raise IncompatibleError(f"{path} is not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise IncompatibleError(f"{path} is not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    if set(header) != set(shapes):
        raise IncompatibleError(f"{path} holds the tensors {', '.join(sorted(header))} instead of {', '.join(sorted(shapes))}")
    total = 0
    for name, shape in shapes.items():
        entry = header[name]
        if tuple(entry["shape"]) != shape or entry["dtype"] not in _FLOATS:
            raise IncompatibleError(f"the tensor {name!r} of {path} is {entry['dtype']} {entry['shape']} instead of a float {list(shape)}")
        total += math.prod(shape) * _FLOATS[entry["dtype"]]
    if size != 8 + length + total:
        raise IncompatibleError(f"{path} has {size:,} bytes instead of {8 + length + total:,}: it was cut or extended; fetch it again")
