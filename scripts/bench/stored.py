"""What checksums cost: CPU time of reading stores that have them, beside the same stores without, whose
blocks are not looked at.

    python scripts/bench/stored.py [--quick] [--rounds N]

Codes of 5.1 million nonzeros (all features by index; the records of 200 features), 150 MB of activations (all
batches of an epoch, mixed; one step of training per batch of 4,096 rows), embeddings of 5,000 windows. Each
side is opened anew in every round, in turn, so that every block is checked once; the files are in the
system's cache, which is the worst case for checksums. Seconds are those of the process (``process_time``), so
that other work on the machine does not count.

``ratio``: seconds without checksums over seconds with them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import arguments, report
from records import make_store

from featureinterp.codes.store import CodesStore
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.similar import SimilarWindows
from featureinterp.stored.arrays import CheckedArray
from featureinterp.stored.sums import read_marker
from featureinterp.training.batches import StoreBatches
from featureinterp.training.store import ActivationStore, StoreWriter

D_MODEL, ROWS, BATCH = 768, 100_000, 4096
CHECK = CheckedArray._check_blocks


def unsealed(marker: Path) -> Callable[[bool], None]:
    """Puts the checksums of a marker there, or takes them away."""
    import json

    sealed = marker.read_text()
    bare = json.dumps(read_marker(marker, "").value)

    def put(on: bool) -> None:
        marker.write_text(sealed if on else bare)

    return put


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(
    name: str, switches: list[Callable[[bool], None]], work: Callable[[], object], rounds: int
) -> None:
    """Both sides in turn; medians."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for on in (True, False):
            for switch in switches:
                switch(on)
            CheckedArray._check_blocks = CHECK if on else lambda *_: None  # type: ignore[method-assign]
            spent = cpu(work)
            if number:  # the first round warms up
                times[on].append(spent)
    ours, bare = statistics.median(times[True]), statistics.median(times[False])
    report(
        f"stored: {name}",
        ours,
        bare,
        bare / ours,
        least=round(min(times[False]) / min(times[True]), 3),
        target=">= 0.97",
    )


def main() -> None:
    args = arguments(__doc__ or "")
    rounds = args.rounds or (3 if args.quick else 9)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run, acts = Path(place) / "run", Path(place) / "acts"
        store = make_store(run)
        codes = [unsealed(run / "codes" / "codes.json"), unsealed(run / "windows" / "windows.json")]
        embeddings = np.random.default_rng(1).normal(size=(len(store.windows), 384)).astype(np.float32)
        chosen = np.sort(np.random.default_rng(2).choice(store.n_features, 200, replace=False)).tolist()

        def by_feature() -> None:
            opened = CodesStore.open(run)
            for f in range(opened.n_features):
                found = opened.feature(f)
                np.sort(found.values)
                np.unique(found.positions // opened.windows.length)

        def records() -> None:
            similar = SimilarWindows(embeddings)
            for _ in RecordBuilder(CodesStore.open(run), RecordPolicy(), similar).build(chosen):
                pass

        compared("codes, every feature's order and windows", codes, by_feature, rounds)
        compared("records of 200 features", codes, records, rounds)
        writer = StoreWriter(acts, D_MODEL, "float16")
        rng = np.random.default_rng(3)
        for _ in range(ROWS // 10_000):
            sides = {
                name: rng.integers(0, 50, 10_000) for name in ("documents", "windows", "offsets", "tokens")
            }
            writer.append(rng.normal(size=(10_000, D_MODEL)).astype(np.float32), **sides)
        writer.finish({"key": "bench"})
        weights = torch.randn(D_MODEL, 1024)

        def epoch(step: Callable[[np.ndarray], object] = lambda _: None) -> None:
            batches = StoreBatches(ActivationStore.open(acts), BATCH)
            for _ in range(ROWS // BATCH):
                step(batches.next())

        def product(x: np.ndarray) -> object:
            return torch.relu(torch.from_numpy(x) @ weights) @ weights.T

        switch = [unsealed(acts / "metadata.json")]
        compared("activations, an epoch of batches", switch, epoch, rounds)
        compared(
            "activations, an epoch with a forward pass of 1,024 latents",
            switch,
            lambda: epoch(product),
            rounds,
        )
        compared(
            "activations, rows in order",
            switch,
            lambda: sum(len(b) for b in ActivationStore.open(acts).blocks()),
            rounds,
        )


if __name__ == "__main__":
    main()
