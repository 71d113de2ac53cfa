"""What is known of a feature from the corpus: windows where it fires and windows where it nearly does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

from featureinterp.domain.feature import FeatureId

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")

Source = str
"""A kind of window: one of ``SOURCES``, ``counterexample``, or one that another package has registered. Where
its name ends in ``SILENT``, the feature is silent in it."""
SILENT = "_negative"
POSITIVE_SOURCES: tuple[Source, ...] = ("top", "weighted", "quantile")
NEGATIVE_SOURCES: tuple[Source, ...] = (
    "random_negative",
    "similar_negative",
    "projected_similar_negative",
    "coactive_negative",
)
COMPLEMENTARY_SOURCES: tuple[Source, ...] = ("random", "similar", "projected_similar", *NEGATIVE_SOURCES)
SOURCES: tuple[Source, ...] = (*POSITIVE_SOURCES, *COMPLEMENTARY_SOURCES)
"""How a window got into a record. ``random``, ``similar`` and ``projected_similar`` are drawn without looking
at whether the feature fires; in a negative one it is silent. ``similar``: sentence embeddings near those of
the top windows; ``projected_similar``: the same after a projection that pulls the top windows together;
``coactive``: a feature of nearly the same decoder direction fires. A ``counterexample`` comes from no corpus:
it was written to test an explanation."""


@dataclass(frozen=True, eq=False)
class Window:
    """A span of tokens with one feature's activations.

    ``row``: its number in the window table; ``start``: first token kept of that row (above 0 only where a
    window was centred on a token). ``pieces``: exact text of each token, joined they are the text.
    ``token_ids`` int32 ``[token]``; ``activations`` float32 ``[token]``, raw SAE units, ≥ 0. ``holistic``
    float32 ``[token]``, in the same units: how much the mean activation falls without the token; None where
    it was not computed.
    """

    row: int
    document: int
    token_ids: np.ndarray
    pieces: tuple[str, ...]
    activations: np.ndarray
    start: int = 0
    holistic: np.ndarray | None = None

    @property
    def text(self) -> str:
        """The window's text."""
        return "".join(self.pieces)

    @property
    def max_activation(self) -> float:
        """Its largest activation; 0 where the feature is silent."""
        return float(self.activations.max(initial=0.0))

    @property
    def fires(self) -> bool:
        """Whether the feature has a positive code anywhere in it."""
        return self.max_activation > 0


@dataclass(frozen=True)
class FeatureRecord:
    """All examples of one feature, by split and source.

    ``scale``: its largest activation in the corpus; ``density``: share of scored tokens where it fires;
    ``count``: on how many.
    ``shortfalls``: for each "split/source" that has fewer windows than were asked for, how many are missing
    and why.
    ``holistic``: the method of its windows' holistic activations ("exact", "gradient"), None where there are
    none.
    """

    feature: FeatureId
    scale: float
    density: float
    count: int
    splits: Mapping[SplitName, Mapping[Source, tuple[Window, ...]]]
    shortfalls: Mapping[str, str] = field(default_factory=dict)
    holistic: str | None = None

    def __post_init__(self) -> None:
        rows = {split: {w.row for w in self.windows(split)} for split in SPLITS}
        texts = {split: {(w.token_ids.tobytes(), w.pieces) for w in self.windows(split)} for split in SPLITS}
        documents = {split: {w.document for w in self.windows(split)} for split in SPLITS}
        for what, seen in (("document", documents), ("window", rows), ("text", texts)):
            for one, other in combinations(SPLITS, 2):
                if both := seen[one] & seen[other]:
                    raise AssertionError(
                        f"{what} {min(both)} of feature {self.feature} is in both {one} and {other}"
                    )
        for split in SPLITS:
            for source, windows in self.splits.get(split, {}).items():
                if source.endswith(SILENT) and any(w.activations.any() for w in windows):
                    raise AssertionError(f"a {source} window of feature {self.feature} fires")

    def get(self, split: SplitName, source: Source) -> tuple[Window, ...]:
        """The windows of one split and source; empty where there are none."""
        return self.splits.get(split, {}).get(source, ())

    def windows(self, split: SplitName) -> Iterator[Window]:
        """All windows of a split."""
        own = self.splits.get(split, {})
        others = (source for source in own if source not in SOURCES and source != "counterexample")
        for source in (*SOURCES, *others):
            yield from self.get(split, source)

    def level(self, window: Window) -> list[int]:
        """Each token's activation as an integer level 0–5: floor(5 · a / scale)."""
        return levels(window.activations, self.scale)


def levels(activations: np.ndarray, scale: float) -> list[int]:
    """floor(5 · a / scale), clipped to 0 … 5, for activations ``[token]`` ≥ 0; all 0 when the scale is 0."""
    if scale <= 0:
        return [0] * len(activations)
    found = np.clip(np.floor(5 * np.asarray(activations, np.float64) / scale + 1e-9), 0, 5)
    return [int(level) for level in found]
