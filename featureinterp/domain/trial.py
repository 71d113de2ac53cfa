"""An explanation on trial: texts that were written to test it, and what the feature really does on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from featureinterp.domain.explanation import Rule
from featureinterp.domain.plain import AsRow, Plain
from featureinterp.domain.rate import Rate


@dataclass(frozen=True, slots=True)
class TrialText:
    """A text that was written about an explanation, or (``alike``) like the feature's own examples. ``fits``:
    by the explanation it should make the feature fire; a judge says so of what is written like examples.
    ``pieces`` and ``activations`` (raw SAE units): one entry per token."""

    text: str
    fits: bool
    pieces: tuple[str, ...]
    activations: tuple[float, ...]
    alike: bool = False

    @property
    def max_activation(self) -> float:
        """Its largest activation."""
        return max(self.activations, default=0.0)


@dataclass(frozen=True)
class Trial(Plain):
    """One explanation's trial. A text fires when its largest activation exceeds ``threshold`` (raw units)."""

    rules: tuple[Annotated[Rule, AsRow()], ...]
    texts: tuple[Annotated[TrialText, AsRow()], ...]
    threshold: float

    def fires(self, text: TrialText) -> bool:
        """Whether the feature fires on a text of the trial."""
        return text.max_activation > self.threshold

    @property
    def contradictions(self) -> tuple[TrialText, ...]:
        """The texts on which the feature does otherwise than the explanation says."""
        return tuple(t for t in self.texts if self.fires(t) != t.fits)

    @property
    def precision(self) -> Rate:
        """Share of the fitting texts on which the feature fires: low when the explanation is too broad, or
        about something else.
        """
        return Rate(sum(self.fires(t) for t in self.texts if t.fits), sum(t.fits for t in self.texts))

    @property
    def recall(self) -> Rate:
        """Share of the texts on which it fires that fit: low when the explanation is too narrow. Undefined
        when it fires on none.
        """
        firing = [t for t in self.texts if self.fires(t)]
        return Rate(sum(t.fits for t in firing), len(firing))

    @property
    def f1(self) -> float:
        """Harmonic mean of both; 0 when the feature fires on no fitting text."""
        hits = self.precision.hits
        return 2 * hits / (self.precision.n + self.recall.n) if hits else 0.0
