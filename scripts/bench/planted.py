"""Features whose meaning is known, because it was planted: detectors over a corpus, with their true
explanation and wrong ones of named kinds.

A detector is a regular expression over a window's text; the tokens of its match (of its group ``x`` where it
has one) get an activation. Activations are graded, as real ones are: the detector's strength, times a share
from 0.6 to 1 that belongs to the word, times one from 0.85 to 1 that belongs to the place.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from featureinterp.codes.runs import RunWriter
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.windows import WindowTable
from featureinterp.domain.explanation import Explanation, Provenance, Rule

Wrong = Literal["another concept", "too broad", "too narrow", "rule missing", "strengths swapped"]
WRONG: tuple[Wrong, ...] = ("another concept", "too broad", "too narrow", "rule missing", "strengths swapped")
SCALE = 8.0
"""Activation of strength 5 at its largest."""


@dataclass(frozen=True)
class Part:
    """What a detector fires on, how strongly (1 to 5), and how that is said."""

    pattern: str
    text: str
    strength: int = 5


@dataclass(frozen=True)
class Planted:
    """A planted feature. ``broad``: a description that fires on much more; ``narrow``: one that misses
    most.
    """

    name: str
    family: str
    parts: tuple[Part, ...]
    broad: str
    narrow: str

    @property
    def truth(self) -> Explanation:
        """Its true explanation, as rules."""
        return _explanation(*((p.text, p.strength) for p in self.parts))

    def wrong(self, others: Sequence[Planted]) -> dict[Wrong, Explanation]:
        """Wrong explanations by kind; "another concept" is the truth about the first of ``others`` of another
        family.
        """
        found: dict[Wrong, Explanation] = {
            "another concept": next(o for o in others if o.family != self.family).truth,
            "too broad": _explanation((self.broad, 5)),
            "too narrow": _explanation((self.narrow, 5)),
        }
        if len(self.parts) > 1:
            one, two = self.parts
            found["rule missing"] = _explanation((one.text, one.strength))
            found["strengths swapped"] = _explanation((two.text, one.strength), (one.text, two.strength))
        return found


def _explanation(*rules: tuple[str, int]) -> Explanation:
    return Explanation(
        tuple(Rule(text, strength) for text, strength in sorted(rules, key=lambda r: -r[1])),
        Provenance("planted"),
    )


def _load() -> tuple[Planted, ...]:
    """The features of ``planted.toml``."""
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    single = {
        f["name"]: Planted(f["name"], f["family"], (Part(f["pattern"], f["text"]),), f["broad"], f["narrow"])
        for f in data["feature"]
    }
    unions = []
    for union in data["union"]:
        strong, weak = (single[name].parts[0] for name in union["of"])
        unions.append(
            Planted(
                "+".join(union["of"]),
                "union",
                (strong, replace(weak, strength=2)),
                union["broad"],
                union["narrow"],
            )
        )
    return (*single.values(), *unions)


FEATURES = _load()


def development(feature: Planted) -> bool:
    """Whether a feature is of the half by which defaults are chosen (every other one of its family); the
    other half is reported.
    """
    return [f.name for f in FEATURES if f.family == feature.family].index(feature.name) % 2 == 0


def activations(feature: Planted, pieces: Sequence[str], row: int) -> np.ndarray:
    """The planted activations of a window, float32 ``[token]``; where two parts of a feature meet, the
    larger.
    """
    text = "".join(pieces)
    ends = np.cumsum([len(p) for p in pieces])
    starts = ends - [len(p) for p in pieces]
    found = np.zeros(len(pieces), np.float32)
    for part in feature.parts:
        for start, end in spans(part.pattern, text):
            word = text[start:end].lower()
            value = (
                SCALE
                * part.strength
                / 5
                * (0.6 + 0.4 * _share(word))
                * (0.85 + 0.15 * _share(f"{row} {start} {word}"))
            )
            inside = (starts < end) & (ends > start)
            found[inside] = np.maximum(found[inside], value)
    return found


def spans(pattern: str, text: str) -> Iterator[tuple[int, int]]:
    """Where a detector fires: each match, or the group of it that is named."""
    compiled = _compiled(pattern)
    names = list(compiled.groupindex)
    for match in compiled.finditer(text):
        yield next((match.span(name) for name in names if match.span(name)[0] >= 0), match.span())


@lru_cache(256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@lru_cache(200_000)
def _share(text: str) -> float:
    """A number from 0 to 1 that belongs to a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def plant(run: Path, windows: WindowTable, features: Sequence[Planted] = FEATURES) -> CodesStore:
    """Writes the features' activations as the codes of a run folder that holds ``windows``, so that every
    verb works on them.
    """
    if (run / "codes" / "codes.json").exists():
        return CodesStore.open(run)
    writer = RunWriter(
        run / "codes",
        n_features=len(features),
        n_positions=len(windows) * windows.length,
        value_dtype="float16",
    )
    for row in range(writer.next_window, len(windows)):
        pieces = windows.pieces(row)
        dense = np.stack([activations(feature, pieces, row) for feature in features])
        index, offset = np.nonzero(dense)
        writer.add(
            row * windows.length + offset,
            index,
            dense[index, offset],
            n_scored=len(pieces),
            end_window=row + 1,
        )
    digest = hashlib.sha256(
        json.dumps([[p.pattern, p.strength] for f in features for p in f.parts]).encode()
    ).hexdigest()
    planted = {"name": "planted", "fingerprint": digest, "hook": "none", "architecture": "detectors"}
    model = {"name": "none", "fingerprint": digest, "dtype": "none"}
    corpus = {"name": "sotu", "windows": windows.fingerprint}
    writer.finish(
        {
            "key": digest,
            "model": model,
            "sae": planted,
            "corpus": corpus,
            "mask": {},
            "window_length": windows.length,
        }
    )
    return CodesStore.open(run)
