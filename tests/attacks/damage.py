"""Seeded damage of files: flipped bits, zeroed ranges, cuts, bytes put at the end, files of another run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from featureinterp.errors import FeatureInterpError

KINDS = ("flip", "zero", "cut", "append", "swap")


@dataclass(frozen=True)
class Stored:
    """A stored part. ``files``: those that are damaged, by their names in ``folder``; ``read``: everything
    that a user gets from it, in a form that can be compared; ``other``: the folder of a part of the same kind
    with other content, None where what is stored goes by the content of what was asked, so that another one's
    rows are never found."""

    name: str
    folder: Path
    other: Path | None
    files: tuple[str, ...]
    read: Callable[[Path], object]


def damaged(data: bytes, other: bytes, kind: str, rng: random.Random) -> bytes:
    """The content of a file after one accident."""
    at = rng.randrange(max(1, len(data)))
    match kind:
        case "flip" if data:
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case "zero":
            n = rng.choice((1, 4, 16, 512, 4096))
            return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]
        case "cut":
            return data[:at]
        case "swap":
            return other
        case _:
            return data + rng.randbytes(rng.choice((1, 4, 8, 100)))


def attack(stored: Stored, n: int, work: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """``n`` damages one after the other, each on a copy that is whole: what was done, and how it ended:
    ``right``, ``refused``, ``wrong`` or ``crash: …``."""
    wanted = stored.read(stored.folder)
    for number in range(n):
        file, kind = (
            stored.files[number % len(stored.files)],
            rng.choice(KINDS if stored.other else KINDS[:-1]),
        )
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(stored.folder, work)
        path, data = work / file, (stored.folder / file).read_bytes()
        theirs = (stored.other / file).read_bytes() if stored.other else b""
        path.write_bytes(damaged(data, theirs, kind, rng))
        yield f"{stored.name}: {kind} {file}", _outcome(stored, work, wanted)


def _outcome(stored: Stored, work: Path, wanted: object) -> str:
    try:
        return "right" if stored.read(work) == wanted else "wrong"
    except FeatureInterpError as error:
        one_sentence = str(error) and "\n" not in str(error)
        return "refused" if one_sentence else f"crash: {str(error)!r} has several lines"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
