"""safetensors files: names, shapes, dtypes and places are checked from the header, before any weight is
read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.layouts.untrusted import FETCH_AGAIN, file_size, listed, parse_json, shown

_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_MAX_HEADER = 1 << 20
_MAX_DIMENSION = 1 << 40


@dataclass(frozen=True, slots=True)
class Declared:
    """What a header says of a tensor; ``begin`` and ``end`` in bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Declared]:
    """The tensors of a safetensors file by their names.

    Raises ``IncompatibleError`` when it is none, holds other than floats, or its tensors do not fill it
    exactly.
    """
    size = file_size(path)
    with explained_storage(path), path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise IncompatibleError(f"{path} is not a safetensors file")
        text = file.read(length)
    try:
        header = parse_json(text, path)
    except IncompatibleError as error:
        raise IncompatibleError(f"{path} is not a safetensors file: its header is broken") from error
    header.pop("__metadata__", None)
    found = {name: _declared(name, entry, path) for name, entry in header.items()}
    total = sum(math.prod(entry.shape) * _FLOATS[entry.dtype] for entry in found.values())
    if size != 8 + length + total:
        raise IncompatibleError(
            f"{path} has {size:,} bytes instead of {8 + length + total:,}: it was cut or extended; "
            f"{FETCH_AGAIN}",
        )
    _check_places(found, path)
    return found


def _declared(name: str, entry: Any, path: Path) -> Declared:
    dtype, shape, place = (
        entry.get(key) if isinstance(entry, dict) else None for key in ("dtype", "shape", "data_offsets")
    )
    if not _sizes(shape) or not _sizes(place) or len(place) != 2:
        raise IncompatibleError(
            f"{path} is not a safetensors file: it gives the tensor {shown(name)} no shape or no place"
        )
    if not isinstance(dtype, str) or dtype not in _FLOATS:
        raise IncompatibleError(
            f"the tensor {shown(name)} of {path} is {shown(dtype)} {shape} instead of a float"
        )
    begin, end = place
    return Declared(dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(v) is int and 0 <= v < _MAX_DIMENSION for v in value)
    )


def _check_places(header: Mapping[str, Declared], path: Path) -> None:
    """Tensors follow one another without a gap or an overlap, and each has the bytes that its shape needs."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at or entry.end - entry.begin != math.prod(entry.shape) * _FLOATS[entry.dtype]:
            raise IncompatibleError(
                f"{path} gives the tensor {shown(name)} the bytes {entry.begin} to {entry.end}, which do "
                "not fit its shape "
                f"{list(entry.shape)} and the other tensors: it is damaged; {FETCH_AGAIN}",
            )
        at = entry.end


def check_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes with what the configuration promises."""
    header = read_header(path)
    if set(header) != set(shapes):
        raise IncompatibleError(f"{path} holds the tensors {listed(header)} instead of {listed(shapes)}")
    for name, shape in shapes.items():
        if header[name].shape != shape:
            raise IncompatibleError(
                f"the tensor {name!r} of {path} is {header[name].dtype} {list(header[name].shape)} instead "
                f"of a float {list(shape)}",
            )


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file whose header was checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with explained_storage(path):
            return load_file(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise IncompatibleError(
            f"{path} cannot be read as tensors: it was cut or damaged; {FETCH_AGAIN}"
        ) from error
