"""Whether the disk takes what the service and its workers have to write."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES = 1 << 20
"""What is written, and deleted again, to see whether a disk that was full takes something. Free space alone
does not say it: a quota may be used up."""


@dataclass(frozen=True)
class Disk:
    """The disk under a folder. ``enough``: there is room to start a job, or to take one on."""

    free_bytes: int
    needed_bytes: int
    enough: bool


def room(folder: Path, needed_bytes: int, *, probe: bool = False) -> Disk:
    """The disk under ``folder``; ``probe``: has been full, so that it must take a file before there is said
    to be room.
    """
    free = shutil.disk_usage(folder).free
    return Disk(free, needed_bytes, free >= needed_bytes and not (probe and is_full(folder)))


def is_full(folder: Path, n_bytes: int = PROBE_BYTES) -> bool:
    """Whether the disk under ``folder`` does not take ``n_bytes`` more; other faults are no question of
    room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(n_bytes))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in FULL
    return False


def says_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False
