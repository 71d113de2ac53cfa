"""Work on a GPU: batches that fit by trying, and copies between the GPU and the host that wait once. On a CPU
every function here does nothing.

A batch that does not fit is cut in two, and what fitted is kept for the process. How work is cut into batches
changes its order nowhere: callers put results where they belong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from featureinterp.errors import DeviceMemoryError

T = TypeVar("T")
_SAID = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say that are no ``OutOfMemoryError``: of Apple's GPUs, of the CPU and of libraries."""


class Fit:
    """How much of one kind of work fits at once, as far as it was tried. ``tokens``: None while everything
    fitted.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.tokens: int | None = None

    def rows(self, width: int, wanted: int) -> int:
        """How many rows of ``width`` tokens to take at once where ``wanted`` tokens are to be, at least 1."""
        return max(1, min(wanted, self.tokens or wanted) // max(1, width))

    def less(self, rows: int, width: int, error: Exception, device: torch.device) -> None:
        """Remembers that ``rows`` of ``width`` tokens did not fit. Raises ``error`` when it is about
        something else, and ``DeviceMemoryError`` when there is nothing left to halve."""
        if not is_out_of_memory(error):
            raise error
        if rows <= 1:
            reason = f"{self.what}: one row of {width:,} tokens does not fit into the free memory of {device}"
            raise DeviceMemoryError(
                f"{reason}; end what else uses it, take shorter windows, or give --device cpu"
            ) from error
        self.tokens = min(self.tokens or rows * width, (rows + 1) // 2 * width)
        if device.type == "cuda":
            torch.cuda.empty_cache()


_fits: WeakKeyDictionary[Any, dict[str, Fit]] = WeakKeyDictionary()
_lock = threading.Lock()


def fit_of(owner: Any, what: str) -> Fit:
    """What is known of one kind of work of a model, for as long as the model lives."""
    with _lock:
        return _fits.setdefault(owner, {}).setdefault(what, Fit(what))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
    )


def on_gpu(device: torch.device | str) -> bool:
    """Whether a device is a GPU, on which batches begin large."""
    return torch.device(device).type in ("cuda", "mps")


def queues(device: torch.device) -> bool:
    """Whether a device computes beside the host, so that the next batch is begun before the present one is
    used.
    """
    return device.type == "cuda"


def in_parts(
    n: int, width: int, wanted: int, fit: Fit, device: torch.device, work: Callable[[slice], T]
) -> Iterator[tuple[slice, T]]:
    """``work`` on ``n`` rows of ``width`` tokens, about ``wanted`` tokens at once, or as many as fit: (the
    rows, what ``work`` gave), in order.
    """
    at = 0
    while at < n:
        part = slice(at, min(n, at + fit.rows(width, wanted)))
        try:
            found = work(part)
        except RuntimeError as error:
            fit.less(part.stop - at, width, error, device)
            continue
        yield part, found
        at = part.stop


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. To a GPU it is copied from pinned memory, and the host does not wait."""
    if not queues(device) or tensor.device.type != "cpu":
        return tensor.to(device)
    return _pinned(tensor.shape, tensor.dtype).copy_(tensor).to(device, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Tensors of one device as arrays. From a GPU all are copied into pinned memory, and the host waits once
    for all of them.
    """
    if not tensors or not queues(tensors[0].device):
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [_pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True) for tensor in tensors]
    _wait(tensors[0].device)
    return [copy.numpy() for copy in copies]


def _pinned(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _wait(device: torch.device) -> None:
    """Until everything that was queued on a device is done."""
    torch.cuda.current_stream(device).synchronize()
