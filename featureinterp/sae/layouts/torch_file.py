"""Files of ``torch.save``: tensors alone, each whole in the file, without running what is in it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.sae.layouts.checkpoint import check_shapes
from featureinterp.sae.layouts.untrusted import FETCH_AGAIN, MAX_PICKLE, archive_members, file_size, shown

_PREFIXES = ("_orig_mod.", "module.")
"""What compiling, and training in several processes, put before a tensor's name."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_torch(
    path: Path, wanted: Mapping[str, tuple[int, ...]], *, named: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors ``wanted``, by their shapes; the rest of the file is not touched. Their memory is the
    file's own: copy what is kept.

    ``k`` may be an integer, all others are floats. ``named``: a published name promised what the file holds.
    Raises ``IncompatibleError`` when a tensor is missing, other than wanted, or only declared, and when code
    would be run.
    """
    size = _check_archive(path)
    found = _plain(_load(path), path)
    for name in wanted:
        if name in found:
            _check_dense(name, found[name], path)
    shapes = {name: tuple(tensor.shape) if name in wanted else () for name, tensor in found.items()}
    check_shapes(shapes, wanted, path, named=named)
    kept = {name: found[name].detach() for name in wanted}
    for name, tensor in kept.items():
        if name != "k" and tensor.dtype not in _DTYPES:
            raise IncompatibleError(f"the tensor {name!r} of {path} is {tensor.dtype} instead of a float")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    if declared > size:
        raise IncompatibleError(
            f"the tensors of {path} need {declared:,} bytes, and the file has {size:,}: it is damaged or "
            "forged"
        )
    return kept


def _check_archive(path: Path) -> int:
    """The size of a file that is an archive as torch writes it."""
    size = file_size(path)
    with explained_storage(path), path.open("rb") as file:
        begin = file.read(2)
    if begin[:1] == b"\x80":
        raise IncompatibleError(
            f"{path} would run code when it is read, so it was not: it is a bare pickle; save it again "
            "with a current torch",
        )
    if begin != b"PK":
        raise IncompatibleError(f"{path} cannot be read as tensors: it was cut or damaged; {FETCH_AGAIN}")
    for entry in archive_members(path, packed=False):
        if entry.filename.rsplit("/", 1)[-1] == "data.pkl" and entry.file_size > MAX_PICKLE:
            raise IncompatibleError(
                f"{path} lists its tensors in {entry.file_size:,} bytes: it holds more than an SAE"
            )
    return size


def _load(path: Path) -> Any:
    damaged = f"{path} cannot be read as tensors: it was cut or damaged; {FETCH_AGAIN}"
    try:
        with explained_storage(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise IncompatibleError(
            f"{path} would run code when it is read, so it was not: it holds more than tensors; convert it "
            "to safetensors",
        ) from error
    except (MemoryError, zipfile.BadZipFile) as error:
        raise IncompatibleError(damaged) from error
    except Exception as error:  # the reader of a foreign file: whatever it trips over, the file is at fault
        raise IncompatibleError(damaged) from error


def _plain(value: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by their plain names."""
    pairs = value.items() if isinstance(value, dict) else ()
    if not pairs or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in pairs
    ):
        raise IncompatibleError(f"{path} holds no table of tensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in pairs:
        plain = name
        while plain.startswith(_PREFIXES):
            plain = plain.partition(".")[2]
        if plain in found:
            raise IncompatibleError(f"{path} has two tensors named {shown(plain)}")
        found[plain] = tensor
    return found


def _check_dense(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Its numbers are in the file, each once."""
    if (
        tensor.is_nested
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.device.type != "cpu"
    ):
        raise IncompatibleError(
            f"the tensor {name!r} of {path} is sparse, packed or on no device: save it as a plain tensor"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise IncompatibleError(
            f"the tensor {name!r} of {path} is {list(tensor.shape)} and holds fewer numbers: it is damaged "
            "or forged"
        )
