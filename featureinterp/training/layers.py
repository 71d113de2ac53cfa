"""Which layer to train on: how well each one holds labelled concepts, and what its covariance looks like,
with and without the tokens that dominate it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.codes.collect import positions_of, scored_by_norm
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.domain.score import Interval
from featureinterp.errors import InputError
from featureinterp.intervals import interval_of, resample_counts
from featureinterp.machine.accelerator import to_host
from featureinterp.probing.auroc import auroc_vec
from featureinterp.probing.decode import fit_logreg
from featureinterp.probing.labels import Labels
from featureinterp.probing.splits import joined, split_indices
from featureinterp.probing.tokens import TableTokens
from featureinterp.subject.load import Subject
from featureinterp.subject.reading import BATCH_TOKENS, Batch, read_windows

Steps = Callable[[str, int, int], None]
TRIMS = (0.0, 0.01, 0.05)
"""Shares of the tokens that are left out, those that reach farthest along the first direction."""
LEAST = 10
"""Positive tokens, in training and in test, that a concept needs."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues λ of the covariance of some tokens, largest first. ``participation_ratio`` (Σλ)² / Σλ²;
    ``stable_rank`` Σλ / λ₁; ``k50``, ``k90``, ``k99``: directions for that share of the variance; ``gap`` λ₁
    / λ₂; ``channel``, ``channel_share``: the channel with the largest part of the first direction, and its
    squared weight there; ``token_share``: the largest part of the variance along the first direction that one
    token of the sample has."""

    participation_ratio: float
    stable_rank: float
    k50: int
    k90: int
    k99: int
    gap: float
    channel: int
    channel_share: float
    token_share: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A block and what was measured after it. ``aurocs``: by concept, of a linear probe on held-out
    documents; ``auroc``: their mean. ``spectra``: without the shares of ``TRIMS`` of the tokens."""

    block: int
    hook: str
    aurocs: dict[str, float]
    auroc: float
    interval: Interval | None
    spectra: tuple[Spectrum, ...]
    median_norm: float
    sink_share: float


@dataclass(frozen=True)
class LayerStudy:
    """``best``: the recommended block; ``reasons``: why, in sentences."""

    model: str
    layers: tuple[Layer, ...]
    concepts: tuple[str, ...]
    n_tokens: int
    n_documents: int
    best: int
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {**asdict(self), "trims": list(TRIMS)}

    def layer(self, block: int) -> Layer:
        """What was measured after a block."""
        return next(layer for layer in self.layers if layer.block == block)


def choose_layer(
    subject: Subject,
    corpus: Corpus,
    labels: Labels,
    policy: WindowPolicy = WindowPolicy(64, 8, 50_000),
    *,
    blocks: Sequence[int] | None = None,
    test_fraction: float = 0.4,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    steps: Steps = lambda *_: None,
) -> LayerStudy:
    """Measures the residual stream after ``blocks`` (all when None) on one sample of the corpus. Activations
    lie in a temporary folder meanwhile.
    """
    chosen = sorted(set(range(subject.n_blocks) if blocks is None else blocks))
    hooks = [f"blocks.{block}.hook_resid_post" for block in chosen]
    if not chosen:
        raise InputError("there is no block to measure: name at least one")
    for hook in hooks:
        subject.check_hook(hook)
    with tempfile.TemporaryDirectory(prefix="featureinterp-layers-") as folder:
        windows = build_windows(corpus, subject.encoder, policy, Path(folder) / "windows")
        positions = np.flatnonzero(np.arange(windows.length) < np.asarray(windows.lengths)[:, None])
        tokens = TableTokens(windows, positions)
        arrays, scored = _activations(subject, hooks, windows, tokens, Path(folder), batch_tokens, steps)
        found = tokens.labelled(labels, corpus)
        train, test = split_indices(len(positions), test_fraction, seed, tokens.documents, tokens.texts)
        groups = joined(tokens.documents, tokens.texts)
        concepts = [
            i
            for i in range(len(found.names))
            if all(LEAST <= found.labels[rows, i].sum() <= len(rows) - LEAST for rows in (train, test))
        ]
        if not concepts:
            raise InputError(f"no concept has {LEAST} tokens in training and in test: take more tokens")
        wanted = found.labels[:, concepts]
        names = tuple(found.names[i] for i in concepts)
        layers, resampled = [], []
        for number, (block, x) in enumerate(zip(chosen, arrays, strict=True)):
            layer, by_document = _measure(
                block, x, scored[number], wanted, names, train, test, groups, tokens.texts, seed
            )
            layers.append(layer)
            resampled.append(by_document)
            steps("layers", number + 1, len(chosen))
    best, reasons = recommend(layers, np.stack(resampled))
    return LayerStudy(
        subject.name,
        tuple(layers),
        names,
        len(positions),
        len(np.unique(tokens.documents)),
        best,
        tuple(reasons),
    )


def _activations(
    subject: Subject,
    hooks: Sequence[str],
    windows: WindowTable,
    tokens: TableTokens,
    folder: Path,
    batch_tokens: int,
    steps: Steps,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per hook the activations of all tokens, float32 ``[token, d_model]``, mapped; and which are scored."""
    n = len(tokens.positions)
    arrays = [
        np.memmap(folder / f"{i}.bin", np.float32, "w+", shape=(n, subject.d_model))
        for i in range(len(hooks))
    ]
    scored = [np.zeros(n, bool) for _ in hooks]
    done = 0

    def finish(_: Batch, found: list[torch.Tensor]) -> list[np.ndarray]:
        floats = [residual.float() for residual in found]
        return to_host(*floats, *(scored_by_norm(values.norm(dim=-1), subject) for values in floats))

    for batch, found in read_windows(subject, hooks, windows, finish, batch_tokens=batch_tokens):
        places = tokens.row_of_position[positions_of(windows, batch.rows, batch.length)].ravel()
        for i in range(len(hooks)):
            arrays[i][places] = found[i].reshape(-1, subject.d_model)
            scored[i][places] = found[len(hooks) + i].reshape(-1)
        done += batch.n_tokens
        steps("tokens", done, n)
    return [np.asarray(a) for a in arrays], scored


def _measure(
    block: int,
    x: np.ndarray,
    scored: np.ndarray,
    wanted: np.ndarray,
    names: Sequence[str],
    train: np.ndarray,
    test: np.ndarray,
    groups: np.ndarray,
    texts: np.ndarray,
    seed: int,
) -> tuple[Layer, np.ndarray]:
    """A layer, and its mean AUROC over concepts in resamples of the test documents (``groups``). Probes read
    scored tokens; spectra all of them.
    """
    train, test = train[scored[train]], test[scored[test]]
    logits = fit_logreg(x, wanted, train, l2=(0.04, 0.004), groups=groups, texts=texts, seed=seed).predict(
        x, test
    )
    aurocs = {name: float(auroc_vec(logits[:, i], wanted[test, i])) for i, name in enumerate(names)}
    resampled = _resampled(logits, wanted[test], groups[test], seed)
    norms = np.linalg.norm(x, axis=1)
    layer = Layer(
        block,
        f"blocks.{block}.hook_resid_post",
        aurocs,
        float(np.nanmean(list(aurocs.values()))),
        interval_of(resampled),
        spectra(x),
        float(np.median(norms)),
        float((norms[~scored] ** 2).sum() / (norms**2).sum()),
    )
    return layer, resampled


def _resampled(
    logits: np.ndarray, wanted: np.ndarray, documents: np.ndarray, seed: int, n: int = 200
) -> np.ndarray:
    """The mean AUROC over concepts in bootstrap samples of documents, float64 ``[n]``; the same samples for
    every layer.
    """
    from featureinterp.intervals import weighted_aurocs

    member = np.unique(documents, return_inverse=True)[1]
    counts = resample_counts(int(member.max()) + 1, np.random.default_rng([seed, 6]), n)[:, member]
    values = np.stack([weighted_aurocs(logits[:, i], wanted[:, i], counts) for i in range(wanted.shape[1])])
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.nanmean(values, axis=0)
    return found


def spectra(x: np.ndarray, trims: Sequence[float] = TRIMS) -> tuple[Spectrum, ...]:
    """The spectrum of activations ``[token, d]``, and again without shares of the tokens: those that reach
    farthest along the first direction of all.
    """
    whole, reach = _spectrum(x)
    order = np.argsort(reach)
    found = [
        whole if not trim else _spectrum(x[np.sort(order[: len(x) - max(1, round(trim * len(x)))])])[0]
        for trim in trims
    ]
    return tuple(found)


def _spectrum(x: np.ndarray) -> tuple[Spectrum, np.ndarray]:
    """The spectrum, and how far every token reaches along the first direction."""
    mean = x.mean(0, dtype=np.float64)
    covariance = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), 8192):
        centred = x[start : start + 8192].astype(np.float64) - mean
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance / len(x))
    values, first = np.maximum(values[::-1], 0), vectors[:, -1]
    total = float(values.sum())
    if not total:
        raise InputError("all activations of a layer are equal: there is no spectrum")
    reach = np.abs(x @ first.astype(np.float32) - np.float32(mean @ first))
    shares = np.cumsum(values) / total
    k50, k90, k99 = (int(np.searchsorted(shares, share - 1e-12)) + 1 for share in (0.5, 0.9, 0.99))
    channel = int(np.argmax(first**2))
    gap = float(values[0] / max(values[1], 1e-30)) if len(values) > 1 else float("inf")
    spectrum = Spectrum(
        total**2 / float((values**2).sum()),
        total / float(values[0]),
        k50,
        k90,
        k99,
        gap,
        channel,
        float(first[channel] ** 2),
        float(reach.astype(np.float64).max() ** 2 / max(float((reach.astype(np.float64) ** 2).sum()), 1e-30)),
    )
    return spectrum, reach


def recommend(layers: Sequence[Layer], resampled: np.ndarray) -> tuple[int, list[str]]:
    """The block to train on: of those that no resample of documents can tell from the best by AUROC (95 %),
    the one with the most directions in use (participation ratio without 5 % of the tokens). ``resampled
    [layer, sample]``: mean AUROCs of the same samples."""
    means = np.array([layer.auroc for layer in layers])
    top = int(np.nanargmax(means))
    error = np.nanstd(resampled[top] - resampled, axis=1)
    close = [i for i in range(len(layers)) if means[top] - means[i] <= error[i]]
    chosen = max(close, key=lambda i: layers[i].spectra[-1].participation_ratio)
    layer, best = layers[chosen], layers[top]
    reasons = [f"block {layer.block}: probes reach a mean AUROC of {layer.auroc:.3f} on held-out documents"]
    if chosen != top:
        reasons[0] += (
            f"; the highest is {best.auroc:.3f}, after block {best.block}, within one standard error"
        )
    if len(close) > 1:
        others = ", ".join(str(layers[i].block) for i in close)
        reasons.append(
            f"of the blocks that are level ({others}) it uses the most directions: a participation ratio "
            f"of {layer.spectra[-1].participation_ratio:.1f} "
            "without the 5 % of tokens that reach farthest along the first direction"
        )
    whole, trimmed = layer.spectra[0], layer.spectra[-1]
    if whole.participation_ratio * 2 < trimmed.participation_ratio:
        reasons.append(
            f"its participation ratio is {whole.participation_ratio:.1f} with all tokens and "
            f"{trimmed.participation_ratio:.1f} without {TRIMS[-1]:.0%}: "
            "a few tokens (attention sinks) dominate it and must be left out of training"
        )
    if layer.spectra[-1].channel_share > 0.5:
        reasons.append(
            f"its first direction is mostly channel {layer.spectra[-1].channel}: normalise, or watch that "
            "channel"
        )
    return layer.block, reasons


def parse_blocks(text: str) -> list[int] | None:
    """``all`` (None), ``0,7,14`` or ``0:30:2``. Raises ``InputError``."""
    if text == "all":
        return None
    try:
        if ":" in text:
            parts = [int(p) for p in text.split(":")]
            return list(range(*parts))
        return [int(p) for p in text.split(",")]
    except (ValueError, TypeError) as error:
        raise InputError(f"{text!r} names no blocks: write all, 0,7,14 or 0:30:2") from error
