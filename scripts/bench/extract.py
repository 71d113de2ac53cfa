"""Extracting activations against its limit: the bare blocks up to the hook over the same windows, and a raw
write of the same rows.

    python scripts/bench/extract.py [--quick] [--device cpu|cuda] [--shape NAME]

Prints tokens per second of both and their ratio; and the most memory that the process holds while it extracts
four times as many tokens, over what it holds for one time. Random weights of the embedded model's shape.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
import torch
from common import arguments, compare, report
from shapes import Ids, bare_blocks, shapes

from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.subject.load import Subject
from featureinterp.training.extract import STATE, ExtractSettings, extract
from featureinterp.training.store import TEST, TRAIN

WINDOW = 64


def corpus_of(n_tokens: int) -> Corpus:
    rng = np.random.default_rng(0)
    texts = [
        " ".join(map(str, rng.integers(2, 49_152, WINDOW * 8).tolist()))
        for _ in range(n_tokens // (WINDOW * 8))
    ]
    return Corpus(f"bench {n_tokens}", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts))


def main() -> None:
    args = arguments(__doc__ or "")
    n_tokens = 16_384 if args.quick else 65_536 if args.device == "cpu" else 1_048_576
    batch_tokens = 2048 if args.device == "cpu" else 32_768
    subject, loaded = shapes(args.device, args.shape)
    bare, corpus = bare_blocks(subject, loaded.hook), corpus_of(n_tokens)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        windows = build_windows(corpus, Ids(), WindowPolicy(WINDOW), out / "cut")

        def ours() -> None:
            for name in (TRAIN, TEST):  # the windows, cut in the first round, are reused
                shutil.rmtree(out / name, ignore_errors=True)
            (out / STATE).unlink(missing_ok=True)
            extract(
                subject,
                loaded.hook,
                corpus,
                out,
                WindowPolicy(WINDOW),
                ExtractSettings(0.1),
                batch_tokens=batch_tokens,
            )

        @torch.inference_mode()
        def limit() -> None:
            rows = batch_tokens // WINDOW
            with (out / "raw.bin").open("wb") as raw:
                for start in range(0, len(windows), rows):
                    ids = torch.from_numpy(np.array(windows.tokens[start : start + rows], np.int64)).to(
                        args.device
                    )
                    x = bare(ids)
                    raw.write(x.half().cpu().numpy().tobytes())

        mine, least = compare(ours, limit, args.device, args.rounds or (2 if args.quick else 5))
        report(
            f"extract, {args.shape}",
            n_tokens / mine,
            n_tokens / least,
            least / mine,
            unit="tokens/s",
            target=">= 0.9",
            device=args.device,
        )
    once, more = (peak(subject, loaded.hook, n_tokens * times // 2, batch_tokens) for times in (1, 4))
    report(
        "extract: peak memory of 4 times the tokens",
        more / 2**20,
        once / 2**20,
        more / once,
        unit="MiB",
        device=args.device,
    )


def peak(subject: Subject, hook: str, n_tokens: int, batch_tokens: int) -> int:
    """How many bytes of its own the process holds at most while it extracts."""
    corpus, process, stop = corpus_of(n_tokens), psutil.Process(), threading.Event()
    most = [0]

    def watch() -> None:
        while not stop.wait(0.05):
            most[0] = max(most[0], process.memory_full_info().uss)

    thread = threading.Thread(target=watch)
    with tempfile.TemporaryDirectory() as folder:
        thread.start()
        extract(
            subject,
            hook,
            corpus,
            Path(folder),
            WindowPolicy(WINDOW),
            ExtractSettings(0.1),
            batch_tokens=batch_tokens,
        )
        stop.set()
        thread.join()
    return most[0]


if __name__ == "__main__":
    main()
