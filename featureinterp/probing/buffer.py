"""Codes with their labels, in one file."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.files import replaced_atomically
from featureinterp.probing.columns import Columns, as_columns, as_labels, checked_columns, is_torch
from featureinterp.probing.splits import joined

_INSTANCES = "inst_"


@dataclass(frozen=True)
class ActivationBuffer:
    """What probing needs of N tokens. ``codes`` ``[N, F]`` ≥ 0 (any form of :func:`as_columns`; held by
    feature); ``labels`` bool ``[N, L]``; ``label_names`` L different strings; ``dense`` float16 ``[N, D]``,
    the activations that the codes were made from; ``instances``: concept → int32 ``[N]``, or ``[N, depth]``
    where instances of one concept overlap, −1 outside every instance; ``documents`` int32 ``[N]``; ``texts``
    ``[N]``: a whole number for the text of each token's window, the same for the same text (uint64), so that
    no text is in training and in test.

    Raises ``InputError`` or ``IncompatibleError``, naming the shapes, for parts that do not fit.
    """

    codes: Columns
    labels: np.ndarray
    label_names: tuple[str, ...]
    dense: np.ndarray | None = None
    instances: Mapping[str, np.ndarray] = field(default_factory=dict)
    documents: np.ndarray | None = None
    texts: np.ndarray | None = None

    def __post_init__(self) -> None:
        codes = as_columns(self.codes)
        labels = as_labels(self.labels, codes.n_rows)
        names = tuple(str(name) for name in self.label_names)
        if len(names) != labels.shape[1]:
            raise IncompatibleError(
                f"there are {len(names)} label names for labels of shape {labels.shape}: give one per column"
            )
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the label {twice!r} is there twice: label names must be different")
        instances = {
            str(name): _whole_numbers(ids, codes.n_rows, f"instances of {name!r}", (1, 2))
            for name, ids in self.instances.items()
        }
        for name in instances:
            if name not in names:
                raise UnknownNameError(
                    f"there are instances of {name!r}, which is no label: the labels are {', '.join(names)}"
                )
        dense: Any = self.dense
        if dense is not None:
            dense = np.asarray(dense.detach().cpu().numpy() if is_torch(dense) else dense)
            if dense.ndim != 2 or len(dense) != codes.n_rows or not np.issubdtype(dense.dtype, np.floating):
                raise IncompatibleError(
                    f"dense activations of shape {dense.shape} and type {dense.dtype} do not fit "
                    f"{codes.n_rows} tokens"
                )
        documents = (
            None
            if self.documents is None
            else _whole_numbers(self.documents, codes.n_rows, "documents", (1,))
        )
        texts = (
            None if self.texts is None else _whole_numbers(self.texts, codes.n_rows, "texts", (1,), np.uint64)
        )
        checked = {
            "codes": codes,
            "labels": labels,
            "label_names": names,
            "dense": dense,
            "instances": instances,
        }
        for name, value in {**checked, "documents": documents, "texts": texts}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.codes.n_rows

    @cached_property
    def name_idx(self) -> dict[str, int]:
        """Label name → its column."""
        return {name: i for i, name in enumerate(self.label_names)}

    @cached_property
    def groups(self) -> np.ndarray | None:
        """What splits, resamples and shifts keep together, ``[N]``: documents, those of the same text as
        one.
        """
        return self.documents if self.texts is None else joined(self.documents, self.texts)

    def instances_of(self, name: str) -> np.ndarray:
        """The instance ids of a concept: as given, or else each run of its tokens within a document."""
        from featureinterp.probing.annotate import runs_of

        if name not in self.name_idx:
            raise UnknownNameError(
                f"there is no label {name!r}: the labels are {', '.join(self.label_names)}"
            )
        found = self.instances.get(name)
        return runs_of(self.labels[:, self.name_idx[name]], self.documents) if found is None else found

    def save(self, path: str | Path) -> None:
        """Writes one ``.npz`` file: ``codes_offsets``, ``codes_rows``, ``codes_values``, ``labels``,
        ``label_names``, and where they are there ``dense``, ``inst_CONCEPT``, ``documents`` and ``texts``.
        The file appears under its name when it is whole."""
        arrays = {
            "codes_offsets": self.codes.offsets,
            "codes_rows": self.codes.rows,
            "codes_values": self.codes.values,
            "labels": self.labels,
            "label_names": np.array(self.label_names, dtype=np.str_),
            **({} if self.dense is None else {"dense": self.dense}),
            **({} if self.documents is None else {"documents": self.documents}),
            **({} if self.texts is None else {"texts": self.texts}),
            **{_INSTANCES + name: ids for name, ids in self.instances.items()},
        }
        with replaced_atomically(Path(path)) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle

    @classmethod
    def load(cls, path: str | Path) -> ActivationBuffer:
        """Reads a file of :meth:`save`, or the plain ``.npz`` of others (dense ``codes``, ``labels``,
        ``label_names``, ``dense``, ``inst_CONCEPT``). Nothing in it is ever executed; a file with Python
        objects in it is refused. Raises ``InputError``."""
        path = Path(path)
        try:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise InputError(
                    f"{path} holds one array: give an .npz file with codes, labels and label_names"
                )
            with file:
                held = {name: _array(file, name, path) for name in file.files}
        except FileNotFoundError as error:
            raise UnknownNameError(f"there is no file {path}") from error
        except _UNREADABLE as error:
            raise InputError(
                f"{path} is not a readable .npz file "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
        own = "codes_offsets" in held
        missing = [
            n
            for n in (("codes_offsets", "codes_rows", "codes_values") if own else ("codes",))
            + ("labels", "label_names")
            if n not in held
        ]
        if missing:
            raise InputError(f"{path} has no array {missing[0]!r} (it has: {', '.join(held) or 'nothing'})")
        codes: Any = _columns(held, path) if own else held["codes"]
        instances = {
            name.removeprefix(_INSTANCES): ids for name, ids in held.items() if name.startswith(_INSTANCES)
        }
        names = tuple(_text(n) for n in held["label_names"].ravel())
        return cls(
            codes,
            held["labels"],
            names,
            held.get("dense"),
            instances,
            held.get("documents"),
            held.get("texts"),
        )


_UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, SyntaxError, OverflowError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What numpy and zipfile raise at files that are damaged, or none of theirs."""


def _array(file: Any, name: str, path: Path) -> np.ndarray:
    member = name if name in file.zip.namelist() else f"{name}.npy"
    with file.zip.open(member) as raw:
        version = np.lib.format.read_magic(raw)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(raw)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > file.zip.getinfo(member).file_size:
        raise InputError(f"the array {name!r} of {path} is damaged: it declares more than the file holds")
    try:
        return np.asarray(file[name])
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise InputError(
            f"the array {name!r} of {path} holds Python objects, which can run code and are never read: "
            "save it as numbers or strings"
        ) from error


def _columns(held: Mapping[str, np.ndarray], path: Path) -> Columns:
    """Codes as they were saved; indices that point outside would read what is not theirs."""
    import scipy.sparse

    offsets, rows, values = (held[name] for name in ("codes_offsets", "codes_rows", "codes_values"))
    n_rows = len(held["labels"])
    whole = all(a.ndim == 1 and np.issubdtype(a.dtype, np.integer) for a in (offsets, rows))
    if (
        not whole
        or not len(offsets)
        or len(rows) != len(values)
        or offsets[0] != 0
        or offsets[-1] != len(rows)
        or (np.diff(offsets) < 0).any()
    ):
        raise InputError(f"the codes in {path} are damaged: their offsets do not fit their rows and values")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n_rows:
        raise InputError(
            f"the codes in {path} are damaged: they name tokens outside the {n_rows} that have labels"
        )
    held_twice = scipy.sparse.csc_matrix(
        (np.ones(len(rows), np.int8), rows, offsets), shape=(n_rows, len(offsets) - 1)
    )
    if not held_twice.has_canonical_format and (held_twice.sum_duplicates() or held_twice.nnz != len(rows)):
        raise InputError(f"the codes in {path} are damaged: a token is there twice for one feature")
    return checked_columns(n_rows, offsets.astype(np.int64), rows, values)


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _whole_numbers(
    values: Any, n: int, what: str, dimensions: tuple[int, ...], dtype: Any = np.int32
) -> np.ndarray:
    array = values.detach().cpu().numpy() if is_torch(values) else np.asarray(values)
    if array.ndim not in dimensions or len(array) != n or not np.issubdtype(array.dtype, np.integer):
        raise IncompatibleError(
            f"{what} of shape {array.shape} and type {array.dtype} do not fit {n} tokens: give whole "
            "numbers, one per token"
        )
    narrow = np.iinfo(np.int32)
    if dtype is np.int32 and array.size and not narrow.min <= array.min() <= array.max() <= narrow.max:
        numbers = np.unique(array, return_inverse=True)[1].reshape(array.shape)
        array = np.where(array < 0, -1, numbers) if 2 in dimensions else numbers  # −1: in no instance
    return array.astype(dtype)
