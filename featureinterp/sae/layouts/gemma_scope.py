"""Gemma Scope's files: ``params.npz``, a JumpReLU SAE."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.layouts.checkpoint import FETCH_AGAIN, Checkpoint, check_finite, check_shapes, fingerprint

WEIGHTS = "params.npz"


def read_gemma_scope(weights: Path, *, model: str, layer: int, d_in: int, d_sae: int) -> Checkpoint:
    """Raises ``IncompatibleError`` when the file has other arrays than its name promises, or needs code to be read."""
    wanted: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
    try:
        with explained_storage(weights):
            headers = _headers(weights)
            for name, (_, dtype) in headers.items():
                if dtype.hasobject:
                    raise IncompatibleError(f"the array {name!r} of {weights} holds Python objects, which would run code when read, so it was not")
                if name in wanted and dtype.kind != "f":
                    raise IncompatibleError(f"the array {name!r} of {weights} is {dtype} instead of a float")
            check_shapes({name: shape for name, (shape, _) in headers.items()}, wanted, weights)
            with np.load(weights, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(np.asarray(arrays[name], np.float32)) for name in wanted}
    except (ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise IncompatibleError(f"{weights} cannot be read as arrays: it was cut or damaged; {FETCH_AGAIN}") from error
    check_finite(tensors, weights)
    return Checkpoint("jumprelu", tensors, {}, f"blocks.{layer}.hook_resid_post", model, {}, fingerprint(weights))


def width(path: Path) -> tuple[int, int]:
    """``d_in`` and ``d_sae`` of a file, from its header."""
    try:
        with explained_storage(path):
            shape, _ = _headers(path).get("W_enc", ((), None))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise IncompatibleError(f"{path} cannot be read as arrays: it was cut or damaged; {FETCH_AGAIN}") from error
    if len(shape) != 2:
        raise IncompatibleError(f"{path} has no matrix W_enc: it is no SAE of Gemma Scope")
    return shape[0], shape[1]


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array, from its header alone."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            found[entry.filename.removesuffix(".npy")] = (shape, dtype)
    return found
