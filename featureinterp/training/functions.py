"""Functions of tensors that training needs and torch lacks: thresholds and gates with their gradients, the
largest of many values, the geometric median.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def geometric_median(
    x: Float[Tensor, "row d"], *, tolerance: float = 1e-5, most: int = 200
) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances to the rows of ``x``: Weiszfeld's iteration,
    until it moves by less than ``tolerance`` of their mean distance."""
    point = x.mean(0)
    for _ in range(most):
        distance = (x - point).norm(dim=1).clamp_min(1e-12)
        weight = 1 / distance
        moved = (weight @ x) / weight.sum()
        step = float((moved - point).norm())
        point = moved
        if step <= tolerance * float(distance.mean()):
            break
    return point


class _Jump(torch.autograd.Function):
    """(z where z > θ and else 0, how many those are). With K = 1 where |z − θ| < ε / 2, θ has the gradients
    −(θ / ε) K of the codes and −K / ε of the number."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> Any:
        over = z > threshold
        ctx.save_for_backward(z, threshold, over)
        ctx.bandwidth = bandwidth
        return torch.where(over, z, 0), torch.count_nonzero(over).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, of_codes: torch.Tensor, of_number: torch.Tensor) -> Any:
        z, threshold, over = ctx.saved_tensors
        rows, features = torch.nonzero((z - threshold).abs_() < ctx.bandwidth / 2, as_tuple=True)
        near = threshold[features] * of_codes[rows, features] + of_number
        return (
            torch.where(over, of_codes, 0),
            torch.zeros_like(threshold).index_add_(0, features, near) / -ctx.bandwidth,
            None,
        )


class _Gated(torch.autograd.Function):
    """(ReLU(u + b), where that is positive ReLU(s u + m) and else 0) of what was read, u."""

    @staticmethod
    def forward(
        ctx: Any, read: torch.Tensor, gate_bias: torch.Tensor, scale: torch.Tensor, mag_bias: torch.Tensor
    ) -> Any:
        opened = (read + gate_bias).relu_()
        codes = torch.where(opened > 0, torch.addcmul(mag_bias, read, scale).relu_(), 0)
        ctx.save_for_backward(read, scale, opened, codes)
        return opened, codes

    @staticmethod
    def backward(ctx: Any, of_opened: torch.Tensor, of_codes: torch.Tensor) -> Any:
        read, scale, opened, codes = ctx.saved_tensors
        gate, size = torch.where(opened > 0, of_opened, 0), torch.where(codes > 0, of_codes, 0)
        return torch.addcmul(gate, size, scale), gate.sum(0), (size * read).sum(0), size.sum(0)


def jump(
    z: Float[Tensor, "row feature"], threshold: Float[Tensor, " feature"], bandwidth: float
) -> tuple[Float[Tensor, "row feature"], Float[Tensor, ""]]:
    """z where it exceeds the feature's ``threshold``, else 0; and how many do."""
    codes, number = _Jump.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]  # torch has none
    return codes, number


def gated(
    read: Float[Tensor, "row feature"],
    gate_bias: Float[Tensor, " feature"],
    scale: Float[Tensor, " feature"],
    mag_bias: Float[Tensor, " feature"],
) -> tuple[Float[Tensor, "row feature"], Float[Tensor, "row feature"]]:
    """The gate, and the codes that it lets through."""
    opened, codes = _Gated.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        read, gate_bias, scale, mag_bias
    )
    return opened, codes


def largest(values: Float[Tensor, " value"], n: int) -> Float[Tensor, " {n}"]:
    """The ``n`` largest of a vector, in any order; filled with −inf where it has fewer."""
    if n > len(values):
        return torch.cat([values, values.new_full((n - len(values),), float("-inf"))])
    return torch.topk(values, n, sorted=False).values


def nth_largest(values: Float[Tensor, " value"], n: int) -> Float[Tensor, ""]:
    """The ``n``-th largest of a vector (1: the largest)."""
    if values.device.type == "cpu":
        numbers = (values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()
        numbers.partition(len(numbers) - n)
        return torch.from_numpy(np.asarray(numbers[len(numbers) - n])).to(values.dtype)
    return torch.topk(values, n, sorted=False).values.min()
