"""Headers of safetensors files: names, shapes and dtypes, before any weight is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage

_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file (tensor → ``shape``, ``dtype``) and how many bytes it says the tensors have, checked against the file's size.

    Raises ``IncompatibleError`` when it is none, holds other than floats, or has another size.
    """
    with explained_storage(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(size - 8, 1 << 20):
            raise IncompatibleError(f"{path} is not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IncompatibleError(f"{path} is not a safetensors file ({error})") from error
    for name, (shape, dtype) in shapes.items():
        if dtype not in _FLOATS:
            raise IncompatibleError(f"the tensor {name!r} of {path} is {dtype} {list(shape)} instead of a float")
    total = sum(math.prod(shape) * _FLOATS[dtype] for shape, dtype in shapes.values())
    if size != 8 + length + total:
        raise IncompatibleError(f"{path} has {size:,} bytes instead of {8 + length + total:,}: it was cut or extended; fetch it again")
    return header, total


def check_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes with what the configuration promises."""
    header, _ = read_header(path)
    if set(header) != set(shapes):
        raise IncompatibleError(f"{path} holds the tensors {', '.join(sorted(header))} instead of {', '.join(sorted(shapes))}")
    for name, shape in shapes.items():
        if tuple(header[name]["shape"]) != shape:
            raise IncompatibleError(f"the tensor {name!r} of {path} is {header[name]['dtype']} {header[name]['shape']} instead of a float {list(shape)}")
