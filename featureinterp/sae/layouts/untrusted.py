"""Files of strangers: what they say of themselves is compared with their size before anything is allocated.

Every reader of a layout opens its files through this module. A file must be a regular one (a pipe would
block, a device would never end), JSON is bounded and unambiguous, and an archive unpacks to no more than its
own size allows.
"""

from __future__ import annotations

import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage

FETCH_AGAIN = "fetch it again"
MAX_JSON = 4 << 20
"""Bytes of a configuration at most."""
MAX_MEMBERS = 4096
MAX_DIRECTORY = 1 << 20
"""Bytes of an archive's list of members at most."""
MAX_PICKLE = 1 << 20
"""Bytes of the part of a torch file that says which tensors there are."""
SLACK = 32 << 20
"""Bytes that a small archive may unpack to beyond twice its size."""
_MAX_DIGITS = 40
_MAX_SHOWN = 60
_LISTED = 8
ARCHIVE_ERRORS = (
    ValueError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    KeyError,
    zlib.error,
    zipfile.BadZipFile,
)
"""What the library raises for an archive that is damaged, encrypted or packed in a way that it does not know.
"""


def shown(value: object) -> str:
    """A value from a file for a message: quoted, without control characters, cut."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def listed(names: Iterable[str]) -> str:
    """Names from a file for a message; the first few of many."""
    found = sorted(names)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(shown(name) for name in found[:_LISTED]) + more if found else "none at all"


def file_size(path: Path) -> int:
    """Bytes of a regular file. Raises ``IncompatibleError`` for a pipe, a device or a folder."""
    with explained_storage(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise IncompatibleError(f"{path} is not a regular file: give a copy of the file itself")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises ``IncompatibleError`` when it holds no JSON object, or two values of one
    name.
    """
    size = file_size(path)
    if size > MAX_JSON:
        raise IncompatibleError(f"{path} has {size:,} bytes: a configuration has at most {MAX_JSON:,}")
    with explained_storage(path), path.open("rb") as file:
        return parse_json(file.read(MAX_JSON), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The same of bytes that stand in ``path``."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        reason = str(error) if len(str(error)) < 200 else type(error).__name__
        raise IncompatibleError(f"{path} is not JSON: {reason}") from error
    if not isinstance(value, dict):
        raise IncompatibleError(f"{path} is not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"two values are named {shown(next(name for name in names if names.count(name) > 1))}"
        )
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def archive_members(path: Path, *, packed: bool) -> list[zipfile.ZipInfo]:
    """The members of a zip archive, from its directory alone. ``packed``: whether they may be compressed.

    Raises ``IncompatibleError`` when it is no archive, has two members of one name, or would unpack to more
    than fits.
    """
    size = file_size(path)
    damaged = f"{path} cannot be read: it was cut or damaged; {FETCH_AGAIN}"
    _check_directory(path, size)
    try:
        with explained_storage(path), zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except ARCHIVE_ERRORS as error:
        raise IncompatibleError(damaged) from error
    if len(found) > MAX_MEMBERS:
        raise IncompatibleError(
            f"{path} holds {len(found):,} members: a checkpoint has at most {MAX_MEMBERS:,}"
        )
    names = [entry.filename for entry in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise IncompatibleError(
            f"{path} has two members named {shown(twice)}: it is damaged or forged; {FETCH_AGAIN}"
        )
    kinds = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} if packed else {zipfile.ZIP_STORED}
    for entry in found:
        stored = entry.compress_type == zipfile.ZIP_STORED
        if entry.compress_type not in kinds or entry.flag_bits & 1:
            raise IncompatibleError(
                f"{path} holds {shown(entry.filename)} packed or encrypted: save it again, not packed"
            )
        if entry.header_offset + entry.compress_size > size or (
            stored and entry.file_size != entry.compress_size
        ):
            raise IncompatibleError(damaged)
    total = sum(entry.file_size for entry in found)
    if total > (2 * size + SLACK if packed else size):
        raise IncompatibleError(
            f"{path} has {size:,} bytes and unpacks to {total:,}: it is no checkpoint of weights"
        )
    return found


def _check_directory(path: Path, size: int) -> None:
    """The library reads an archive's whole directory, so its declared size is looked at first."""
    with explained_storage(path), path.open("rb") as file:
        file.seek(max(0, size - (1 << 16) - 128))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) < at + 22:
            raise IncompatibleError(
                f"{path} cannot be read as an archive of tensors: it was cut or damaged; {FETCH_AGAIN}"
            )
        directory = struct.unpack_from("<I", tail, at + 12)[0]
        if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
            file.seek(min(struct.unpack_from("<Q", tail, at - 12)[0], size))
            record = file.read(56)
            inner = struct.unpack_from("<Q", record, 40)[0] if len(record) == 56 else size
            directory = inner if directory == 0xFFFFFFFF else max(directory, inner)
    if directory > MAX_DIRECTORY:
        raise IncompatibleError(
            f"{path} lists its members in {directory:,} bytes: a checkpoint needs at most {MAX_DIRECTORY:,}"
        )
