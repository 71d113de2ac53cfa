"""How fast this model can be read here: tokens per second and peak memory by batch and window length."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from featureinterp.subject.hooks import text_config
from featureinterp.subject.load import Subject

BATCHES = (1, 4, 8, 16, 32)
LENGTHS = (128, 256, 512)


@dataclass(frozen=True, slots=True)
class Speed:
    """``peak_bytes``: of the GPU, or of the whole process on a CPU. None where it ran out of memory."""

    batch: int
    length: int
    tokens_per_s: float | None
    peak_bytes: int | None


def speeds(
    subject: Subject,
    hook: str,
    *,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    least_s: float = 0.5,
) -> Iterator[Speed]:
    """Runs the model up to the hook on random tokens."""
    cuda = subject.device.type == "cuda"
    vocabulary = int(text_config(subject.model).vocab_size)
    for length in lengths:
        if subject.context_length is not None and length >= subject.context_length:
            continue
        for batch in batches:
            ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                subject.residual(ids, hook)
                n, start = 0, time.perf_counter()
                while not n or time.perf_counter() - start < least_s:
                    subject.residual(ids, hook).sum().item()
                    n += ids.numel()
                rate = n / (time.perf_counter() - start)
            except torch.OutOfMemoryError:
                yield Speed(batch, length, None, None)
                continue
            peak = (
                torch.cuda.max_memory_allocated()
                if cuda
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            yield Speed(batch, length, rate, peak)
