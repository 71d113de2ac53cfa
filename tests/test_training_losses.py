"""What a training step computes: sparse products against dense ones, every loss and its gradients against
formulas written out in float64, the schedule by hand.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featureinterp.sae.base import layer_norm
from featureinterp.training import sparse
from featureinterp.training.architectures import (
    TRAINABLE,
    Normalizer,
    Trainable,
    as_sae,
)
from featureinterp.training.functions import geometric_median, largest, nth_largest
from featureinterp.training.loop import learning_rate, planned_steps
from featureinterp.training.settings import ARCHITECTURES, SaeTable, TrainingTable
from featureinterp.training.sparse import Pattern, decoded, encoded

D_IN, D_SAE, ROWS = 6, 10, 7
NONE_DEAD = torch.zeros(0, dtype=torch.int64)


def rows(n: int = ROWS, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def make(architecture: str, *, seed: int = 1, **options: Any) -> Trainable:
    """A model with no weight at a special value."""
    table = SaeTable(
        architecture=architecture,
        d_sae=D_SAE,
        **{"k": 3, "prefixes": (0.3, 1.0), "penalty": 0.7, "bandwidth": 0.8, **options},
    )
    model = TRAINABLE[architecture](
        D_IN,
        table,
        bias=torch.full((D_IN,), 0.4),
        variance=5.0,
        generator=torch.Generator().manual_seed(seed),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
        if architecture == "jumprelu":
            model.threshold.abs_()
    return model.train()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_sparse_products_equal_dense_ones(n: int, n_features: int, d: int, seed: int, without_sampled: bool):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, n_features, generator=generator) < 0.4
    pattern = Pattern.where(mask)
    values = torch.randn(len(pattern.features), generator=generator)
    dense = torch.zeros(n, n_features)
    dense[pattern.rows, pattern.features] = values
    a, b = torch.randn(n, d, generator=generator), torch.randn(n_features, d, generator=generator)
    torch.testing.assert_close(pattern.times(values, b), dense @ b)
    torch.testing.assert_close(pattern.transposed_times(values, a), dense.T @ a)
    torch.testing.assert_close(pattern.sum_by_feature(values), dense.sum(0))
    with pytest.MonkeyPatch.context() as patch:
        if without_sampled:
            patch.setattr(sparse, "_sampled_is_there", lambda device: False)
        torch.testing.assert_close(pattern.products(a, b), (a @ b.T)[pattern.rows, pattern.features])


@pytest.mark.parametrize("ends", [None, [4, 10], [1, 2, 10]])
def test_gradients_of_sparse_functions_are_those_of_dense_ones(ends: list[int] | None):
    generator = torch.Generator().manual_seed(3)
    x, W_enc, W_dec = (
        torch.randn(s, generator=generator) for s in ((ROWS, D_IN), (D_SAE, D_IN), (D_SAE, D_IN))
    )
    b_enc, b_dec = torch.randn(D_SAE, generator=generator), torch.randn(D_IN, generator=generator)
    mask = torch.rand(ROWS, D_SAE, generator=generator) < 0.3
    weight = torch.randn(len(ends or [D_SAE]), ROWS, D_IN, generator=generator)
    given_ = [t.clone().requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
    pre = (x - given_[3]) @ given_[0].T + given_[1]
    codes = torch.relu(pre) * mask
    plain = torch.stack([codes[:, :e] @ given_[2][:e] for e in ends or [D_SAE]])
    (plain * weight).sum().backward()
    mine = [t.clone().requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
    pattern = Pattern.where(mask)
    values = encoded(pre.detach()[mask], (x - b_dec), mine[0], mine[1], mine[3], pattern)
    found = decoded(torch.relu(values), mine[2], pattern, ends)
    torch.testing.assert_close(found, plain)
    (found * weight).sum().backward()
    for ours, theirs in zip(mine, given_, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def reference(
    model: Trainable, x: torch.Tensor, dead: torch.Tensor, strength: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of each architecture as its formula reads, dense, in float64; and the parameters that it is a
    function of.
    """
    table, V = model.table, model.variance
    p = {name: t.detach().double().requires_grad_() for name, t in model.named_parameters()}
    x, B = x.double(), len(x)
    centred = x - p["b_dec"]
    read = centred @ p["W_enc"].T
    penalty = extra = torch.zeros((), dtype=torch.float64)
    ends = [D_SAE]
    match table.architecture:
        case "topk":
            pre = read + p["b_enc"]
            keep = torch.zeros_like(pre).scatter_(1, pre.topk(table.k).indices, 1.0)
            codes = torch.relu(pre) * keep
        case "batch_topk" | "matryoshka_batch_topk":
            pre = torch.relu(read + p["b_enc"])
            smallest = pre.detach().flatten().sort(descending=True).values[table.k * B - 1]
            codes = pre * (pre.detach() >= smallest)
            ends = [3, D_SAE] if table.architecture.startswith("mat") else ends
        case "relu":
            codes = torch.relu(read + p["b_enc"])
            penalty = strength * table.penalty_or_default * codes.sum(1).mean() / V**0.5
        case "gated":
            gate = read + p["b_enc"]
            codes = (gate.detach() > 0) * torch.relu(torch.exp(p["r_mag"]) * read + p["mag_bias"])
            opened = torch.relu(gate)
            penalty = strength * table.penalty_or_default * opened.sum(1).mean() / V**0.5
            extra = (x - p["b_dec"].detach() - opened @ p["W_dec"].detach()).pow(2).sum(1).mean() / V
        case "jumprelu":
            z = x @ p["W_enc"].T + p["b_enc"]
            on = (z > p["threshold"]).double().detach()
            near = ((z - p["threshold"]).abs() < table.bandwidth / 2).double().detach()
            # a function whose derivative by the threshold is the kernel estimate: value exact, slope that of
            # the estimate
            slope = -(p["threshold"] - p["threshold"].detach()) / table.bandwidth * near
            codes = z * on + p["threshold"].detach() * slope
            l0 = (on + slope).sum(1).mean()
            penalty = strength * table.penalty_or_default * (l0 / table.k - 1) ** 2
    errors = [x - p["b_dec"] - codes[:, :e] @ p["W_dec"][:e] for e in ends]
    loss = torch.stack([e.pow(2).sum(1).mean() / V for e in errors]).mean() + penalty + extra
    if len(dead):
        error = errors[-1].detach()
        source = x if table.architecture == "jumprelu" else centred
        before = source @ p["W_enc"][dead].T + p["b_enc"][dead]
        top = before.topk(min(model.aux_k, len(dead)))
        guess = (
            torch.zeros(B, len(dead), dtype=torch.float64).scatter(1, top.indices, torch.relu(top.values))
            @ p["W_dec"][dead]
        )
        loss = loss + table.aux_coefficient * (error - guess).pow(2).sum() / error.pow(2).sum()
    return loss, p


@pytest.mark.parametrize("dead", [NONE_DEAD, torch.tensor([1, 4, 5, 8])], ids=["alive", "dead"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_formulas(architecture: str, dead: torch.Tensor):
    model = make(architecture, aux_k=2, aux_coefficient=0.5)
    x = rows()
    found = model(x, dead, 0.6)
    loss, p = reference(model, x, dead, 0.6)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    found.loss.backward()
    loss.backward()
    for name, ours in model.named_parameters():
        theirs = p[name].grad if p[name].grad is not None else torch.zeros_like(p[name])
        torch.testing.assert_close(
            ours.grad.double(), theirs, rtol=2e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "jumprelu"])
def test_gradients_are_slopes(architecture: str):
    """Finite differences along a random direction; what fires is the same on both sides of so small a
    step.
    """
    model = make(architecture).double()
    model.table.__dict__.update(penalty_warmup=0.0)
    x = rows().double()
    model(x, NONE_DEAD, 1.0).loss.backward()
    generator = torch.Generator().manual_seed(9)
    steps = {name: torch.randn(p.shape, generator=generator).double() for name, p in model.named_parameters()}
    if architecture == "gated":
        steps = {
            n: s * (n in ("W_enc", "b_enc", "r_mag", "mag_bias")) for n, s in steps.items()
        }  # the gate's reconstruction does not move the decoder
    slope = sum(float((p.grad * steps[name]).sum()) for name, p in model.named_parameters())
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += sign * (1e-6 if sign > 0 else 2e-6) * steps[name]
        losses.append(model(x, NONE_DEAD, 1.0).loss.item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_what_a_step_reports():
    model = make("topk")
    x = rows()
    found = model(x, NONE_DEAD, 1.0)
    with torch.no_grad():
        pre = (x - model.b_dec) @ model.W_enc.T + model.b_enc
        top = pre.topk(3)
        codes = torch.zeros_like(pre).scatter_(1, top.indices, torch.relu(top.values))
        error = x - model.b_dec - codes @ model.W_dec
    assert float(found.error) == pytest.approx(float(error.pow(2).sum()), rel=1e-5)
    assert int(found.n_codes) == int((codes > 0).sum())
    assert found.fired.tolist() == (codes > 0).any(0).tolist()


def test_half_precision_chooses_and_full_precision_computes():
    full, half = make("topk"), make("topk")
    half.half_precision = True
    x = rows(64)
    a, b = full(x, NONE_DEAD, 1.0), half(x, NONE_DEAD, 1.0)
    assert b.loss.item() == pytest.approx(a.loss.item(), rel=0.02)
    same = torch.equal(
        (full._all(x - full.b_dec)).topk(3).indices.sort(1).values,
        (half._all(x - half.b_dec)).topk(3).indices.sort(1).values,
    )
    if same:
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-5)


def test_the_threshold_of_batchtopk_is_a_running_mean_of_the_smallest_kept_code():
    model = make("batch_topk", threshold_decay=0.9)
    wanted = None
    for seed in range(4):
        x = rows(20, seed)
        with torch.no_grad():
            kept = (
                torch.relu((x - model.b_dec) @ model.W_enc.T + model.b_enc)
                .flatten()
                .sort(descending=True)
                .values[: 3 * 20]
            )
        smallest = float(kept[kept > 0].min())
        wanted = smallest if wanted is None else 0.9 * wanted + 0.1 * smallest
        model(x, NONE_DEAD, 1.0)
    assert float(model.threshold) == pytest.approx(wanted, rel=1e-5)
    model.eval()
    model(rows(20, 9), NONE_DEAD, 1.0)
    assert float(model.threshold) == pytest.approx(wanted, rel=1e-5)


def test_largest():
    values = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert [float(nth_largest(values, n)) for n in (1, 2, 3, 4)] == [3, 2, 2, 1]
    assert (
        sorted(largest(values, 2).tolist()) == [2, 3] and largest(values, 6).tolist()[4:] == [-math.inf] * 2
    )


def test_the_decoder_keeps_unit_rows_and_a_gradient_along_the_sphere():
    model = make("topk")
    model(rows(), NONE_DEAD, 1.0).loss.backward()
    model.constrain()
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(D_SAE))
    model.free_rows()
    torch.testing.assert_close((model.W_dec.grad * model.W_dec).sum(1), torch.zeros(D_SAE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["none", "global", "token"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_exported_encodes_and_reconstructs_raw_activations(architecture: str, kind: str):
    """Encoding raw activations with the exported SAE, by its own formulas, gives the codes and the
    reconstruction of the trained one.
    """
    x = rows(40, seed=5) * 3 - 1
    normalizer = Normalizer.of(kind, x)
    model = make(architecture).eval()
    scale = normalizer.scale if kind == "global" else 1.0
    with torch.no_grad():
        normal = normalizer(x)
        if architecture in ("batch_topk", "matryoshka_batch_topk"):
            model.threshold.fill_(0.8)
            pre = torch.relu((normal - model.b_dec) @ model.W_enc.T + model.b_enc)
            codes = pre * (pre > 0.8)
        elif architecture == "topk":
            pre = (normal - model.b_dec) @ model.W_enc.T + model.b_enc
            top = pre.topk(3)
            codes = torch.zeros_like(pre).scatter_(1, top.indices, torch.relu(top.values))
        elif architecture == "relu":
            codes = torch.relu((normal - model.b_dec) @ model.W_enc.T + model.b_enc)
        elif architecture == "gated":
            read = (normal - model.b_dec) @ model.W_enc.T
            codes = (read + model.b_enc > 0) * torch.relu(model.r_mag.exp() * read + model.mag_bias)
        else:
            read = normal @ model.W_enc.T + model.b_enc
            codes = read * (read > model.threshold.clamp_min(0))
        guess = codes @ model.W_dec + model.b_dec
    sae = as_sae(model, normalizer)
    found = sae.encode(x)
    torch.testing.assert_close(found.to_dense(), codes / scale, rtol=1e-4, atol=1e-5)
    if kind == "token":
        _, mean, deviation = layer_norm(x)
        guess = guess * deviation[:, None] + mean[:, None]
    torch.testing.assert_close(sae.decode(found), guess / scale, rtol=1e-4, atol=1e-4)


def test_normalisation():
    x = rows(500) * 7
    whole = Normalizer.of("global", x)(x)
    assert float((whole - whole.mean(0)).pow(2).mean()) == pytest.approx(1, rel=1e-5)
    each = Normalizer.of("token", x)(x)
    torch.testing.assert_close(each.mean(1), torch.zeros(500), atol=1e-5, rtol=0)
    torch.testing.assert_close(each.std(1), torch.ones(500), atol=1e-4, rtol=0)
    assert torch.equal(Normalizer.of("none", x)(x), x)


def test_the_geometric_median_has_the_smallest_sum_of_distances():
    from scipy.optimize import minimize

    x = torch.cat([rows(60), rows(5, 2) * 40])  # far points move the mean and not the median
    found = geometric_median(x.double()).numpy()
    best = minimize(
        lambda p: np.linalg.norm(x.double().numpy() - p, axis=1).sum(),
        x.double().mean(0).numpy(),
        method="Nelder-Mead",
        options={"maxiter": 20_000, "xatol": 1e-9, "fatol": 1e-9},
    )
    np.testing.assert_allclose(found, best.x, atol=2e-3)


def test_the_learning_rate_by_hand():
    t = TrainingTable(lr=1.0, lr_end=0.2, warmup=4)
    rates = [learning_rate(t, step, 13) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert (
        rates[4] == pytest.approx(1.0) and rates[8] == pytest.approx(0.6) and rates[12] == pytest.approx(0.2)
    )
    assert all(a >= b for a, b in pairwise(rates[4:]))
    linear = TrainingTable(lr=1.0, warmup=0, decay="linear")
    assert [learning_rate(linear, s, 5) for s in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert learning_rate(TrainingTable(lr=2.0, decay="constant", warmup=0), 99, 100) == 2.0
    short = TrainingTable(lr=1.0, warmup=100)
    assert learning_rate(short, 4, 5) == pytest.approx(1.0)  # a run shorter than its warm-up


def test_planned_steps():
    assert planned_steps(TrainingTable(samples=1000, batch=64), None) == 15
    assert planned_steps(TrainingTable(epochs=2, batch=10), 101) == 20
    with pytest.raises(ValueError, match="lr_end"):
        TrainingTable(lr=1e-4, lr_end=1e-3)
