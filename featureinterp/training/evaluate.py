"""What an SAE is worth, on activations of documents that it never saw: variance explained beside its
baselines, sparsity, dead features, and what the model loses when it reads the reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from featureinterp.codes.collect import scored_tokens
from featureinterp.corpus.windows import WindowTable
from featureinterp.domain.score import Interval
from featureinterp.errors import IncompatibleError, InputError
from featureinterp.intervals import interval_of, resample_counts
from featureinterp.machine.accelerator import fit_of, in_parts, on_gpu, to_host
from featureinterp.sae.base import SparseAutoencoder, layer_norm
from featureinterp.sae.codes import SparseCodes
from featureinterp.subject.hooks import replaced
from featureinterp.subject.load import Subject, as_subject
from featureinterp.training.store import ActivationStore

ROWS = 4096
WINDOWS, WINDOWS_ON_GPU = 8, 64
"""Windows whose predictions are compared at once."""
DECILES = 10
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Explained:
    """Variance explained by one way of reconstructing: 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² over all rows, ``raw``;
    and with every row less its own mean and over its own deviation, ``normalised``, where each row counts
    alike. ``by_norm``: raw, for tenths of the rows by their norm, the smallest first."""

    raw: float
    normalised: float
    by_norm: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Loss:
    """Cross-entropy of the subject's predictions in nats per token: as it is, reading reconstructions,
    reading zeros. ``recovered`` = 1 − (sae − clean) / (zero − clean), not clipped; None when zeros cost
    nothing, ``undefined`` says why."""

    clean: float
    sae: float
    zero: float
    n_tokens: int

    @property
    def recovered(self) -> float | None:
        """The share of what zeros cost that the reconstruction saves."""
        return None if self.undefined else 1 - (self.sae - self.clean) / (self.zero - self.clean)

    @property
    def undefined(self) -> str | None:
        """Why there is no such share; None when there is one."""
        if not all(map(math.isfinite, (self.clean, self.sae, self.zero))):
            return "a cross-entropy is not finite"
        if self.zero > self.clean:
            return None
        return (
            f"the model predicts no worse when it reads zeros ({self.zero:.3f} against {self.clean:.3f} "
            "nats per token)"
        )


@dataclass(frozen=True)
class Evaluation:
    """``zero``: all codes zero; ``pca``: the first ``pca_k`` components of the training activations (None
    without those). ``norms``: edges of the tenths of the row norm. ``l0``: codes per row; ``dead``: share of
    features that fired on no row; ``dead_in_training``: that were dead by the counter at the end of training.
    ``frequency``: log10 of the share of rows on which each alive feature fires, as counts in
    ``frequency_edges``."""

    n_rows: int
    n_documents: int
    sae: Explained
    interval: Interval | None
    zero: Explained
    pca: Explained | None
    pca_k: int
    norms: tuple[float, ...]
    l0: float
    dead: float
    dead_in_training: float | None
    frequency: tuple[int, ...]
    frequency_edges: tuple[float, ...]
    loss: Loss | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures; ``loss.recovered`` beside its parts, and under ``loss.undefined`` the reason when
        there is none.
        """
        found = asdict(self)
        if self.loss is not None:
            found["loss"] |= {"recovered": self.loss.recovered, "undefined": self.loss.undefined}
        return found


class _Sums:
    """Squared errors of one reconstruction: in all, normalised, by document and by tenth of the norm."""

    def __init__(self, n_documents: int) -> None:
        self.normalised = 0.0
        self.by_document = np.zeros(n_documents)
        self.by_decile = np.zeros(DECILES)

    def add(
        self,
        x: Float[Tensor, "row d"],
        guess: Float[Tensor, "row d"],
        documents: Int64[np.ndarray, " row"],
        deciles: Int64[np.ndarray, " row"],
    ) -> None:
        """``guess``: of the rows ``x``."""
        errors = (x - guess).double().pow(2).sum(1)
        self.normalised += float((errors / _variance(x)).sum())
        numbers = errors.cpu().numpy()
        self.by_document += np.bincount(documents, numbers, len(self.by_document))
        self.by_decile += np.bincount(deciles, numbers, DECILES)

    def explained(self, mean: _Sums, normal_mean: _Sums) -> Explained:
        """Beside the sums of guessing the mean, and in normalised space its mean."""
        with np.errstate(invalid="ignore", divide="ignore"):
            tenths = 1 - self.by_decile / mean.by_decile
        share = 1 - self.by_document.sum() / mean.by_document.sum()
        return Explained(
            float(share),
            1 - self.normalised / normal_mean.normalised,
            tuple(float(t) if np.isfinite(t) else None for t in tenths),
        )


def _variance(x: Float[Tensor, "row d"]) -> Float64[Tensor, " row"]:
    """Of each row over its own dimensions."""
    return x.double().var(1).clamp_min(1e-12)


def evaluate(
    sae: SparseAutoencoder,
    test: ActivationStore,
    sample: Float32[np.ndarray, "row d"] | None = None,
    *,
    max_rows: int | None = None,
    pca: int = 32,
    dead_in_training: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """``test``: a store of documents that were not trained on. ``sample``: training activations, for
    the PCA. Raises ``IncompatibleError`` for a store of another width."""
    rows = _rows(test, sae.d_in, max_rows, seed)
    if pca < 1:
        raise InputError(f"a PCA of {pca} components is not possible: choose at least 1")
    pca = min(pca, sae.d_in)
    parts = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    mean, normal_mean, norms = _first_pass(test, parts)
    edges = np.quantile(norms, np.linspace(0, 1, DECILES + 1))
    documents = np.unique(np.asarray(test.documents)[rows], return_inverse=True)[1]
    n_documents = int(documents.max()) + 1
    components = principal(sample, pca) if sample is not None else None
    ways = {name: _Sums(n_documents) for name in ("sae", "zero", "pca", "mean", "normal mean")}
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    done = 0
    for part in parts:
        raw = test.read(part)
        x = torch.from_numpy(raw).to(sae.device)
        with torch.inference_mode():
            codes = sae.encode(x)
            fired += torch.bincount(codes.features, minlength=sae.d_sae)
            guesses = {
                "sae": sae.decode(codes),
                "zero": sae.decode(_none(codes)),
                "mean": mean.to(x).expand_as(x),
            }
            if components is not None:
                centre, directions = components
                guesses["pca"] = centre.to(x) + (x - centre.to(x)) @ directions.to(x).T @ directions.to(x)
            deciles = np.clip(
                np.searchsorted(edges, np.linalg.norm(raw, axis=1), side="right") - 1, 0, DECILES - 1
            )
            for name, guess in guesses.items():
                ways[name].add(x, guess, documents[done : done + len(part)], deciles)
            ways["normal mean"].normalised += float(
                (layer_norm(x)[0].double() - normal_mean.to(x.device)).pow(2).sum()
            )
        done += len(part)
        if progress:
            progress(done, len(rows))
    baselines = ways["mean"], ways["normal mean"]
    rate = fired.cpu().numpy() / len(rows)
    counts, bins = np.histogram(
        np.log10(rate[rate > 0]), bins=np.arange(np.floor(-np.log10(len(rows))), 0.25, 0.25)
    )
    return Evaluation(
        n_rows=len(rows),
        n_documents=n_documents,
        sae=ways["sae"].explained(*baselines),
        interval=_interval(ways["sae"].by_document, ways["mean"].by_document, seed),
        zero=ways["zero"].explained(*baselines),
        pca=ways["pca"].explained(*baselines) if components is not None else None,
        pca_k=pca,
        norms=tuple(float(e) for e in edges),
        l0=float(fired.sum()) / len(rows),
        dead=float((rate == 0).mean()),
        dead_in_training=dead_in_training,
        frequency=tuple(int(c) for c in counts),
        frequency_edges=tuple(float(b) for b in bins),
    )


def _rows(test: ActivationStore, d_in: int, max_rows: int | None, seed: int) -> np.ndarray:
    """The rows to judge by, in their order."""
    if test.d_model != d_in:
        raise IncompatibleError(
            f"the SAE takes activations of width {d_in}, and {test.folder} holds some of width "
            f"{test.d_model}: give a store of its hook"
        )
    if len(test) < 2:
        raise InputError(f"{test.folder} has {len(test)} rows: at least 2 are needed to evaluate")
    if max_rows is not None and max_rows < 2:
        raise InputError(f"an evaluation on {max_rows} rows is not possible: allow at least 2")
    if max_rows is None or max_rows >= len(test):
        return np.arange(len(test))
    return np.sort(np.random.default_rng([seed, 3]).choice(len(test), max_rows, replace=False))


def _first_pass(
    test: ActivationStore, parts: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """The mean of the rows, float64; of the normalised rows; and every row's norm."""
    n = sum(map(len, parts))
    mean, normal, norms = (
        torch.zeros(test.d_model, dtype=torch.float64),
        torch.zeros(test.d_model, dtype=torch.float64),
        [],
    )
    for part in parts:
        x = torch.from_numpy(test.read(part))
        mean += x.double().sum(0) / n
        normal += layer_norm(x)[0].double().sum(0) / n
        norms.append(x.norm(dim=1).numpy())
    return mean, normal, np.concatenate(norms)


def _none(codes: SparseCodes) -> SparseCodes:
    """No code at all, for the same rows."""
    return replace(codes, rows=codes.rows[:0], features=codes.features[:0], values=codes.values[:0])


def _interval(errors: np.ndarray, total: np.ndarray, seed: int) -> Interval | None:
    """Of 1 − Σ errors / Σ total over documents."""
    if len(errors) < 2:
        return None
    counts = resample_counts(len(errors), np.random.default_rng([seed, 4]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval_of(1 - (counts @ errors) / (counts @ total))


def principal(
    sample: Float[np.ndarray, "row d"], k: int
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "{k} d"]]:
    """(mean, first ``k`` principal directions) of a sample."""
    x = torch.from_numpy(sample).double()
    centre = x.mean(0)
    values, vectors = torch.linalg.eigh((x - centre).T @ (x - centre))
    return centre, vectors[:, values.argsort(descending=True)[:k]].T.contiguous()


def check_apart(train: ActivationStore, test: ActivationStore) -> None:
    """Raises ``InputError`` when the stores are not of one extraction, or share a document."""
    if train.meta["source"] != test.meta["source"]:
        raise IncompatibleError(
            f"{train.folder} and {test.folder} come from different extractions: give the two of one"
        )
    both = np.intersect1d(np.unique(train.documents), np.unique(test.documents))
    if len(both):
        raise InputError(
            f"{train.folder} and {test.folder} share {len(both)} documents, so that nothing was held out: "
            "extract with --held-out"
        )


def held_out_windows(test: ActivationStore, n: int, seed: int = 0) -> Int64[np.ndarray, " window"]:
    """Up to ``n`` random windows of a store, ascending."""
    rows = np.unique(np.asarray(test.windows))
    return (
        rows if n >= len(rows) else np.sort(np.random.default_rng([seed, 5]).choice(rows, n, replace=False))
    )


@torch.inference_mode()
def loss_recovered(
    model: Any,
    tokenizer: Any,
    hook: str,
    sae: SparseAutoencoder,
    windows: WindowTable,
    rows: Int64[np.ndarray, " window"],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Loss:
    """Cross-entropy over windows of a table, with the residual stream at ``hook`` as it is, reconstructed,
    and zero. Tokens that are not scored (a BOS, attention sinks) stay as they are in all three; predictions
    are those made at scored tokens, of the token that follows in the window."""
    subject = as_subject("the model", model, tokenizer)
    sums, n, done = np.zeros(3), 0, 0
    wanted = batch or (WINDOWS_ON_GPU if on_gpu(subject.device) else WINDOWS)
    fit = fit_of(model, "reading windows in three ways")
    lengths = np.asarray(windows.lengths)[rows]
    for length in np.unique(lengths):
        same = rows[lengths == length]
        ids = torch.from_numpy(np.array(windows.tokens[same, :length], np.int64))

        def work(part: slice, ids: torch.Tensor = ids) -> list[np.ndarray]:
            losses, scored = _losses(model, subject, hook, sae, ids[part])
            return to_host(*(loss.where(scored, 0).sum() for loss in losses), scored.sum())

        for part, found in in_parts(len(same), 1, wanted, fit, subject.device, work):
            sums += [float(loss) for loss in found[:3]]
            n += int(found[3])
            done += part.stop - part.start
            if progress:
                progress(done, len(rows))
    if not n:
        raise InputError("no token of the windows is scored: the loss of reconstructions cannot be told")
    clean, reconstructed, zero = (sums / n).tolist()
    return Loss(clean, reconstructed, zero, n)


def _losses(
    model: Any, subject: Subject, hook: str, sae: SparseAutoencoder, ids: Int64[Tensor, "window token"]
) -> tuple[list[Float[Tensor, "window token-1"]], Bool[Tensor, "window token-1"]]:
    """Cross-entropies of the three ways, and which predictions count."""
    scored = scored_tokens(subject.residual(ids, hook), subject)
    ids, lead = subject.as_read(ids)
    scored = torch.nn.functional.pad(scored, (lead, 0))

    def changed(
        residual: Float[Tensor, "window token d"],
        how: Callable[[Float[Tensor, "row d"]], Float[Tensor, "row d"]],
    ) -> Float[Tensor, "window token d"]:
        out = residual.clone()
        out[scored] = how(residual[scored].float()).to(residual.dtype)
        return out

    ways: list[Callable[[Float[Tensor, "row d"]], Float[Tensor, "row d"]]] = [
        lambda x: x,
        lambda x: sae.decode(sae.encode(x)).to(x.device),
        torch.zeros_like,
    ]
    found = []
    for how in ways:
        with replaced(model, hook, partial(changed, how=how)):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
    return found, scored[:, :-1]
