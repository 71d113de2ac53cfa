"""What every layout's reader gives, and the checks that they share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.base import SparseAutoencoder, all_finite
from featureinterp.sae.batch_topk import BatchTopK
from featureinterp.sae.gated import Gated
from featureinterp.sae.jumprelu import JumpReLU
from featureinterp.sae.layouts.untrusted import FETCH_AGAIN, listed, read_json, shown
from featureinterp.sae.relu import ReLU
from featureinterp.sae.topk import TopK

__all__ = ["ARCHITECTURES", "FETCH_AGAIN", "Checkpoint", "read_json"]

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    c.architecture: c for c in (TopK, BatchTopK, JumpReLU, ReLU, Gated)
}
MAX_FEATURES = 1 << 24
MAX_BLOCKS = 10_000
_UNIT = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""How far the norm of a decoder row may be from 1, by the dtype that it is stored in."""
ROUNDED = 5e-3
"""How far it may be where codes would be rescaled: what rounding to half precision once does is left as it
is.
"""
_ROWS = 4096
_SITE = re.compile(r"blocks\.([0-9]{1,5})\.hook_resid_(pre|post)")


@dataclass(frozen=True)
class Checkpoint:
    """An SAE as its files say it, in this project's terms. ``architecture``: how it encodes; ``settings``:
    what that needs besides tensors. ``model`` and ``hook``: what it was trained on; a model that is not named
    is "". ``fingerprint``: SHA-256 of its files. ``prepend_bos``: whether a BOS stood in front in training,
    None where nothing says so. ``notes``: sentences about what it says of itself and is of no consequence, or
    was changed into this project's terms."""

    architecture: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    hook: str
    model: str
    config: Mapping[str, Any]
    fingerprint: str
    prepend_bos: bool | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folder:
    """A layout: whether a folder is laid out so, and what reads it."""

    matches: Callable[[Path], bool]
    read: Callable[[Path], Checkpoint]


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
    if type(value) is not int or not 1 <= value <= MAX_FEATURES:
        raise IncompatibleError(
            f"{path} gives {key} = {shown(value)}: it must be a positive integer up to {MAX_FEATURES:,}"
        )
    return value


def hook_after_block(hook: object, where: object) -> str:
    """``blocks.N.hook_resid_post`` of a hook that is the residual stream after block N:
    ``blocks.{N+1}.hook_resid_pre`` is it too.

    Raises ``IncompatibleError`` for every other site: its activations are other numbers of the same width.
    """
    match = _SITE.fullmatch(hook) if isinstance(hook, str) else None
    block = int(match[1]) - (match[2] == "pre") if match else -1
    if not 0 <= block < MAX_BLOCKS:
        raise IncompatibleError(
            f"{where} reads {shown(hook)}: only SAEs of the residual stream after a block "
            "(blocks.N.hook_resid_post) can be used",
        )
    return f"blocks.{block}.hook_resid_post"


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    path: Path,
    *,
    named: bool = False,
) -> None:
    """Raises ``IncompatibleError`` that names the first tensor that is missing or of another shape.
    ``named``: a published name, and not only a configuration, promised it."""
    promise = "name" if named else "configuration"
    for name, shape in wanted.items():
        if name not in found:
            raise IncompatibleError(
                f"{path} has no tensor {name!r}, only {listed(found)}: it is another architecture than its "
                f"{promise} says",
            )
        if found[name] != shape:
            raise IncompatibleError(
                f"the tensor {name!r} of {path} is {list(found[name])} instead of {list(shape)}: it is not "
                f"the SAE that its {promise} says",
            )


def check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises ``IncompatibleError`` when a value is not finite."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise IncompatibleError(
                f"the tensor {name!r} of {path} holds values that are not finite: the file is damaged or "
                "training diverged",
            )


def row_norms(decoder: torch.Tensor) -> torch.Tensor:
    """The norms of the rows of a decoder ``[d_sae, d_in]``, float64 ``[d_sae]``."""
    return torch.cat([part.double().norm(dim=1) for part in decoder.split(_ROWS)])


def unit_rows(
    tensors: Mapping[str, torch.Tensor], path: Path, kind: str, *, rescale: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors with decoder rows of unit norm, in this project's formulas, so that an SAE has the same
    codes in every layout.

    The norms go into the encoder, and with it into thresholds, which changes no reconstruction. ``rescale``:
    whether that may be done where codes were published; otherwise, and for TopK, a row that is longer or
    shorter is an ``IncompatibleError``.
    """
    norms = row_norms(tensors["W_dec"])
    off = (norms - 1).abs()
    worst, may = int(off.argmax()), rescale and kind != "topk"
    tolerance = max(_UNIT[tensors["W_dec"].dtype], ROUNDED if may else 0)
    if float(off[worst]) <= tolerance:
        return dict(tensors)
    if float(norms.min()) == 0:
        raise IncompatibleError(
            f"the decoder row {int(norms.argmin())} of {path} is zero: its feature cannot write anything"
        )
    if not may:
        raise IncompatibleError(
            f"the decoder row {worst} of {path} has norm {float(norms[worst]):.6g} instead of 1: its codes "
            "would be in other units than published",
        )
    return scaled_codes(tensors, norms, kind)


def scaled_codes(
    tensors: Mapping[str, torch.Tensor], scale: torch.Tensor, kind: str
) -> dict[str, torch.Tensor]:
    """The SAE whose codes are ``scale [d_sae]`` times as large, with the same reconstructions."""
    factor = scale.to(tensors["W_dec"].dtype)
    found = {**tensors, "W_dec": tensors["W_dec"] / factor[:, None]}
    if kind == "gated":  # only how much fires grows, not whether
        found |= {"r_mag": tensors["r_mag"] + factor.log(), "mag_bias": tensors["mag_bias"] * factor}
        return found
    names = ("W_enc", "b_enc", "threshold")
    return found | {name: tensors[name] * factor for name in names if name in tensors}
