"""Gemma Scope's files: ``params.npz``, a JumpReLU SAE, in the folders that say what it reads."""

from __future__ import annotations

import re
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.layouts.checkpoint import (
    MAX_FEATURES,
    Checkpoint,
    Folder,
    check_finite,
    check_shapes,
    fingerprint,
)
from featureinterp.sae.layouts.untrusted import ARCHIVE_ERRORS, FETCH_AGAIN, archive_members, shown

WEIGHTS = "params.npz"
_PLACE = re.compile(r"(?:^|/)layer_([0-9]{1,3})/width_[0-9a-z]+/average_l0_[0-9]+$")
_REPOSITORY = re.compile(r"(?:^|[/-])gemma-scope-(2b|9b|27b)-(pt|it)-([0-9a-z-]+)(?=/)")
_WIDTHS = {"2b": 2304, "9b": 3584, "27b": 4608}
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_folder(folder: Path) -> Checkpoint:
    """A local folder, which says in its place alone what it belongs to:
    ``gemma-scope-2b-pt-res/layer_N/width_W/average_l0_K``.

    Raises ``IncompatibleError`` when that place does not say the residual stream of which layer of which
    model.
    """
    place = folder.resolve().as_posix()
    where, repository = _PLACE.search(place), list(_REPOSITORY.finditer(place))
    if where is None or not repository:
        raise IncompatibleError(
            f"{folder / WEIGHTS} does not say which layer of which model it belongs to: keep it in "
            "gemma-scope-2b-pt-res/layer_N/width_W/average_l0_K, as published",
        )
    size, trained, site = repository[-1].groups()
    if site != "res":
        raise IncompatibleError(
            f"{folder / WEIGHTS} lies in gemma-scope-{size}-{trained}-{site}: only SAEs of the residual "
            "stream after a block "
            f"(gemma-scope-{size}-{trained}-res) can be used",
        )
    shape = _headers(folder / WEIGHTS).get("W_enc", ((), None))[0]
    if len(shape) != 2 or shape[0] != _WIDTHS[size] or not 1 <= shape[1] <= MAX_FEATURES:
        raise IncompatibleError(
            f"{folder / WEIGHTS} has a matrix W_enc of {list(shape)}: an SAE of Gemma 2 {size} has "
            f"[{_WIDTHS[size]}, features]",
        )
    model = f"google/gemma-2-{size}" + ("-it" if trained == "it" else "")
    return read_gemma_scope(
        folder / WEIGHTS, model=model, layer=int(where[1]), d_in=shape[0], d_sae=shape[1], named=False
    )


def read_gemma_scope(
    weights: Path, *, model: str, layer: int, d_in: int, d_sae: int, named: bool = True
) -> Checkpoint:
    """Raises ``IncompatibleError`` when the file has other arrays than its name promises, or needs code to be
    read.
    """
    wanted: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    headers = _headers(weights)
    check_shapes({name: shape for name, (shape, _) in headers.items()}, wanted, weights, named=named)
    for name in wanted:
        if headers[name][1].kind != "f":
            raise IncompatibleError(
                f"the array {name!r} of {weights} is {headers[name][1]} instead of a float"
            )
    try:
        with explained_storage(weights), np.load(weights, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.asarray(arrays[name], np.float32)) for name in wanted}
    except (*ARCHIVE_ERRORS, MemoryError) as error:
        raise IncompatibleError(
            f"{weights} cannot be read as arrays: it was cut or damaged; {FETCH_AGAIN}"
        ) from error
    check_finite(tensors, weights)
    return Checkpoint(
        "jumprelu", tensors, {}, f"blocks.{layer}.hook_resid_post", model, {}, fingerprint(weights)
    )


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every array, from its header alone. What a header promises is in the file.

    Raises ``IncompatibleError`` for an array of Python objects and for one that is longer or shorter than its
    header says.
    """
    found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    members = archive_members(path, packed=True)
    try:
        with explained_storage(path), zipfile.ZipFile(path) as archive:
            for entry in members:
                with archive.open(entry) as file:
                    shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
                    at = file.tell()
                _check_array(entry.filename, shape, dtype, entry.file_size - at, path)
                found[entry.filename.removesuffix(".npy")] = (shape, dtype)
    except (
        *ARCHIVE_ERRORS,
        SyntaxError,
        TypeError,
        RecursionError,
        MemoryError,
        OverflowError,
        tokenize.TokenError,
    ) as error:
        raise IncompatibleError(
            f"{path} cannot be read as arrays: it was cut or damaged; {FETCH_AGAIN}"
        ) from error
    return found


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], n_bytes: int, path: Path) -> None:
    if dtype.hasobject:
        raise IncompatibleError(
            f"the array {shown(name)} of {path} holds Python objects, which would run code when read, so "
            "it was not",
        )
    needed = dtype.itemsize
    for size in shape:
        if type(size) is not int or size < 0:
            raise IncompatibleError(
                f"the array {shown(name)} of {path} has the shape {shown(shape)}: it is damaged"
            )
        needed *= size
    if needed != n_bytes:
        raise IncompatibleError(
            f"the array {shown(name)} of {path} is {shown(shape)} of {dtype} and has {n_bytes:,} bytes: it "
            "is damaged or forged",
        )


LAYOUT = Folder(lambda folder: (folder / WEIGHTS).exists(), read_folder)
