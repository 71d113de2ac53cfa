"""Collecting codes against its limit: the bare blocks up to the hook, encoder matmul, top-k and a raw write,
same batch and dtype.

    python scripts/bench/collect.py [--quick] [--device cpu|cuda] [--shape NAME]

Prints tokens per second of both and their ratio; and the store's bytes per nonzero, the time to read one
feature, and the seconds to merge runs of 8 million nonzeros. Random weights of the embedded model's shape, or
of another of ``shapes.py``, in the dtype that the device computes fastest.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, compare, report, seconds
from shapes import D_SAE, SHAPES, Ids, bare_blocks, shapes

from featureinterp.codes.collect import collect
from featureinterp.codes.runs import RunWriter
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.subject.reading import BATCH_TOKENS

WINDOW = 32


def main() -> None:
    args = arguments(__doc__ or "")
    n_tokens = 8_192 if args.quick else 65_536 if args.device == "cpu" else 524_288
    batch_tokens = BATCH_TOKENS if args.device == "cpu" else 32_768
    subject, loaded = shapes(args.device, args.shape)
    sae, bare = loaded.sae, bare_blocks(subject, loaded.hook)
    rng = np.random.default_rng(0)
    texts = [
        " ".join(map(str, rng.integers(2, 49_152, WINDOW * 8).tolist()))
        for _ in range(n_tokens // (WINDOW * 8))
    ]
    corpus = Corpus("bench", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        windows = build_windows(corpus, Ids(), WindowPolicy(WINDOW), run / "cut")

        def ours() -> None:
            shutil.rmtree(
                run / "codes", ignore_errors=True
            )  # the windows, cut in the first round, are reused
            collect(subject, loaded, corpus, run, WindowPolicy(WINDOW), batch_tokens=batch_tokens)

        @torch.inference_mode()
        def limit() -> None:
            rows = batch_tokens // WINDOW
            bias = -(sae.b_dec @ sae.W_enc) if sae.b_enc is None else sae.b_enc - sae.b_dec @ sae.W_enc
            with (run / "raw.bin").open("wb") as out:
                for start in range(0, len(windows), rows):
                    ids = torch.from_numpy(np.array(windows.tokens[start : start + rows], np.int64)).to(
                        args.device
                    )
                    x = bare(ids)
                    values, indices = torch.topk(
                        torch.addmm(bias, x.reshape(-1, sae.d_in).float(), sae.W_enc),
                        SHAPES[args.shape]().k,
                        sorted=False,
                    )
                    out.write(values.half().cpu().numpy().tobytes() + indices.int().cpu().numpy().tobytes())

        mine, least = compare(ours, limit, args.device, args.rounds or (2 if args.quick else 5))
        report(
            f"collect, {args.shape}",
            n_tokens / mine,
            n_tokens / least,
            least / mine,
            unit="tokens/s",
            target=">= 0.9",
            device=args.device,
        )
        store = CodesStore.open(run)
        n = store.meta["n_nonzeros"]
        size = sum(
            (run / "codes" / f"{name}.bin").stat().st_size for name in ("positions", "values", "offsets")
        )
        report(
            "codes store size",
            size / n,
            6.0,
            6.0 * n / size,
            unit="bytes/nonzero",
            target="<= 6.2",
            device=args.device,
        )
        features = rng.integers(0, sae.d_sae, 200)
        for f in features:
            store.feature(int(f)).values.sum()
        read = (
            seconds(lambda: [store.feature(int(f)).values.sum() for f in features], "cpu")
            / len(features)
            * 1000
        )
        report(
            "read one feature, warm", read, 1.0, 1.0 / read, unit="ms", target="< 1 ms", device=args.device
        )
    merge(1_000_000 if args.quick else 8_000_000)


def merge(n: int) -> None:
    """Seconds to merge runs, beside the seconds to write the same bytes once."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder), n_features=D_SAE, n_positions=n, value_dtype="float16")
        for end in range(500_000, n + 1, 500_000):
            positions = np.arange(end - 500_000, end)
            writer.add(
                positions,
                rng.integers(0, D_SAE, len(positions)),
                rng.random(len(positions)) + 0.1,
                n_scored=1,
                end_window=end,
            )
        writer.flush()
        raw = rng.integers(0, 255, 6 * n, dtype=np.uint8)
        bare = seconds(lambda: (Path(folder) / "raw").write_bytes(raw.tobytes()), "cpu")
        mine = seconds(lambda: writer.finish({}), "cpu")
    report(f"merge {n:,} nonzeros", mine, bare, bare / mine, unit="s", target="seconds")


if __name__ == "__main__":
    main()
