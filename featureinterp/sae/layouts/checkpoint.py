"""What every layout's reader gives, and the checks that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.batch_topk import BatchTopK
from featureinterp.sae.gated import Gated
from featureinterp.sae.jumprelu import JumpReLU
from featureinterp.sae.relu import ReLU
from featureinterp.sae.topk import TopK

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {c.architecture: c for c in (TopK, BatchTopK, JumpReLU, ReLU, Gated)}
MAX_FEATURES = 1 << 24
FETCH_AGAIN = "fetch it again"
_UNIT = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""How far the norm of a decoder row may be from 1, by the dtype that it is stored in."""


@dataclass(frozen=True)
class Checkpoint:
    """An SAE as its files say it, in this project's terms. ``architecture``: how it encodes; ``settings``: what that needs besides tensors.
    ``model`` and ``hook``: what it was trained on. ``fingerprint``: SHA-256 of its files."""

    architecture: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    hook: str
    model: str
    config: Mapping[str, Any]
    fingerprint: str


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises ``IncompatibleError`` when it holds no JSON object."""
    try:
        with explained_storage(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IncompatibleError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise IncompatibleError(f"{path} is not a JSON object")
    return value


def fingerprint(*paths: Path) -> str:
    """SHA-256 over the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with explained_storage(path), path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()


def size_of(config: Mapping[str, Any], key: str, path: Path) -> int:
    """A dimension in a configuration. Raises ``IncompatibleError`` when it is no sensible number."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_FEATURES:
        raise IncompatibleError(f"{path} gives {key} = {value!r}: it must be a positive integer")
    return value


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises ``IncompatibleError`` that names the first tensor that is missing or of another shape."""
    for name, shape in wanted.items():
        if name not in found:
            raise IncompatibleError(
                f"{path} has no tensor {name!r}, only {', '.join(sorted(found)) or 'none at all'}: it is another architecture than its name says"
            )
        if found[name] != shape:
            raise IncompatibleError(f"the tensor {name!r} of {path} is {list(found[name])} instead of {list(shape)}: it is not the SAE that its name says")


def check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises ``IncompatibleError`` when a value is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise IncompatibleError(f"the tensor {name!r} of {path} holds values that are not finite: the file is damaged or training diverged")


def unit_rows(tensors: Mapping[str, torch.Tensor], path: Path, *, rescale: bool) -> dict[str, torch.Tensor]:
    """The tensors with decoder rows of unit norm. ``rescale``: where a norm can go into the encoder without changing a reconstruction (ReLU codes);
    otherwise a row that is longer or shorter is an ``IncompatibleError``."""
    norms = tensors["W_dec"].double().norm(dim=1)
    off = (norms - 1).abs()
    worst = int(off.argmax())
    if float(off[worst]) <= _UNIT.get(tensors["W_dec"].dtype, 1e-2):
        return dict(tensors)
    if not rescale or float(norms.min()) == 0:
        raise IncompatibleError(
            f"the decoder row {worst} of {path} has norm {float(norms[worst]):.6g} instead of 1: its codes would be in other units than published"
        )
    norms = norms.to(tensors["W_dec"].dtype)
    scaled = {"W_dec": tensors["W_dec"] / norms[:, None], "W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
    return {**tensors, **scaled}
