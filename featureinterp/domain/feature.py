"""Which feature of which SAE."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class FeatureId:
    """One feature (latent) of an SAE. ``sae``: the name it was loaded by; ``index``: 0-based."""

    sae: str
    index: int

    def __str__(self) -> str:
        return f"{self.sae}/{self.index}"
