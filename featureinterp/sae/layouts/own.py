"""The project's own SAE folder: ``config.json`` + ``weights.safetensors``; ``docs/sae-format.md`` says what
is in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.files import write_atomic, write_json
from featureinterp.sae.base import SparseAutoencoder, all_finite
from featureinterp.sae.layouts.checkpoint import (
    ARCHITECTURES,
    Checkpoint,
    Folder,
    check_finite,
    fingerprint,
    size_of,
)
from featureinterp.sae.layouts.tensors import check_header, load_tensors
from featureinterp.sae.layouts.untrusted import read_json, shown

FORMAT = 1
WEIGHTS = "weights.safetensors"


def read_own(folder: Path) -> Checkpoint:
    """Raises ``UnknownNameError`` without weights and ``IncompatibleError`` when the files contradict each
    other.
    """
    path, weights = folder / "config.json", folder / WEIGHTS
    config = _checked(read_json(path), path)
    if not weights.exists():
        raise UnknownNameError(f"the SAE folder {folder} has no {WEIGHTS}")
    check_header(weights, ARCHITECTURES[config["architecture"]].shapes(config["d_in"], config["d_sae"]))
    tensors = load_tensors(weights)
    check_finite(tensors, weights)
    return Checkpoint(
        config["architecture"],
        tensors,
        config,
        config["hook"],
        config["model"],
        config,
        fingerprint(path, weights),
    )


def save_sae(
    folder: Path,
    sae: SparseAutoencoder,
    *,
    hook: str,
    model: str,
    dtype: torch.dtype = torch.float32,
    **notes: Any,
) -> None:
    """Writes an SAE in the project's own format; ``notes`` (provenance, metrics) go into ``config.json``,
    which is written last.
    """
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().to(dtype).contiguous() for k, v in sae.tensors.items()}
    for key, tensor in tensors.items():
        if not all_finite(tensor):
            raise IncompatibleError(f"the tensor {key!r} does not fit {dtype}: save with a wider dtype")
    config = {
        "format": FORMAT,
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "hook": hook,
        "model": model,
    }
    write_atomic(folder / WEIGHTS, save(tensors))
    if sae.normalize != "none":
        config["normalize"] = sae.normalize
    write_json(folder / "config.json", {**config, **sae.options, **notes})


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if type(config.get("format")) is not int or config["format"] != FORMAT:
        raise IncompatibleError(f"{path} is not an SAE configuration of format {FORMAT}")
    kind = config.get("architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise IncompatibleError(
            f"{path} names the architecture {shown(kind)}: known are {', '.join(ARCHITECTURES)}"
        )
    for key in ("d_in", "d_sae"):
        size_of(config, key, path)
    for key in ("hook", "model"):
        if not isinstance(config.get(key), str):
            raise IncompatibleError(f"{path} has no text under {key!r}")
    if not isinstance(config.get("normalize", "none"), str):
        raise IncompatibleError(
            f"{path} gives normalize = {shown(config['normalize'])}: it must be the name of a normalisation"
        )
    return config


def _matches(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and "format" in read_json(config)


LAYOUT = Folder(_matches, read_own)
