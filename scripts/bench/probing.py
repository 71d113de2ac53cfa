"""Probing by sparse codes against the dense way, on the same data in one run.

    python scripts/bench/probing.py [--quick] [--device cpu|cuda]

AUROC of 4,096 features for 16 labels on 50,000 tokens, 1 % of the codes nonzero (rounded to two digits, so
that there are ties), against dense torch (sort and searchsorted, midranks, one matrix product), scipy's
``rankdata`` and scikit-learn's ``roc_auc_score``, each on as many features as ``features`` says and scaled
up; the same for 32,768 features with 128 nonzeros per token. F1 over five thresholds against dense torch.
Memory: what numpy holds at most beside the codes, per nonzero, and again with eight times as many features
and as many nonzeros. Decoders: the whole fit, with its choice of the penalty, against 400 steps of full-batch
Adam (learning rate 0.05, penalty 0.01) on standardised inputs, with both mean held-out AUROCs.

``ratio``: seconds of the other way over ours.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import scipy.sparse
import torch
from common import arguments, report, seconds
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from featureinterp.probing import Columns, auroc_all, auroc_vec, domain_f1, fit_logreg, runs_of, split_indices

N, LABELS = 50_000, 16
THRESHOLDS = (0.15, 0.3, 0.5, 0.6, 0.8)


def main() -> None:
    args = arguments(__doc__ or "")
    rounds = args.rounds or (1 if args.quick else 3)
    labels = np.random.default_rng(1).random((N, LABELS)) < 0.05
    for n_features, per_token in ((4096, 41), (32_768, 128)):
        name = f"{n_features:,} features, {per_token} nonzeros per token"
        codes = random_codes(n_features, per_token)
        auroc_lines(name, codes, labels, args.device, args.quick, rounds)
        if n_features == 4096:
            f1_line(name, codes, labels, args.device, args.quick, rounds)
    memory_line(labels)
    decoder_lines(labels, args.device, args.quick)


def random_codes(n_features: int, per_token: int, n: int = N) -> Columns:
    """Codes of random features, by feature."""
    rng = np.random.default_rng(0)
    rows, features = np.repeat(np.arange(n), per_token), rng.integers(0, n_features, n * per_token)
    values = np.round(rng.exponential(1, len(rows)) + 0.01, 2).astype(np.float32)
    matrix = scipy.sparse.csc_matrix((values, (rows, features)), shape=(n, n_features))
    return Columns(n, matrix.indptr.astype(np.int64), matrix.indices, matrix.data)


def auroc_lines(name: str, codes: Columns, labels: np.ndarray, device: str, quick: bool, rounds: int) -> None:
    given: Any = codes
    if device != "cpu":
        given = torch.sparse_csc_tensor(
            torch.from_numpy(codes.offsets),
            torch.from_numpy(codes.rows.astype(np.int64)),
            torch.from_numpy(codes.values),
            size=codes.shape,
        ).to(device)
    ours = timed(lambda: auroc_all(given, labels), device, rounds)
    found = auroc_all(given, labels)
    others = {
        "dense torch": (dense_torch, 256 if quick else 4096),
        "scipy": (by_scipy, 64 if quick else 512),
        "scikit-learn": (by_scikit_learn, 2 if quick else 16),
    }
    for other, (way, n) in others.items():
        n = min(n, codes.n_features)
        dense = codes.dense(np.arange(n)).astype(np.float32)
        held: list[np.ndarray] = []
        spent = (
            seconds(lambda way=way, dense=dense, held=held: held.append(way(dense, labels, device)), device)
            * codes.n_features
            / n
        )
        worst = float(np.abs(held[0] - found[:n]).max())
        report(
            f"probing: AUROC of {name}, against {other}",
            ours,
            spent,
            spent / ours,
            features=n,
            largest_difference=worst,
        )


def timed(work: Any, device: str, rounds: int) -> float:
    work()
    return float(np.median([seconds(work, device) for _ in range(rounds)]))


def dense_torch(dense: np.ndarray, labels: np.ndarray, device: str) -> np.ndarray:
    """Midranks by sorting each column and searching every value in it."""
    wanted = torch.from_numpy(labels).double().to(device)
    positives = wanted.sum(0)
    out = []
    for start in range(0, dense.shape[1], 64):
        columns = torch.from_numpy(np.ascontiguousarray(dense[:, start : start + 64].T)).to(device)
        ordered = columns.sort(dim=1).values
        low, high = (
            torch.searchsorted(ordered, columns, side="left"),
            torch.searchsorted(ordered, columns, side="right"),
        )
        sums = ((low + high + 1).double() / 2) @ wanted
        out.append((sums - positives * (positives + 1) / 2) / (positives * (len(dense) - positives)))
    return torch.cat(out).cpu().numpy()


def by_scipy(dense: np.ndarray, labels: np.ndarray, device: str) -> np.ndarray:
    positives = labels.sum(0)
    sums = np.stack([rankdata(column) @ labels for column in dense.T])
    return (sums - positives * (positives + 1) / 2) / (positives * (len(dense) - positives))


def by_scikit_learn(dense: np.ndarray, labels: np.ndarray, device: str) -> np.ndarray:
    return np.array([[roc_auc_score(label, column) for label in labels.T] for column in dense.T])


def f1_line(name: str, codes: Columns, labels: np.ndarray, device: str, quick: bool, rounds: int) -> None:
    """Concepts of one instance per run of labelled tokens."""
    n = 256 if quick else 1024
    fmax, ids = codes.maxima, [runs_of(label) for label in labels.T]
    ours = timed(lambda: domain_f1(codes, fmax, labels, ids, THRESHOLDS), "cpu", rounds)
    found = domain_f1(codes, fmax, labels, ids, THRESHOLDS)
    dense, held = codes.dense(np.arange(n)).astype(np.float32), []
    spent = (
        seconds(lambda: held.append(dense_f1(dense, fmax[:n], labels, ids, device)), device)
        * codes.n_features
        / n
    )
    worst = float(np.abs(held[0] - found.f1[:n]).max())
    report(
        f"probing: F1 of {name}, against dense torch",
        ours,
        spent,
        spent / ours,
        features=n,
        largest_difference=worst,
    )


def dense_f1(
    dense: np.ndarray, fmax: np.ndarray, labels: np.ndarray, ids: list[np.ndarray], device: str
) -> np.ndarray:
    """Every threshold over every token; instances by a scattered maximum."""
    inside = torch.from_numpy(labels).float().to(device)
    best = torch.zeros(dense.shape[1], labels.shape[1], device=device)
    share = torch.from_numpy(dense / np.where(fmax > 0, fmax, np.inf)).to(device)
    for threshold in THRESHOLDS:
        fires = (share > threshold).float()
        precision = (fires.T @ inside) / fires.sum(0)[:, None]
        recall = torch.empty_like(precision)
        for label, numbers in enumerate(ids):
            rows = torch.from_numpy(np.flatnonzero(numbers >= 0)).to(device)
            number = torch.from_numpy(numbers[numbers >= 0].astype(np.int64)).to(device)
            met = torch.zeros(int(number.max()) + 1, dense.shape[1], device=device).index_reduce_(
                0, number, fires[rows], "amax"
            )
            recall[:, label] = met.mean(0)
        best = torch.maximum(best, torch.nan_to_num(2 * precision * recall / (precision + recall)))
    return best.cpu().numpy()


def memory_line(labels: np.ndarray) -> None:
    """What numpy holds at most beside codes and labels."""
    held = []
    for n_features in (4096, 32_768):
        codes = random_codes(n_features, 128)
        tracemalloc.start()
        auroc_all(codes, labels)
        held.append(tracemalloc.get_traced_memory()[1] / len(codes.values))
        tracemalloc.stop()
    report(
        "probing: bytes per nonzero for AUROC with 8 times the features, over as they are",
        held[1],
        held[0],
        held[1] / held[0],
    )


def decoder_lines(labels: np.ndarray, device: str, quick: bool) -> None:
    """Labels that hang on some of the inputs; documents of 100 tokens."""
    rng = np.random.default_rng(2)
    n = 10_000 if quick else 30_000
    codes = random_codes(4096, 41, n)
    dense = rng.normal(size=(n, 576)).astype(np.float16)
    inputs: dict[str, Any] = {
        "codes of 4,096 features": codes,
        "576 dense inputs": torch.from_numpy(dense).to(device) if device != "cpu" else dense,
    }
    documents = np.repeat(np.arange(n // 100), 100)
    train, test = split_indices(n, 0.4, 0, documents)
    for name, x in inputs.items():
        plain = codes.dense(np.arange(4096)).astype(np.float32) if x is codes else dense.astype(np.float32)
        teacher = rng.normal(size=(plain.shape[1], LABELS)) * (rng.random((plain.shape[1], LABELS)) < 0.05)
        logits = plain @ teacher
        wanted = logits + rng.normal(size=logits.shape) * logits.std(0) > np.quantile(logits, 0.9, axis=0)
        held: dict[str, Any] = {}
        few = train[:500]
        fit_logreg(x, wanted, few), adam(plain, wanted, few, device)
        ours = seconds(
            lambda x=x, wanted=wanted, held=held: held.update(
                ours=fit_logreg(x, wanted, train, groups=documents)
            ),
            device,
        )
        spent = seconds(
            lambda plain=plain, wanted=wanted, held=held: held.update(
                adam=adam(plain, wanted, train, device)
            ),
            device,
        )
        weights, bias = held["adam"]
        areas = [
            float(np.mean([auroc_vec(scores[:, i], wanted[test, i]) for i in range(LABELS)]))
            for scores in (held["ours"].predict(x, test), plain[test] @ weights + bias)
        ]
        report(
            f"probing: decoders of {LABELS} labels from {name}, against Adam",
            ours,
            spent,
            spent / ours,
            auroc=round(areas[0], 4),
            auroc_adam=round(areas[1], 4),
        )


def adam(x: np.ndarray, labels: np.ndarray, train: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """400 full-batch steps; weights and bias for inputs as they are."""
    mean, deviation = x[train].mean(0), np.maximum(x[train].std(0), 1e-6)
    z, wanted = (
        torch.from_numpy((x[train] - mean) / deviation).to(device),
        torch.from_numpy(labels[train]).float().to(device),
    )
    weights = torch.zeros(x.shape[1], labels.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(labels.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(z @ weights + bias, wanted, reduction="none")
            .mean(0)
            .sum()
            + 0.01 * (weights**2).sum()
        )
        loss.backward()
        optimizer.step()
    plain = weights.detach().cpu().numpy() / deviation[:, None]
    return plain, bias.detach().cpu().numpy() - mean @ plain


if __name__ == "__main__":
    main()
