"""Similarity after a projection that pulls a feature's own windows together.

Sentence embeddings say how alike two texts are as a whole; a feature's windows may agree in one respect and
differ in all others. A projection that shrinks the directions in which they differ leaves that respect, and
windows that are near after it are closer misses.

``closed-form``: relevant component analysis (Bar-Hillel et al. 2003, "Learning distance functions using
equivalence relations"): whitening by the covariance of the feature's windows around their mean, here shrunk
to its largest directions and a constant for the rest. ``info-nce``: a square matrix learned by gradient
descent so that two windows of the feature are nearer to one another than to random windows (van den Oord et
al. 2018, "Representation learning with contrastive predictive coding"); slow, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from featureinterp.domain.choices import Projection

PROJECTIONS: tuple[Projection, ...] = ("closed-form", "info-nce")
DIRECTIONS = 32
"""How many directions of the windows' covariance are told apart."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction."""


class Projector(Protocol):
    """A linear map of embeddings."""

    def similarity(self, embeddings: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
        """Mean cosine, after the map, of every row of ``embeddings [n, d]`` to the rows ``query_rows``:
        float32 ``[n]``.
        """
        ...


@dataclass(frozen=True, eq=False)
class Whitening:
    """x ↦ C^(−1/2) x for a covariance C = σ² I + V diag(s) Vᵀ with few directions. ``directions``: V, float64
    ``[d, k]``, orthonormal; ``shrink``: 1 − σ² / (σ² + s) per direction, in [0, 1]."""

    directions: np.ndarray
    shrink: np.ndarray

    @classmethod
    def fit(
        cls, positives: np.ndarray, *, n_directions: int = DIRECTIONS, shrinkage: float = SHRINKAGE
    ) -> Whitening:
        """From a feature's windows, ``[positive, d]``: their covariance around their mean; what its largest
        directions leave is spread evenly.
        """
        x = np.asarray(positives, np.float64)
        n, d = x.shape
        x = x - x.mean(0)
        _, singular, rows = np.linalg.svd(x, full_matrices=False)
        variance = singular**2 / max(n - 1, 1)
        k = min(n_directions, max(n - 1, 0), d)
        total = variance.sum()
        floor = shrinkage * total / d + (total - variance[:k].sum()) / max(d - k, 1)
        if floor <= 0:
            return cls(np.zeros((d, 0)), np.zeros(0))
        kept = np.maximum(variance[:k] + shrinkage * total / d, floor)
        return cls(rows[:k].T, 1 - floor / kept)

    def similarity(self, embeddings: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
        """As :class:`Projector`; cosines are computed from inner products, xᵀ C⁻¹ y, without projecting
        anything.
        """
        parts = embeddings @ self.directions.astype(np.float32)
        norms = np.sqrt(
            np.maximum(
                np.einsum("nd,nd->n", embeddings, embeddings)
                - np.square(parts) @ self.shrink.astype(np.float32),
                1e-12,
            )
        )
        weights = (1 / norms[query_rows])[:, None]
        mean = (embeddings[query_rows] * weights).mean(0)
        mean_part = (parts[query_rows] * weights).mean(0) * self.shrink
        found: np.ndarray = (embeddings @ mean - parts @ mean_part.astype(np.float32)) / norms
        return found.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Learned:
    """x ↦ W x. ``matrix``: W, float32 ``[d, d]``."""

    matrix: np.ndarray

    @classmethod
    def fit(
        cls,
        positives: np.ndarray,
        others: np.ndarray,
        *,
        seed: int = 0,
        steps: int = 100,
        batch: int = 64,
        temperature: float = 0.1,
        rate: float = 1e-2,
    ) -> Learned:
        """InfoNCE over pairs of ``positives [n, d]`` against ``others [m, d]``, from the identity, with
        Adam.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        inside, outside = (
            torch.from_numpy(np.ascontiguousarray(part, np.float32)) for part in (positives, others)
        )
        d = inside.shape[1]
        matrix = torch.eye(d, requires_grad=True)
        if len(inside) < 2 or not len(outside):
            return cls(np.eye(d, dtype=np.float32))
        optimizer = torch.optim.Adam([matrix], lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                first = torch.randint(len(inside), (min(batch, len(inside)),), generator=generator)
                second = (first + torch.randint(1, len(inside), first.shape, generator=generator)) % len(
                    inside
                )
                wrong = outside[torch.randint(len(outside), (batch * 4,), generator=generator)]
                anchors, matches, negatives = (
                    torch.nn.functional.normalize(x @ matrix.T, dim=-1)
                    for x in (inside[first], inside[second], wrong)
                )
                near = (anchors * matches).sum(-1, keepdim=True)
                logits = torch.cat([near, anchors @ negatives.T], 1) / temperature
                loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(first), dtype=torch.long))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return cls(matrix.detach().numpy())

    def similarity(self, embeddings: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
        """As :class:`Projector`."""
        projected = embeddings @ self.matrix.T
        projected /= np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
        found: np.ndarray = projected @ projected[query_rows].mean(0)
        return found


def projected_ranking(
    embeddings: np.ndarray,
    positives: np.ndarray,
    kind: Projection,
    rng: np.random.Generator,
    silent: np.ndarray,
) -> Iterator[int]:
    """All rows, the most similar to the rows ``positives`` first, after a projection fitted to those;
    ``silent``: rows to contrast them with.
    """
    everything = np.asarray(embeddings, np.float32)
    if kind == "closed-form":
        projector: Projector = Whitening.fit(everything[positives])
    else:
        drawn = rng.choice(silent, min(len(silent), 4096), replace=False) if len(silent) else silent
        projector = Learned.fit(everything[positives], everything[drawn], seed=int(rng.integers(2**31)))
    yield from np.argsort(-projector.similarity(everything, positives), kind="stable").tolist()
