"""Training steps against bare matrix products of the same shapes.

    python scripts/bench/train.py [--quick] [--device cpu|cuda]

The limit of a dense step: five products of batch × width × features (encoder, decoder, the gradients of both
weights and of the codes; seven for gated SAEs, which reconstruct twice) in the training's precision, and
nothing else. A step that decodes sparsely saves four of them, so it is also compared with the one that is
left, the encoder's, and with a loop of dense autograd. ``ours`` and ``limit``: samples per second. 576
inputs, 4,608 features, 32 codes per token, batches of 2,048, on random activations; on a GPU 2,304 inputs,
36,864 features, 64 codes, batches of 8,192.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from common import arguments, compare, report
from torch.nn import functional

from featureinterp.training.loop import prepare
from featureinterp.training.settings import ARCHITECTURES, SaeTable, TrainingTable


class Random:
    """Batches that cost nothing."""

    cursor: dict[str, int] = {}  # noqa: RUF012 (never changed)

    def __init__(self, batch: int, d: int) -> None:
        self.d_model = d
        self.rows = np.random.default_rng(0).normal(size=(batch, d)).astype(np.float32)

    def sample(self, n: int, *, seed: int, n_shards: int | None) -> np.ndarray:
        return self.rows

    def next(self) -> np.ndarray:
        return self.rows

    def seek(self, cursor: dict[str, int]) -> None:
        raise NotImplementedError


def main() -> None:
    args = arguments(__doc__ or "")
    cpu = args.device == "cpu"
    d, n_features, k, batch = (576, 4608, 32, 2048) if cpu else (2304, 36_864, 64, 8192)
    rounds = args.rounds or (3 if args.quick else 9)
    device = torch.device(args.device)
    x = torch.randn(batch, d, device=device)
    w, codes = torch.randn(n_features, d, device=device), torch.randn(batch, n_features, device=device)

    def products(dtype: torch.dtype, n: int) -> None:
        a, b, c = (t.to(dtype) for t in (x, w, codes))
        for i in range(n):
            if i % 3 == 0:
                a @ b.T  # what every feature reads; the gradient of the codes
            elif i % 3 == 1:
                c @ b  # the reconstruction
            else:
                c.T @ a  # the gradient of weights

    precisions: tuple[tuple[Literal["float32", "bfloat16"], torch.dtype], ...] = (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    )
    for precision, dtype in precisions:
        for architecture in ARCHITECTURES[:1] if args.quick else ARCHITECTURES:
            table = SaeTable(architecture=architecture, d_sae=n_features, k=k)
            trainer = prepare(
                Random(batch, d),
                table,
                TrainingTable(samples=batch * 10**6, batch=batch, precision=precision, warmup=0),
                device,
                None,
            )
            n = 7 if architecture == "gated" else 5
            ours, bare = compare(
                trainer.one_step, lambda dtype=dtype, n=n: products(dtype, n), args.device, rounds
            )
            name = f"train {architecture}, {precision}"
            report(
                f"{name}: {n} products",
                batch / ours,
                batch / bare,
                bare / ours,
                unit="samples/s",
                target=">= 0.7",
                device=args.device,
            )
            if architecture == "topk":
                ours, one = compare(
                    trainer.one_step, lambda dtype=dtype: products(dtype, 1), args.device, rounds
                )
                report(
                    f"{name}: the encoder's product",
                    batch / ours,
                    batch / one,
                    one / ours,
                    unit="samples/s",
                    device=args.device,
                )
                ours, plain = compare(trainer.one_step, dense_step(x, n_features, k), args.device, rounds)
                report(
                    f"{name}: dense autograd in float32",
                    batch / ours,
                    batch / plain,
                    plain / ours,
                    unit="samples/s",
                    device=args.device,
                )


def dense_step(x: torch.Tensor, n_features: int, k: int) -> Callable[[], None]:
    """A step as one would write it: dense codes, autograd, Adam."""
    d = x.shape[1]
    w_enc, w_dec = (torch.randn(n_features, d, device=x.device, requires_grad=True) for _ in range(2))
    b_enc, b_dec = (
        torch.zeros(n_features, device=x.device, requires_grad=True),
        torch.zeros(d, device=x.device, requires_grad=True),
    )
    optimizer = torch.optim.Adam([w_enc, w_dec, b_enc, b_dec], fused=True)

    def step() -> None:
        pre = functional.linear(x - b_dec, w_enc, b_enc)
        top = torch.topk(pre, k, dim=1)
        codes = torch.zeros_like(pre).scatter(1, top.indices, torch.relu(top.values))
        loss = (x - codes @ w_dec - b_dec).pow(2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
