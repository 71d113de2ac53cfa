"""Records of a whole dictionary: milliseconds per feature, beside reading every nonzero once, one matrix
product and assembling windows.

    python scripts/bench/records.py [--quick] [--device cpu|cuda]

5,000 windows of 32 tokens, 5.1 million nonzeros over 4,608 features, embeddings given (they are computed once
and cached). Records are built on the processor; ``--device`` is taken for uniformity. The limit is 2 ms per
feature where the bare work takes 0.62 ms: ``slower`` says how many times longer that takes here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, compare, report

from featureinterp.codes.runs import RunWriter
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.domain.record import Window
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.similar import SimilarWindows

N_WINDOWS, LENGTH, D_SAE, K = 5000, 32, 4608, 32
LIMIT_MS, BARE_MS = 2.0, 0.62


class Words:
    """Stands in for a tokenizer: one token per word."""

    fingerprint = "bench"

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        out = []
        for text in texts:
            ends = [i for i, c in enumerate(text + " ") if c == " "]
            starts = [0, *(e for e in ends[:-1])]
            out.append(
                type(
                    "E", (), {"ids": list(range(len(ends))), "offsets": list(zip(starts, ends, strict=True))}
                )()
            )
        return out


def make_store(run: Path) -> CodesStore:
    """A synthetic store: feature frequencies fall off as a power law, activations are exponential."""
    rng = np.random.default_rng(0)
    text = " ".join(["word"] * (LENGTH * 5))
    corpus = Corpus("bench", lambda: (Document(str(i), text) for i in range(N_WINDOWS // 5)), N_WINDOWS // 5)
    build_windows(corpus, Words(), WindowPolicy(LENGTH), run / "windows")
    weights = 1 / np.arange(10, 10 + D_SAE) ** 0.7
    cumulative = np.cumsum(weights / weights.sum())
    writer = RunWriter(run / "codes", n_features=D_SAE, n_positions=N_WINDOWS * LENGTH, value_dtype="float16")
    for start in range(0, N_WINDOWS, 250):
        positions = np.repeat(np.arange(start * LENGTH, (start + 250) * LENGTH), K)
        features = np.searchsorted(cumulative, rng.random(len(positions)))
        key = np.unique(features.astype(np.int64) * (N_WINDOWS * LENGTH) + positions)
        features, positions = np.divmod(key, N_WINDOWS * LENGTH)
        writer.add(
            positions,
            features,
            rng.exponential(5, len(key)) + 0.01,
            n_scored=250 * LENGTH,
            end_window=start + 250,
        )
    writer.finish({"sae": {"name": "bench"}, "key": "bench"})
    return CodesStore.open(run)


def main() -> None:
    args = arguments(__doc__ or "")
    n = 200 if args.quick else D_SAE
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        rng = np.random.default_rng(1)
        embeddings = rng.normal(size=(N_WINDOWS, 384)).astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        features = np.sort(rng.choice(D_SAE, n, replace=False)).tolist()
        n_taken = sum(map(sum, RecordPolicy().counts.values()))
        table = [(store.windows.ids(row), store.windows.pieces(row)) for row in range(N_WINDOWS)]
        taken = rng.integers(N_WINDOWS, size=(n, n_taken))

        def ours() -> None:
            for _ in RecordBuilder(store, RecordPolicy(), SimilarWindows(embeddings)).build(features):
                pass

        def limit() -> None:
            queries = np.zeros((n, 384), np.float32)
            for i, (f, chosen) in enumerate(zip(features, taken, strict=True)):
                codes = store.feature(f)
                rows = codes.positions // LENGTH
                starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 1))
                maxima = np.maximum.reduceat(codes.values.astype(np.float32), starts)
                queries[i] = embeddings[rows[starts][np.argsort(-maxima)[:400]]].mean(0)
                for row, own in zip(chosen.tolist(), store.window_activations(f, chosen), strict=True):
                    ids, pieces = table[row]
                    Window(row, row // 5, ids, pieces, own)
            queries @ embeddings.T

        mine, bare = compare(ours, limit, "cpu", args.rounds or (1 if args.quick else 3))
        report(
            "records",
            1000 * mine / n,
            1000 * bare / n,
            bare / mine,
            unit="ms/feature",
            target=f">= {BARE_MS / LIMIT_MS:.2f}",
            slower=round(1000 * bare / n / BARE_MS, 1),
            n_nonzeros=store.meta["n_nonzeros"],
            device="cpu",
        )


if __name__ == "__main__":
    main()
