"""Checksums of files by block, and the markers that carry them.

A marker is a JSON file that is written last and says that a part is complete. A sealed one has ``checksum``,
``crc32:`` and eight hexadecimal digits of everything else in it, and ``files``: for every file of the part
its ``bytes``, the ``block`` size, and ``crc32``, eight digits per block. A marker without either was written
by an earlier version: it is read as it is.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from featureinterp.errors import DamagedStoreError, StorageError
from featureinterp.files import opened_file, whole_file, write_json

BLOCK_BYTES = 1 << 16
MOST_BLOCKS = 1 << 14
_PREFIX = "crc32:"
_SEAL, _FILES = "checksum", "files"


def block_for(size: int) -> int:
    """A block size for a file of ``size`` bytes: 64 KiB, more where that gives more than 16,384 blocks."""
    block = BLOCK_BYTES
    while size > block * MOST_BLOCKS:
        block *= 2
    return block


class Sums:
    """The CRC-32 of every block of a file of ``size`` bytes. More can be added at its end."""

    __slots__ = ("block", "crcs", "size")

    def __init__(self, block: int = BLOCK_BYTES, size: int = 0, crcs: list[int] | None = None) -> None:
        self.block, self.size, self.crcs = block, size, crcs or []

    def add(self, data: Any) -> None:
        """Takes the bytes that follow (any contiguous buffer)."""
        view = memoryview(data)
        view = view if view.nbytes == 0 or (view.format == "B" and view.ndim == 1) else view.cast("B")
        at, n = 0, view.nbytes
        while at < n:
            inside = self.size % self.block
            take = min(self.block - inside, n - at)
            part = view[at : at + take]
            if inside:
                self.crcs[-1] = zlib.crc32(part, self.crcs[-1])
            else:
                self.crcs.append(zlib.crc32(part))
            at += take
            self.size += take

    def copy(self) -> Sums:
        """One that does not change with this one."""
        return Sums(self.block, self.size, list(self.crcs))

    def to_json(self) -> dict[str, Any]:
        """As a marker holds it."""
        return {
            "bytes": self.size,
            "block": self.block,
            "crc32": struct.pack(f">{len(self.crcs)}I", *self.crcs).hex(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sums:
        """Raises ``ValueError`` or another error of wrong data for what is no such thing."""
        digits, block, size = value["crc32"], int(value["block"]), int(value["bytes"])
        if block < 1 or size < 0 or len(digits) != 8 * -(-size // block):
            raise ValueError(f"{len(digits) // 8} checksums of blocks of {block} bytes for {size} bytes")
        return cls(block, size, list(struct.unpack(f">{len(digits) // 8}I", bytes.fromhex(digits))))

    @classmethod
    def of(cls, path: Path, block: int | None = None, size: int | None = None) -> Sums:
        """Those of a file as it is now, or of its first ``size`` bytes (no bytes: there need be no file)."""
        if size == 0:
            return cls(block or BLOCK_BYTES)
        with opened_file(path) as file:
            left = os.fstat(file.fileno()).st_size if size is None else size
            sums = cls(block or block_for(left))
            while left and (data := file.read(min(left, 1 << 20))):
                sums.add(data)
                left -= len(data)
        return sums

    def damage(self, path: Path) -> str | None:
        """What is wrong with a file, None when it is what these sums say. Reads it whole."""
        if not path.is_file():
            return f"{path} is missing"
        now = Sums.of(path, self.block)
        if now.size != self.size:
            return f"{path} has {now.size:,} bytes instead of {self.size:,}"
        wrong = [i for i, (a, b) in enumerate(zip(now.crcs, self.crcs, strict=True)) if a != b]
        if wrong:
            return (
                f"{path} is damaged at byte {wrong[0] * self.block:,} (blocks of {self.block:,} bytes: "
                f"{len(wrong)} of {len(self.crcs)})"
            )
        return None


class SummedFile:
    """A binary file that keeps the sums of what is written to it, from its beginning or from where ``sums``
    stands.
    """

    def __init__(self, file: IO[bytes], sums: Sums | None = None) -> None:
        self.file, self.sums = file, sums or Sums()

    def write(self, data: Any) -> None:
        """Writes any contiguous buffer."""
        self.file.write(data)
        self.sums.add(data)


@dataclass(frozen=True, slots=True)
class Marker:
    """What a marker says: ``value`` without its checksums, and those of its ``files``; None: an earlier
    version wrote it.
    """

    value: dict[str, Any]
    files: Mapping[str, Sums] | None


def sealed(value: Mapping[str, Any], files: Mapping[str, Sums] | None = None) -> dict[str, Any]:
    """A marker's content with its checksums."""
    whole = (
        dict(value) if files is None else {**value, _FILES: {name: s.to_json() for name, s in files.items()}}
    )
    return {**whole, _SEAL: _checksum(whole)}


def write_marker(path: Path, value: Mapping[str, Any], files: Mapping[str, Sums] | None = None) -> None:
    """Writes a sealed marker as readable JSON, atomically."""
    write_json(path, sealed(value, files))


def read_marker(path: Path, remedy: str) -> Marker:
    """Reads a marker. ``remedy`` says what to do about a damaged one ("delete … and run … again").

    Raises ``DamagedStoreError`` for one that is no JSON or is not what was written, and ``StorageError`` when
    there is none.
    """
    return marker_of(whole_file(path), path, remedy)


def read_cache(path: Path) -> dict[str, Any] | None:
    """What a cache keeps in a marker; None when there is none, or it is not what was written: what it holds
    is then found out anew.
    """
    try:
        return read_marker(path, "").value
    except StorageError:
        return None


def marker_of(content: bytes, path: Path, remedy: str) -> Marker:
    """The same from a marker's content; ``path`` is named in errors."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{path} is damaged: it is no JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise DamagedStoreError(f"{path} is damaged: it holds no JSON object; {remedy}")
    if not is_sealed(value):
        return Marker(value, None)
    seal = value.pop(_SEAL, None)
    with described(path, remedy):
        if seal != _checksum(value):
            raise DamagedStoreError(
                f"{path} is damaged: it is not what was written (its checksum differs); {remedy}"
            )
        files = {str(name): Sums.from_json(sums) for name, sums in value.pop(_FILES, {}).items()}
    return Marker(value, files)


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Whether a marker has anything of a seal. One damaged key or value does not make a marker look like an
    earlier version's.
    """
    return (
        _SEAL in value
        or _FILES in value
        or any(isinstance(v, str) and v.startswith(_PREFIX) for v in value.values())
    )


def _checksum(value: Mapping[str, Any]) -> str:
    """Of a marker's content, whatever the order of its keys and its white space."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f"{_PREFIX}{zlib.crc32(text.encode()):08x}"


@contextmanager
def described(path: Path, remedy: str) -> Iterator[None]:
    """Turns errors of wrong data in a stored part into one sentence. Keep the block to what reads the
    data.
    """
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        AttributeError,
        RecursionError,
        zlib.error,
    ) as error:
        raise DamagedStoreError(
            f"{path} is damaged: {type(error).__name__} {error} while reading it; {remedy}"
        ) from error


def check_size(path: Path, size: int, marker: str, remedy: str) -> None:
    """Raises ``DamagedStoreError`` for a file that is missing or has not ``size`` bytes."""
    if not path.is_file():
        raise DamagedStoreError(f"{path} is missing: {remedy}")
    if (now := path.stat().st_size) != size:
        raise DamagedStoreError(
            f"{path} has {now:,} bytes instead of the {size:,} that {marker} declares: {remedy}"
        )


def checked_lines(path: Path, sums: Sums, remedy: str) -> Iterator[bytes]:
    """The lines of a file, each one after the blocks that it lies in have been checked; what is not asked for
    is not read.

    Raises ``DamagedStoreError`` for a block, or a size, that is not what ``sums`` say.
    """
    check_size(path, sums.size, "its marker", remedy)
    left = b""
    with opened_file(path) as file:
        for number, crc in enumerate(sums.crcs):
            block = file.read(sums.block)
            if zlib.crc32(block) != crc:
                raise DamagedStoreError(f"{path} is damaged at byte {number * sums.block:,}: {remedy}")
            *lines, left = (left + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
    if left:
        yield left


def checked_bytes(path: Path, sums: Sums | None, remedy: str) -> bytes:
    """A whole file's content. Raises ``DamagedStoreError`` when it is not what ``sums`` say (None: not
    known).
    """
    content = whole_file(path)
    if sums is not None:
        now = Sums(sums.block)
        now.add(content)
        if (now.size, now.crcs) != (sums.size, sums.crcs):
            raise DamagedStoreError(
                f"{path} is damaged: it is not what was written (its checksum differs); {remedy}"
            )
    return content
