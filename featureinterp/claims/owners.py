"""Who works in a folder now.

:func:`owned` holds a folder for the process that writes there (``.owner.lock``, a lock of the system that
ends with the process, however it ends; ``.owner.json`` says who holds it). :func:`reading` marks it for a
process that reads there (``.reader-….lock`` and ``.reader-….json``, of as many as like): what is being read
is not replaced.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import filelock

from featureinterp.claims.contents import Content
from featureinterp.errors import FolderInUseError, StorageError
from featureinterp.files import explained_storage, parse_json, write_json
from featureinterp.visible import visible

T = TypeVar("T")
LOCK, OWNER, READER, REPLACING = ".owner.lock", ".owner.json", ".reader-", ".replacing"
_STALE_S = 1.0
"""How long an owner may take to say its name."""
_WAIT_S = 0.25
_TRIES = 5


@contextmanager
def owned(folder: Path, verb: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds ``folder`` for the block; it is made when it does not exist. Processes that die, by whatever
    signal, hold nothing.

    Raises ``FolderInUseError`` with host, process and time when another process, or another block of this
    one, holds it; with ``waiting`` it waits until the folder is free, and tells ``waiting`` once who holds it
    (for what one process makes for all of them).
    """
    lock = _lock(folder)
    with explained_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder, waiting)
    try:
        write_json(folder / OWNER, _myself(verb))
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: filelock.BaseFileLock, folder: Path, waiting: Callable[[str], None] | None) -> None:
    for attempt in itertools.count():
        try:
            lock.acquire(blocking=False)
            return
        except filelock.Timeout as error:
            owner = _said(folder / OWNER)
            if owner is None and attempt == 0:  # whoever held it has let go, or only looked
                continue
            refused = FolderInUseError(_refusal(folder, owner))
            if waiting is None:
                raise refused from error
            if attempt <= 1:
                waiting(str(refused))
            time.sleep(_WAIT_S)


def check_free(folder: Path) -> None:
    """Raises ``FolderInUseError`` when a process holds ``folder``; writes nothing. For saying so before long
    work.
    """
    if not (folder / LOCK).exists():
        return
    lock = _lock(folder)
    with explained_storage(folder):
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            if (owner := _said(folder / OWNER)) is not None:
                raise FolderInUseError(_refusal(folder, owner)) from error
            return
    lock.release()


@contextmanager
def reading(folder: Path, content: Content, verb: str) -> Iterator[None]:
    """Marks content of ``folder`` as read for the block, beside whoever else reads it: :func:`replacing` is
    refused then. Where nothing can be written, or there is no folder, there is no mark.

    Raises ``FolderInUseError`` when a process is replacing it.
    """
    mark = _mark(folder, content, verb)
    try:
        if _replaced(folder) == content.name:  # either the mark was seen, or this is
            check_free(folder)
        yield
    finally:
        if mark is not None:
            _unmark(mark)


def while_reading(folder: Path, content: Content, verb: str, items: Iterable[T]) -> Iterator[T]:
    """The items, with ``folder`` marked as :func:`reading` does until the last one has been taken."""
    with reading(folder, content, verb):
        yield from items


@contextmanager
def replacing(folder: Path, content: Content, parts: Sequence[Path]) -> Iterator[None]:
    """For the block that deletes ``parts`` of a content of a folder that is owned. Raises
    ``FolderInUseError`` when a process reads that content, or is at work in one of the parts."""
    flag = folder / REPLACING
    try:
        flag.write_text(content.name, encoding="utf-8")
        _refuse_readers(folder, content)
        for path in parts:
            if path.is_dir() and not path.is_symlink():
                for lock in path.rglob(LOCK):
                    check_free(lock.parent)
        yield
    finally:
        flag.unlink(missing_ok=True)


def _replaced(folder: Path) -> str:
    """The name of the content that is being replaced, or was when its replacer died."""
    with suppress(OSError, ValueError):
        return (folder / REPLACING).read_text(encoding="utf-8")
    return ""


def _mark(folder: Path, content: Content, verb: str) -> filelock.BaseFileLock | None:
    """The lock of a new mark; None where there can be none."""
    for _ in range(_TRIES):
        if not folder.is_dir():
            return None
        path = folder / f"{READER}{secrets.token_hex(6)}.lock"
        lock = filelock.FileLock(path, thread_local=False)
        try:
            write_json(path.with_suffix(".json"), {**_myself(verb), "reads": content.name})
            lock.acquire(timeout=_STALE_S)
        except (OSError, StorageError):
            with suppress(OSError):
                path.with_suffix(".json").unlink(missing_ok=True)
            return None
        if path.exists():
            return lock
        _unmark(lock)  # it was taken for one that a dead process left
    return None


def _unmark(lock: filelock.BaseFileLock) -> None:
    path = Path(lock.lock_file)
    with suppress(OSError):
        path.with_suffix(".json").unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _refuse_readers(folder: Path, content: Content) -> None:
    """Raises ``FolderInUseError`` when a process reads a content of a folder; what dead readers left is
    deleted.
    """
    for path in sorted(folder.glob(f"{READER}*.lock")):
        lock = filelock.FileLock(path, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            reader = _said(path.with_suffix(".json"))
            if reader is not None and reader["reads"] not in ("", content.name):
                continue
            raise FolderInUseError(_refusal(folder, reader, f"reads its {content.name}")) from error
        _unmark(lock)
    for path in folder.glob(f"{READER}*.json"):
        if not path.with_suffix(".lock").exists() and _said(path, wait_s=0) is None:
            path.unlink(missing_ok=True)


def _lock(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / LOCK, thread_local=False)


def _refusal(folder: Path, owner: Mapping[str, Any] | None, does: str = "holds it") -> str:
    advice = "wait until it ends, or give another folder"
    if owner is None:
        return f"{folder} is in use by another process: {advice}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    return (
        f"{folder} is in use: process {owner['pid']} on {owner['host']} ({owner['verb']}) {does} "
        f"since {since}; {advice}"
    )


def _myself(verb: str) -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "verb": verb, "since": time.time()}


def _said(path: Path, wait_s: float = _STALE_S) -> dict[str, Any] | None:
    """Who somebody says to be in a file; None when it is not said in time, or by one that is dead."""
    end = time.monotonic() + wait_s
    while True:
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            found = parse_json(_text_of(path))
            owner: dict[str, Any] = {
                "pid": int(found["pid"]),
                "since": float(found["since"]),
                "host": visible(str(found["host"])[:64]),
            }
            time.localtime(owner["since"])  # a time that no clock has is no owner's
            owner |= {name: visible(str(found.get(name, ""))[:40]) for name in ("verb", "reads")}
            if owner["host"] != socket.gethostname() or _lives(owner["pid"]):
                return owner
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


def _text_of(path: Path) -> str:
    """What a small file says; a pipe in its place would be waited for."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_text(encoding="utf-8")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
