"""Which kernel attends behind a shared prefix: the first of the device that computes what plain products do,
its log-sum-exp included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from featureinterp.local import prefix_cache
from featureinterp.local.prefix_cache import _attend, _cpu_attention, _kernel, _matmul_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _kernel.cache_clear()
    yield
    _kernel.cache_clear()


def refuses(*_: Any) -> Any:
    raise RuntimeError("this kernel is not for this device")


def in_base_two(*args: Any) -> Any:
    out, lse = _cpu_attention(*args)
    return out, lse / 0.6931


def padded(*args: Any) -> Any:
    out, lse = _cpu_attention(*args)
    return out, torch.nn.functional.pad(lse, (0, 27))


def acausal(q: Any, k: Any, v: Any, scale: float, causal: bool, mask: Any) -> Any:
    return _cpu_attention(q, k, v, scale, False, mask)


@pytest.mark.parametrize("wrong", [refuses, in_base_two, padded, acausal])
def test_a_wrong_kernel_is_passed_over(monkeypatch: pytest.MonkeyPatch, wrong: Any):
    monkeypatch.setitem(prefix_cache._KERNELS, "cpu", (wrong, _cpu_attention))
    assert _kernel(CPU, torch.float32, 16, True, False) is _cpu_attention
    monkeypatch.setitem(prefix_cache._KERNELS, "cpu", (wrong,))
    _kernel.cache_clear()
    assert _kernel(CPU, torch.float32, 16, True, False) is _matmul_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, False), (False, True)])
def test_the_kernel_of_a_cpu_is_the_fast_one(dtype: torch.dtype, causal: bool, masked: bool):
    assert _kernel(CPU, dtype, 64, causal, masked) is _cpu_attention


def test_attention_and_its_log_sum_exp_are_those_of_the_formula():
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, n, 8, generator=random) for n in (3, 5, 5))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    for attend in (_matmul_attention, _cpu_attention):
        out, lse = attend(q, k, v, 8**-0.5, False, None)
        torch.testing.assert_close(out, scores.softmax(-1) @ v)
        torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_other_widths_of_values_take_the_products():
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 4)
    out, _ = _attend(q, k, v, 1.0, causal=False)
    torch.testing.assert_close(out, (q @ k.mT).softmax(-1) @ v)
