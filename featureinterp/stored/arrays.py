"""Arrays on disk whose blocks are checked when they are first read."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.errors import DamagedStoreError
from featureinterp.files import explained_storage
from featureinterp.stored.sums import BLOCK_BYTES, Sums, check_size

Valid = Callable[[np.ndarray], bool]
"""Whether some values of an array can be right."""


class CheckedArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A memory-mapped array in row order. Indexing it and giving it to numpy check the blocks that are read,
    once per process; what comes out is a plain numpy array. Where the sums are not known, ``valid`` is asked
    instead. Other attributes are those of the whole array.

    Raises ``DamagedStoreError`` for a block that is not what was written; ``remedy`` says what to do then.
    """

    def __init__(
        self,
        file: np.ndarray,
        array: np.ndarray,
        path: Path,
        sums: Sums | None,
        remedy: str,
        valid: Valid | None = None,
    ) -> None:
        """``file``: all bytes of ``path``, uint8; ``array``: a view of its end."""
        self._file, self._array, self._path, self._sums, self._remedy = file, array, path, sums, remedy
        self._valid = valid
        self._block = sums.block if sums else BLOCK_BYTES
        self._begin = file.nbytes - array.nbytes
        self._row = array.nbytes // len(array) if len(array) else 1
        n = -(-file.nbytes // self._block) if sums or valid else 0
        self._seen = np.zeros(n, bool)
        self._left = n

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> Any:
        if self._left:
            self._check(key[0] if isinstance(key, tuple) and key else key)
        return self._array[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.whole()
        return np.array(whole, dtype, copy=True) if copy else np.asarray(whole, dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(
            *(x.whole() if isinstance(x, CheckedArray) else x for x in inputs), **options
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("dtype", "shape", "ndim", "size", "nbytes", "itemsize"):
            return getattr(self._array, name)
        return getattr(self.whole(), name)

    def __repr__(self) -> str:
        return f"CheckedArray({self._path}, {self._array.dtype} {self._array.shape})"

    def whole(self) -> np.ndarray:
        """All of it, checked."""
        if self._left:
            self._check_blocks(np.flatnonzero(~self._seen))
        return self._array

    def copy_rows(self, start: int, stop: int, out: np.ndarray) -> None:
        """Writes the rows from ``start`` to before ``stop`` into ``out``, whose dtype they take. About a
        block at a time is checked and then copied, while the processor still has it at hand."""
        step = max(1, self._block // max(1, self._row))
        for a in range(start, stop, step):
            b = min(a + step, stop)
            if self._left:
                self._check_range(a * self._row, b * self._row)
            out[a - start : b - start] = self._array[a:b]

    def _check(self, key: Any) -> None:
        n, row, block = len(self._array), self._row, self._block
        if isinstance(key, (int, np.integer)):
            start = (key + n if key < 0 else int(key)) * row
            self._check_range(start, start + row)
        elif isinstance(key, slice):
            start, stop, step = key.indices(n)
            if step < 0:
                start, stop = stop + 1, start + 1
            self._check_range(start * row, stop * row)
        elif isinstance(key, (np.ndarray, list)) and (rows := np.asarray(key)).ndim >= 1:
            rows = (np.flatnonzero(rows) if rows.dtype == bool else rows.reshape(-1)).astype(np.int64)
            rows = np.clip(np.where(rows < 0, rows + n, rows), 0, max(0, n - 1))
            if len(rows):
                edges = np.zeros(len(self._seen) + 1, np.int64)
                np.add.at(edges, (self._begin + rows * row) // block, 1)
                np.add.at(edges, (self._begin + (rows + 1) * row - 1) // block + 1, -1)
                self._check_blocks(np.flatnonzero((np.cumsum(edges)[:-1] > 0) & ~self._seen))
        else:
            self.whole()

    def _check_range(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        first, end = (self._begin + max(0, start)) // self._block, -(-(self._begin + stop) // self._block)
        if end - first == 1 and first < len(self._seen) and self._seen[first]:
            return
        if first < end:
            self._check_blocks(first + np.flatnonzero(~self._seen[first:end]))

    def _check_blocks(self, numbers: np.ndarray) -> None:
        if not len(numbers):
            return
        for i in numbers.tolist():
            if not self._right(i):
                raise DamagedStoreError(
                    f"{self._path} is damaged at byte {i * self._block:,}: {self._remedy}"
                )
            self._seen[i] = True
        self._left = int(len(self._seen) - self._seen.sum())

    def _right(self, number: int) -> bool:
        start, end = number * self._block, (number + 1) * self._block
        if self._sums is not None:
            return zlib.crc32(self._file[start:end].data) == self._sums.crcs[number]
        assert self._valid is not None
        part = self._file[max(start, self._begin) : end]
        return not len(part) or self._valid(part.view(self._array.dtype))


def mapped(
    path: Path,
    dtype: Any,
    shape: tuple[int, ...],
    files: Mapping[str, Sums] | None,
    marker: str,
    remedy: str,
    valid: Valid | None = None,
    begin: int = 0,
) -> np.ndarray:
    """A file as a :class:`CheckedArray` of a dtype and shape, after its first ``begin`` bytes; ``files``: the
    sums of its part, None when they are not known.

    Raises ``DamagedStoreError`` for a file without the size that ``marker`` declares.
    """
    size = begin + math.prod(shape) * np.dtype(dtype).itemsize
    check_size(path, size, marker, remedy)
    sums = None if files is None else files.get(path.name)
    if files is not None and (sums is None or sums.size != size):
        raise DamagedStoreError(f"{path} has no checksums of its size in {marker}: {remedy}")
    with explained_storage(path):
        file = np.asarray(np.memmap(path, np.uint8, "r")) if size else np.zeros(0, np.uint8)
    array = file[begin:].view(dtype).reshape(shape)
    return CheckedArray(file, array, path, sums, remedy, valid)  # type: ignore[return-value]  # it acts as one


def read_whole(
    path: Path,
    dtype: Any,
    shape: tuple[int, ...],
    files: Mapping[str, Sums] | None,
    marker: str,
    remedy: str,
) -> np.ndarray:
    """The same, checked whole at once: a plain array, memory-mapped."""
    return mapped(path, dtype, shape, files, marker=marker, remedy=remedy).whole()  # type: ignore[attr-defined, no-any-return]


def rising(
    array: np.ndarray, path: Path, remedy: str, *, first: int | None = None, last: int | None = None
) -> None:
    """Raises ``DamagedStoreError`` for offsets that fall, or do not begin and end where they must."""
    good = bool((np.diff(array) >= 0).all())
    if len(array):
        good &= (first is None or int(array[0]) == first) and (last is None or int(array[-1]) == last)
    if not good:
        raise DamagedStoreError(f"{path} is damaged: its numbers do not rise as they must; {remedy}")


def within(array: np.ndarray, low: int, high: int, path: Path, remedy: str) -> None:
    """Raises ``DamagedStoreError`` for values outside ``low`` to ``high - 1``."""
    if len(array) and not (low <= int(array.min()) and int(array.max()) < high):
        raise DamagedStoreError(
            f"{path} is damaged: it holds {int(array.min())} to {int(array.max())}, outside {low} to "
            f"{high - 1}; {remedy}"
        )
