"""Folders that work is kept in: who writes there now, and what was asked for.

:func:`owned` holds a folder for this process (``.owner.lock``, a lock of the system that ends with the
process, however it ends; ``.owner.json`` says who holds it). :func:`claim` writes down what a folder's
content is of (``request.json``), and refuses a folder whose content is of something else.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from featureinterp.errors import DamagedStoreError, FolderInUseError, IncompatibleError
from featureinterp.files import content_key, explained_storage, parse_json, write_json
from featureinterp.stored.sums import read_marker, write_marker
from featureinterp.visible import visible

LOCK, OWNER, REQUEST = ".owner.lock", ".owner.json", "request.json"
_STALE_S = 1.0
"""How long an owner may take to say its name."""
_SHOWN = 3
_WAIT_S = 0.25


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
        write_json(
            folder / OWNER,
            {"host": socket.gethostname(), "pid": os.getpid(), "verb": verb, "since": time.time()},
        )
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
            owner = _owner(folder)
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
            if (owner := _owner(folder)) is not None:
                raise FolderInUseError(_refusal(folder, owner)) from error
            return
    lock.release()


def _lock(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / LOCK, thread_local=False)


def _refusal(folder: Path, owner: Mapping[str, Any] | None) -> str:
    advice = "wait until it ends, or give another folder"
    if owner is None:
        return f"{folder} is in use by another process: {advice}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    return (
        f"{folder} is in use: process {owner['pid']} on {owner['host']} ({owner['verb']}) holds it "
        f"since {since}; {advice}"
    )


def _owner(folder: Path) -> dict[str, Any] | None:
    """Who holds a folder, as it says itself; None when it does not say it in time, or what is there is of one
    that is dead.
    """
    end = time.monotonic() + _STALE_S
    while True:
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = parse_json((folder / OWNER).read_text(encoding="utf-8"))
            owner: dict[str, Any] = {
                "pid": int(found["pid"]),
                "since": float(found["since"]),
                "host": visible(str(found["host"])[:64]),
            }
            owner["verb"] = visible(str(found["verb"])[:40])
            if owner["host"] != socket.gethostname() or _lives(owner["pid"]):
                return owner
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def claim(
    folder: Path,
    what: str,
    asked: Mapping[str, Any],
    *,
    parts: Sequence[str],
    about: Mapping[str, Any] | None = None,
    replace: bool = False,
    earlier: Callable[[], Mapping[str, Any] | None] = lambda: None,
    anew: str = "--replace",
) -> None:
    """Writes down what the content of ``folder`` is of, or finds the same request there.

    ``what``: the content in words ("codes"). ``asked``: all that the content depends on, as plain data, by
    names that a person reads; hashes for what is large. ``about``: names that may change while the content
    stays. ``parts``: files and folders in ``folder`` that are of the request; with ``replace`` those of
    another request are deleted, and nothing else. ``earlier``: the request of a folder that an earlier
    version wrote, None when it cannot be known. ``anew``: what starts anew there.

    Raises ``IncompatibleError`` that says what differs when ``folder`` holds another request's parts and
    ``replace`` is off, and ``DamagedStoreError`` when ``request.json`` is damaged and the parts do not say
    themselves what they are of. Call it within :func:`owned`.
    """
    wanted = json.loads(json.dumps(dict(asked)))
    there = [folder / name for name in parts if (folder / name).exists() or (folder / name).is_symlink()]
    path = folder / REQUEST
    with explained_storage(folder):
        damage: DamagedStoreError | None = None
        try:
            found = _request(path, f"put it back, give another folder, or start anew with {anew}")
        except DamagedStoreError as error:
            found, damage = None, error
        whole = found is not None
        if found is None:
            known = earlier() if there else None
            found = None if known is None else json.loads(json.dumps(dict(known)))
        if found != wanted and there:
            if not replace:
                if found is None and damage is not None:
                    raise damage
                raise IncompatibleError(_difference(folder, what, found, wanted, anew))
            _refuse_held(there)
            for old in (path, *there):
                _delete(old)
        if found != wanted or not whole:
            write_marker(path, {"key": content_key(wanted), **wanted, "about": dict(about or {})})


def _request(path: Path, remedy: str) -> dict[str, Any] | None:
    """A request as :func:`claim` wrote it; None when there is none, or one that an earlier version wrote in
    another form.

    Raises ``DamagedStoreError`` for one that is not what was written: its checksum says so, or its key.
    """
    if not path.exists():
        return None
    found = read_marker(path, remedy).value
    if "about" not in found:
        return None
    asked = {name: value for name, value in found.items() if name not in ("key", "about")}
    if found.get("key") != content_key(asked):
        raise DamagedStoreError(f"{path} is damaged: its key is not that of its content; {remedy}")
    return asked


def _difference(
    folder: Path, what: str, found: dict[str, Any] | None, wanted: dict[str, Any], anew: str
) -> str:
    advice = f"give another folder, or start anew with {anew}"
    if found is None:
        return (
            f"{folder} holds {what}, and does not say of which request (an earlier version wrote them): "
            f"{advice}"
        )
    differences = list(_differences(found, wanted))
    more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return f"{folder} holds {what} of another request ({'; '.join(differences[:_SHOWN])}{more}): {advice}"


def _differences(found: Any, wanted: Any, place: str = "") -> Iterator[str]:
    """What differs between two requests, in words."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys((*wanted, *found)):
            yield from _differences(found.get(name), wanted.get(name), f"{place} {name}".strip())
    elif _is_plain(found) and _is_plain(wanted):
        yield (
            f"{place} {json.dumps(found, ensure_ascii=False)} there, "
            f"{json.dumps(wanted, ensure_ascii=False)} asked for"
        )
    else:
        yield f"another {place}"


def _is_plain(value: Any) -> bool:
    """Whether a value says something to a person: no hash, and not long."""
    text = str(value)
    return len(text) <= 60 and not (len(text) >= 16 and all(c in "0123456789abcdef" for c in text))


def _refuse_held(there: Sequence[Path]) -> None:
    """Raises ``FolderInUseError`` when a process is at work in one of the folders."""
    for path in there:
        if path.is_dir() and not path.is_symlink():
            for lock in path.rglob(LOCK):
                check_free(lock.parent)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
