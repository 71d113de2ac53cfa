"""Predicted against true activations, token by token.

``true`` is raw activations, ``predicted`` expected levels, both concatenated over the scored windows.
Intervals resample windows, not tokens, because tokens of one window are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featureinterp.domain.record import Window
from featureinterp.domain.score import Agreement, Score, Simulation
from featureinterp.intervals import bootstrap


@dataclass(frozen=True, eq=False)
class Pairs:
    """Simulated windows with what is true of them; ``n_failed`` more could not be simulated. Each list has
    one array per window.
    """

    true: tuple[np.ndarray, ...]
    predicted: tuple[np.ndarray, ...]
    n_failed: int = 0

    @classmethod
    def of(cls, windows: Sequence[Window], simulations: Sequence[Simulation]) -> Pairs:
        """Pairs windows with their simulations; failed ones are counted, never filled in."""
        kept = [(w, s.expected) for w, s in zip(windows, simulations, strict=True) if s.expected is not None]
        for window, expected in kept:
            if len(expected) != len(window.activations):
                raise AssertionError(
                    f"a simulation has {len(expected)} levels for a window of {len(window.activations)} "
                    "tokens"
                )
        true = tuple(np.asarray(w.activations, np.float64) for w, _ in kept)
        return cls(true, tuple(np.asarray(e, np.float64) for _, e in kept), len(windows) - len(kept))

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.true + other.true, self.predicted + other.predicted, self.n_failed + other.n_failed)

    @property
    def y(self) -> np.ndarray:
        """All true activations, ``[token]``."""
        return np.concatenate(self.true) if self.true else np.zeros(0)

    @property
    def x(self) -> np.ndarray:
        """All predictions, ``[token]``."""
        return np.concatenate(self.predicted) if self.predicted else np.zeros(0)


def correlation(pairs: Pairs, name: str = "correlation", *, seed: int = 0) -> Score:
    """Pearson's r of predicted and true activations, with a bootstrap interval over windows.

    Undefined, never 0, when either is constant.
    """
    x, y = pairs.x, pairs.y
    reason = _constant(x, y)
    if reason:
        return Score(name, None, len(pairs.true), pairs.n_failed, undefined=reason)
    sums = _sums(pairs)
    interval = bootstrap(lambda counts: _pearson(counts @ sums), len(sums), np.random.default_rng(seed))
    return Score(name, float(_pearson(sums.sum(0)[None])[0]), len(pairs.true), pairs.n_failed, interval)


def agreement(windows: Sequence[Window], simulations: Sequence[Simulation]) -> Agreement:
    """Pearson's r over all windows, and with each window left out."""
    pairs = Pairs.of(windows, simulations)
    without = np.full(len(windows), np.nan)
    if _constant(pairs.x, pairs.y):
        return Agreement(None, without, pairs.n_failed)
    sums = _sums(pairs)
    simulated = [i for i, s in enumerate(simulations) if s.expected is not None]
    if len(simulated) > 1:
        without[simulated] = _pearson(sums.sum(0) - sums)
    return Agreement(float(_pearson(sums.sum(0)[None])[0]), without, pairs.n_failed)


def _sums(pairs: Pairs) -> np.ndarray:
    """Rows of (n, Σx, Σy, Σx², Σy², Σxy), one per window, of centred predictions and activations."""
    return np.array(
        [
            [len(a), a.sum(), b.sum(), a @ a, b @ b, a @ b]
            for a, b in zip(_centred(pairs.predicted), _centred(pairs.true), strict=True)
        ]
    )


def _constant(x: np.ndarray, y: np.ndarray) -> str | None:
    if len(x) < 2:
        return "no window could be simulated"
    if np.ptp(y) == 0:
        return "the true activations are constant over the scored windows"
    return "the predictions are constant over the scored windows" if np.ptp(x) == 0 else None


def _centred(parts: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    mean = np.concatenate(parts).mean()
    return [part - mean for part in parts]


def _pearson(sums: np.ndarray) -> np.ndarray:
    """r from rows of (n, Σx, Σy, Σx², Σy², Σxy); NaN where a variance is 0."""
    n, x, y, xx, yy, xy = sums.T
    vx, vy = xx - x * x / n, yy - y * y / n
    floor = (
        1e-12 * max(float(np.max(xx, initial=0)), 1e-300),
        1e-12 * max(float(np.max(yy, initial=0)), 1e-300),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (xy - x * y / n) / np.sqrt(vx * vy)
    return np.where((vx > floor[0]) & (vy > floor[1]), np.clip(r, -1, 1), np.nan)


def explained_variance(
    valid: Pairs, test: Pairs, name: str = "explained_variance", *, seed: int = 0
) -> Score:
    """1 − Σ(y − ŷ)² / Σ(y − ȳ)² on test, where ŷ = a·x + b is the best affine fit of activations on
    predictions in valid.
    """
    n, failed = len(test.true), test.n_failed
    if reason := _constant(valid.x, valid.y):
        return Score(name, None, n, failed, undefined=f"no affine fit on the validation windows: {reason}")
    if not n or np.ptp(test.y) == 0:
        return Score(
            name, None, n, failed, undefined="the true activations are constant over the test windows"
        )
    slope, shift = affine_fit(valid)
    sums = np.array(
        [
            [len(y), y.sum(), y @ y, np.square(y - slope * x - shift).sum()]
            for x, y in zip(test.predicted, test.true, strict=True)
        ]
    )

    def statistic(counts: np.ndarray) -> np.ndarray:
        count, total, squares, errors = (counts @ sums).T
        variance = squares - total * total / count
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(variance > 1e-12 * squares.max(), 1 - errors / variance, np.nan)

    value = float(statistic(np.ones((1, n)))[0])
    return Score(name, value, n, failed, bootstrap(statistic, n, np.random.default_rng(seed)))


def affine_fit(pairs: Pairs) -> tuple[float, float]:
    """Slope and intercept of the least-squares line from predictions to activations."""
    x, y = pairs.x, pairs.y
    slope = float(np.cov(x, y, bias=True)[0, 1] / x.var())
    return slope, float(y.mean() - slope * x.mean())


def deviation_explained(
    valid: Pairs, test: Pairs, name: str = "deviation_explained", *, seed: int = 0
) -> Score:
    """1 − mean|y − ŷ| / mean|y| on test, with the same affine fit as :func:`explained_variance`."""
    n, failed = len(test.true), test.n_failed
    if reason := _constant(valid.x, valid.y):
        return Score(name, None, n, failed, undefined=f"no affine fit on the validation windows: {reason}")
    if not n or not test.y.any():
        return Score(name, None, n, failed, undefined="the feature is silent on all test windows")
    slope, shift = affine_fit(valid)
    sums = np.array(
        [
            [np.abs(y - slope * x - shift).sum(), np.abs(y).sum()]
            for x, y in zip(test.predicted, test.true, strict=True)
        ]
    )

    def statistic(counts: np.ndarray) -> np.ndarray:
        errors, size = (counts @ sums).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(size > 0, 1 - errors / size, np.nan)

    return Score(
        name,
        float(statistic(np.ones((1, n)))[0]),
        n,
        failed,
        bootstrap(statistic, n, np.random.default_rng(seed)),
    )


def false_positives(valid: Pairs, silent: Pairs, name: str = "false_positives", *, seed: int = 0) -> Score:
    """Silent tokens of ``silent`` that are predicted as strongly as the feature's own tokens are, per window:
    at the median prediction over the tokens of ``valid`` that fire or above it, and above 0. So that it means
    the same for every simulator, whatever share of the levels it uses."""
    n, failed = len(silent.true), silent.n_failed
    if not n:
        return Score(name, None, 0, failed, undefined="no window could be simulated")
    own = valid.x[valid.y > 0]
    if not len(own):
        return Score(
            name,
            None,
            n,
            failed,
            undefined="no validation window in which the feature fires could be simulated",
        )
    level = max(float(np.median(own)), np.finfo(float).tiny)
    counts = np.array(
        [((x >= level) & (y <= 0)).sum() for x, y in zip(silent.predicted, silent.true, strict=True)], float
    )
    return Score(
        name,
        float(counts.mean()),
        n,
        failed,
        bootstrap(lambda c: c @ counts / n, n, np.random.default_rng(seed)),
    )
