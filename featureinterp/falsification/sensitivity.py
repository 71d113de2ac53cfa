"""Sensitivity: how often a feature fires on new texts that a language model wrote to be like its examples.

The examples are shown without any description, so that it is the feature that is tested and not an
explanation of it. Texts are run through subject model and SAE exactly as they were written. After Tian et al.
2025, "Measuring sparse autoencoder feature sensitivity"; the control, the intervals and the thresholds
relative to the feature's scale are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featureinterp.domain.rate import Rate
from featureinterp.domain.record import FeatureRecord, SplitName, Window
from featureinterp.domain.score import Failure
from featureinterp.falsification.writing import Call
from featureinterp.prompts import marked

THRESHOLD = 1e-6
SHARES = (0.01, 0.1, 0.5)
"""Further thresholds, as shares of the feature's scale."""
MARK_ABOVE = 0.01
"""Tokens are marked whose activation is more than this share of the feature's scale."""
RELIABLE = 0.9
"""Features whose own examples fire less often than this when read again as text are left out of the published
mean.
"""


@dataclass(frozen=True, slots=True)
class Example:
    """A text from the corpus. ``text``: as it is read again. ``shown``: the same on one line, with active
    tokens marked. ``activation``: its largest in the corpus. ``tokens``: how it was split into tokens there,
    where that is known. ``held_out``: not shown to the writer."""

    text: str
    shown: str
    activation: float
    tokens: tuple[str, ...]
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class FeatureSensitivity:
    """What was found of one feature. ``samples``: the generated texts that were run, as windows;
    ``originals``: the examples, read again as text, those shown first. ``control``: largest activations of
    this feature on the texts that were written for feature ``control_of``. ``base_rate``: share of random
    spans of the corpus, as long as the generated texts, on which it fires."""

    feature: int
    scale: float
    examples: tuple[Example, ...]
    calls: tuple[Call, ...] = ()
    texts: tuple[str, ...] = ()
    samples: tuple[Window, ...] = ()
    originals: tuple[Window, ...] = ()
    control: tuple[float, ...] = ()
    control_of: int | None = None
    base_rate: float | None = None
    failure: Failure | None = None

    def generated_sensitivity(self, threshold: float = THRESHOLD) -> Rate:
        """Share of the generated texts whose largest activation exceeds ``threshold`` (raw SAE units)."""
        return rate([w.max_activation for w in self.samples], threshold)

    def original_sensitivity(self, threshold: float = THRESHOLD, *, held_out: bool = False) -> Rate:
        """The same of the examples that were shown (or of those held out), read again as text: what is lost
        by that alone.
        """
        return rate(
            [
                w.max_activation
                for e, w in zip(self.examples, self.originals, strict=False)
                if e.held_out == held_out
            ],
            threshold,
        )

    def control_rate(self, threshold: float = THRESHOLD) -> Rate:
        """The same of texts that were written for another feature."""
        return rate(self.control, threshold)

    def thresholds(self) -> dict[str, float]:
        """The thresholds by name: the published one, and shares of the scale."""
        return {"any": THRESHOLD, **{f"{100 * share:g}%": share * self.scale for share in SHARES}}

    @property
    def drift(self) -> float | None:
        """Share of the examples whose tokens are others when they are read again as text."""
        pairs = [(e, w) for e, w in zip(self.examples, self.originals, strict=False) if e.tokens]
        return sum(e.tokens != w.pieces for e, w in pairs) / len(pairs) if pairs else None


def rate(activations: Sequence[float], threshold: float) -> Rate:
    """How many exceed the threshold."""
    return Rate(int(np.count_nonzero(np.asarray(activations, float) > threshold)), len(activations))


def examples_of(record: FeatureRecord, n_top: int, n_weighted: int, half_width: int) -> tuple[Example, ...]:
    """Examples around the strongest token of top and importance-weighted windows: those of the training split
    to be shown, those of the test split held out."""
    found = []
    splits: tuple[tuple[SplitName, bool], ...] = (("train", False), ("test", True))
    for split, held_out in splits:
        windows = [*record.get(split, "top")[:n_top], *record.get(split, "weighted")[:n_weighted]]
        found += [example(w, record.scale, half_width, held_out=held_out) for w in windows if w.fires]
    return tuple(found)


def example(window: Window, scale: float, half_width: int, *, held_out: bool = False) -> Example:
    """The tokens of a window within ``half_width`` of its strongest one."""
    peak = int(np.argmax(window.activations))
    part = slice(max(0, peak - half_width), peak + half_width + 1)
    pieces, activations = window.pieces[part], window.activations[part]
    shown = marked(pieces, (activations > MARK_ABOVE * scale).tolist())
    return Example("".join(pieces), shown.strip(), float(activations.max()), pieces, held_out)


def base_rate(
    positions: np.ndarray,
    lengths: np.ndarray,
    window: int,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    n: int = 2000,
) -> float | None:
    """Share of ``n`` random spans of the corpus in which the feature fires. ``positions``: of its codes,
    ascending (row · ``window`` + offset); ``lengths``: of the windows; ``sizes``: how long spans are, drawn
    from evenly. Spans lie within a window; None without windows or sizes."""
    known = [s for s in sizes if s > 0]
    if not known or not len(lengths):
        return None
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(lengths), size=n)
    size = np.minimum(rng.choice(known, n), lengths[rows])
    start = rows * window + np.floor(rng.random(n) * (lengths[rows] - size + 1)).astype(np.int64)
    edges = np.searchsorted(positions, np.stack([start, start + size]).astype(positions.dtype))
    return float((edges[1] > edges[0]).mean())
