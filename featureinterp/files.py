"""Writing files so that a half-written one never stands under its final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from featureinterp.errors import StorageError

Read = TypeVar("Read")
_HALF = re.compile("[\ud800-\udfff]")


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error that a user reads when the system refused to write or read ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk is full while writing {path}: free some space and run the same command again"
        )
    return StorageError(
        f"{path} cannot be written or read ({error.strerror or error}): check the path and its permissions"
    )


@contextmanager
def explained_storage(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into a :class:`StorageError` about ``path``."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


@contextmanager
def opened_file(path: Path) -> Iterator[IO[bytes]]:
    """A regular file for reading. A pipe would block, and a device would never end.

    Raises ``StorageError`` for what is no regular file, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with explained_storage(path), os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield file


def whole_file(path: Path) -> bytes:
    """The content of a regular file. Raises as :func:`opened_file`."""
    with opened_file(path) as file:
        return file.read()


@contextmanager
def replaced_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and is gone otherwise.

    Raises ``StorageError`` when the disk is full or the folder cannot be written; ``path`` is then as it was
    before.
    """
    with explained_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes ``content`` as :func:`replaced_atomically` does."""
    with replaced_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as readable JSON, atomically. Half characters (lone surrogates) are written as JSON's
    escapes.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, _HALF.sub(lambda m: f"\\u{ord(m[0]):04x}", text))


class UnparsedError(ValueError):
    """A text that is not what it should be. ``says``: why, to go on after the name of what was read."""

    def __init__(self, says: str) -> None:
        super().__init__(f"it {says}")
        self.says = says


def parse_json(text: str | bytes) -> Any:
    """The value of a text that may be anybody's. Raises ``UnparsedError`` for what is no JSON, is nested too
    deeply, or holds a number of thousands of digits."""
    return _parsed(json.loads, text, "JSON")


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text that may be anybody's. Raises ``UnparsedError`` as :func:`parse_json`."""
    return _parsed(tomllib.loads, text, "TOML")


def _parsed(read: Callable[[Any], Read], text: str | bytes, kind: str) -> Read:
    try:
        return read(text)
    except RecursionError as error:
        raise UnparsedError("is nested too deeply to be read: remove or flatten it") from error
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnparsedError(f"is not {kind} ({getattr(error, 'msg', error)})") from error
    except ValueError as error:  # of int(), beyond the limit of digits
        raise UnparsedError("holds a number that is too long to be read: remove or shorten it") from error


def sha256_of(path: Path, chunk_bytes: int = 1 << 22) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with opened_file(path) as file:
        while block := file.read(chunk_bytes):
            digest.update(block)
    return digest.hexdigest()


def content_key(value: Any) -> str:
    """A hash of a JSON-serialisable value: equal for equal content, whatever the order of keys. 32
    hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def readable_name(path: Path) -> str:
    r"""A path as text that can be written anywhere: bytes of it that are no UTF-8 are shown as ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def valid_unicode(text: str) -> str:
    """The text with lone surrogates (which JSON can carry and UTF-8 cannot) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def whole_characters(value: Any) -> Any:
    """JSON with U+FFFD for every half of a character (a lone surrogate), which no file can hold."""
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, list):
        return [whole_characters(v) for v in value]
    return (
        {valid_unicode(k): whole_characters(v) for k, v in value.items()}
        if isinstance(value, dict)
        else value
    )
