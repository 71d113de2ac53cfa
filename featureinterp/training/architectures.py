"""SAEs that learn: what each architecture computes from a batch, and its loss.

Weights are held by feature (``W_enc``, ``W_dec``: ``[d_sae, d_in]``), decoder rows have unit norm. Inputs are
normalised; every loss is in shares of their variance V = E‖x − mean‖², so that the weight of a penalty means
the same for any model:

    reconstruction  Σ‖x − x̂‖² / (batch · V), the fraction of variance unexplained (FVU)
    TopK            + aux
                    Gao et al. 2024, "Scaling and evaluating sparse autoencoders"
    BatchTopK       + aux
                    Bussmann et al. 2024, "BatchTopK sparse autoencoders"
    Matryoshka      mean FVU of the prefixes + aux
                    Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders"
    ReLU            + λ Σ c / (batch · √V) + aux
                    Bricken et al. 2023, "Towards monosemanticity"
    JumpReLU        + λ (L0 / k − 1)² + aux
                    Rajamanoharan et al. 2024, "Jumping ahead", with a wanted L0
    gated           + λ Σ ReLU(π) / (batch · √V) + Σ‖x − x̂(ReLU(π))‖² / (batch · V), that x̂ with a frozen
                    decoder, + aux
                    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
    aux             α Σ‖e − ê‖² / Σ‖e‖²: of the error e by the ``aux_k`` largest codes of dead features
                    (Gao et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from featureinterp.sae.base import SparseAutoencoder, layer_norm
from featureinterp.sae.layouts.checkpoint import ARCHITECTURES
from featureinterp.training.functions import gated, jump, largest, nth_largest
from featureinterp.training.ranks import Ranks
from featureinterp.training.settings import SaeTable
from featureinterp.training.sparse import Pattern, decoded, encoded


class Step(NamedTuple):
    """What a batch gave: the ``loss`` to descend; the parts of it and of this process's rows, without
    gradients: ``error`` Σ‖x − x̂‖², ``penalty`` and ``aux`` (as they stand in the loss), ``n_codes``;
    ``fired``: which features did."""

    loss: Float[Tensor, ""]
    error: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    n_codes: Int64[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]


@dataclass(frozen=True)
class Normalizer:
    """What is done to activations before an SAE reads them in training. ``scale``: the one factor of
    ``global``.
    """

    kind: str
    scale: float = 1.0

    @classmethod
    def of(cls, kind: str, sample: Float[Tensor, "row d_in"]) -> Normalizer:
        """From a sample: ``global`` gives the centred rows unit variance per dimension, on average."""
        if kind != "global":
            return cls(kind)
        variance = float((sample - sample.mean(0)).pow(2).mean())
        return cls(kind, variance**-0.5 if variance > 0 else 1.0)

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        return layer_norm(x)[0] if self.kind == "token" else x * self.scale


class Trainable(nn.Module):
    """Base of the architectures. ``variance``: of the normalised inputs. ``bias``: the pre-bias;
    ``ranks``: the processes that share a batch.
    """

    def __init__(
        self,
        d_in: int,
        table: SaeTable,
        *,
        bias: Float[Tensor, " d_in"],
        variance: float,
        generator: torch.Generator,
        ranks: Ranks = Ranks(),
    ) -> None:
        super().__init__()
        d_sae = table.width(d_in)
        self.table, self.variance, self.ranks = table, variance, ranks
        self.d_in, self.d_sae = d_in, d_sae
        self.aux_k = min(d_sae, d_in // 2 if table.aux_k is None else table.aux_k)
        self.half_precision = False
        directions = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_enc = nn.Parameter(directions.clone())
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(bias.clone())

    def forward(self, x: Float[Tensor, "row d_in"], dead: Int64[Tensor, " dead"], strength: float) -> Step:
        """The loss of normalised ``x``. ``dead``: the features that are; ``strength``: how far the penalty
        has grown, 0 to 1.
        """
        raise NotImplementedError

    def export(self, scale: float) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        """(architecture, tensors in units of activations that were multiplied by ``scale``, settings) as
        :class:`SparseAutoencoder` takes them.
        """
        tensors = {
            "W_enc": self.W_enc.T,
            "W_dec": self.W_dec,
            "b_enc": self.b_enc / scale,
            "b_dec": self.b_dec / scale,
        }
        return self.table.architecture, tensors, {}

    @torch.no_grad()
    def free_rows(self) -> None:
        """Takes out of the decoder's gradient what would only change the length of its rows."""
        if self.W_dec.grad is not None:
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def constrain(self) -> None:
        """Gives every decoder row unit norm, after a step."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def _aux(
        self, x: Float[Tensor, "row d_in"], error: Float[Tensor, "row d_in"], dead: Int64[Tensor, " dead"]
    ) -> Float[Tensor, ""]:
        """The auxiliary loss of dead features: how much of the error is left when they reconstruct it."""
        if not len(dead) or not self.aux_k or not self.table.aux_coefficient:
            return x.new_zeros(())
        error = error.detach()
        values = self._before(x, dead)
        top, chosen = torch.topk(values, min(self.aux_k, len(dead)), dim=1, sorted=False)
        guess = embedding_bag(dead[chosen], self.W_dec, mode="sum", per_sample_weights=torch.relu(top))
        whole = self.ranks.sum(error.pow(2).sum()) / self.ranks.world
        return self.table.aux_coefficient * (error - guess).pow(2).sum() / whole.clamp_min(1e-12)

    def _before(
        self, x: Float[Tensor, "row d_in"], features: Int64[Tensor, " feature"]
    ) -> Float[Tensor, "row feature"]:
        """What some features read, before any threshold."""
        return linear(x - self.b_dec, self.W_enc[features], self.b_enc[features])

    def _fvu(self, error: Float[Tensor, "row d_in"]) -> Float[Tensor, ""]:
        return error.pow(2).sum() / (len(error) * self.variance)


class ByCount(Trainable):
    """TopK: the k largest codes of each token. Base of those that keep a number of codes."""

    def forward(self, x: Float[Tensor, "row d_in"], dead: Int64[Tensor, " dead"], strength: float) -> Step:
        centred = (x - self.b_dec).detach()
        with torch.no_grad():
            values, pattern = self._chosen(centred)
        codes = torch.relu(encoded(values, centred, self.W_enc, self.b_enc, self.b_dec, pattern))
        prefixes = decoded(codes, self.W_dec, pattern, self.ends)
        errors = x - self.b_dec - prefixes
        reconstruction = errors.pow(2).sum() / (len(errors) * len(x) * self.variance)
        aux = self._aux(x, errors[-1], dead)
        positive = values > 0
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=x.device).index_fill_(
            0, pattern.features[positive], True
        )
        whole = errors[-1].detach().pow(2).sum()
        return Step(reconstruction + aux, whole, x.new_zeros(()), aux.detach(), positive.sum(), fired)

    @property
    def ends(self) -> list[int]:
        """Where the prefixes of the dictionary end that reconstruct on their own."""
        return [self.d_sae]

    def _chosen(self, centred: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, " chosen"], Pattern]:
        """The values of the codes that are kept, and which they are."""
        values, indices = torch.topk(self._all(centred), min(self.table.k, self.d_sae), dim=1, sorted=False)
        pattern = Pattern.equal(indices, self.d_sae)
        return self._exact(values.flatten(), centred, pattern), pattern

    def _all(self, centred: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_sae"]:
        """What every feature reads; in half precision it only chooses."""
        if self.half_precision:
            return linear(centred.bfloat16(), self.W_enc.bfloat16(), self.b_enc.bfloat16())
        return linear(centred, self.W_enc, self.b_enc)

    def _exact(
        self, values: Float[Tensor, " chosen"], centred: Float[Tensor, "row d_in"], pattern: Pattern
    ) -> Float[Tensor, " chosen"]:
        """The values of chosen codes in full precision."""
        return (
            pattern.products(centred, self.W_enc) + self.b_enc[pattern.features]
            if self.half_precision
            else values
        )

    def export(self, scale: float) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        name, tensors, _ = super().export(scale)
        return name, tensors, {"k": self.table.k}


class ByBatch(ByCount):
    """BatchTopK: the k · batch largest codes of the whole batch; a running mean of the smallest becomes the
    threshold. Matryoshka keeps its codes in the same way."""

    threshold: torch.Tensor

    def __init__(self, d_in: int, table: SaeTable, **options: Any) -> None:
        super().__init__(d_in, table, **options)
        self.register_buffer("threshold", torch.tensor(-1.0))

    def _chosen(self, centred: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, " chosen"], Pattern]:
        dense = torch.relu(self._all(centred))
        n = min(self.table.k * len(dense) * self.ranks.world, dense.numel())
        smallest = (
            nth_largest(self.ranks.gather(largest(dense.flatten(), n)), n)
            if self.ranks.world > 1
            else nth_largest(dense.flatten(), n)
        )
        mask = (dense >= smallest) & (dense > 0)
        pattern = Pattern.where(mask)
        values = self._exact(dense[mask], centred, pattern)
        kept = self.ranks.min(
            values[values > 0].min() if bool((values > 0).any()) else dense.new_tensor(float("inf"))
        )
        if self.training and bool(torch.isfinite(kept)):
            decay = self.table.threshold_decay if float(self.threshold) >= 0 else 0.0
            self.threshold.copy_(decay * self.threshold + (1 - decay) * kept)
        return values, pattern

    def export(self, scale: float) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        _, tensors, _ = Trainable.export(self, scale)
        return "batch_topk", tensors | {"threshold": self.threshold / scale}, {}


class Matryoshka(ByBatch):
    """BatchTopK whose prefixes reconstruct on their own, so that the first features learn what is general."""

    @property
    def ends(self) -> list[int]:
        return sorted({max(1, round(p * self.d_sae)) for p in self.table.prefixes})


class Dense(Trainable):
    """Base of the architectures whose codes are sparse by a penalty, and not from the first step on."""

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half_precision):
            return linear(x, weight, bias).to(x.dtype)

    def _decoded(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self.half_precision):
            return (codes @ weight).to(codes.dtype)

    def _step(
        self,
        x: Float[Tensor, "row d_in"],
        codes: Float[Tensor, "row d_sae"],
        penalty: Float[Tensor, ""],
        dead: Int64[Tensor, " dead"],
        extra: Float[Tensor, ""] | None = None,
    ) -> Step:
        error = x - self.b_dec - self._decoded(codes, self.W_dec)
        aux = self._aux(x, error, dead)
        loss = self._fvu(error) + penalty + aux
        n_codes, fired = torch.count_nonzero(codes.detach()), codes.detach().amax(0) > 0
        return Step(
            loss if extra is None else loss + extra,
            error.detach().pow(2).sum(),
            penalty.detach(),
            aux.detach(),
            n_codes,
            fired,
        )


class ReLU(Dense):
    """ReLU with an L1 penalty."""

    def forward(self, x: Float[Tensor, "row d_in"], dead: Int64[Tensor, " dead"], strength: float) -> Step:
        codes = torch.relu(self._linear(x - self.b_dec, self.W_enc, self.b_enc))
        penalty = strength * self.table.penalty_or_default * codes.sum() / (len(x) * self.variance**0.5)
        return self._step(x, codes, penalty, dead)


class Gated(Dense):
    """One path decides which features fire, the other, with the same directions, how much."""

    def __init__(self, d_in: int, table: SaeTable, **options: Any) -> None:
        super().__init__(d_in, table, **options)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.mag_bias = nn.Parameter(torch.zeros(self.d_sae))

    def forward(self, x: Float[Tensor, "row d_in"], dead: Int64[Tensor, " dead"], strength: float) -> Step:
        opened, codes = gated(
            self._linear(x - self.b_dec, self.W_enc), self.b_enc, torch.exp(self.r_mag), self.mag_bias
        )
        penalty = strength * self.table.penalty_or_default * opened.sum() / (len(x) * self.variance**0.5)
        by_gate = x - self.b_dec.detach() - self._decoded(opened, self.W_dec.detach())
        return self._step(x, codes, penalty, dead, self._fvu(by_gate))

    def export(self, scale: float) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        name, tensors, settings = super().export(scale)
        gate = tensors.pop("b_enc")
        return (
            name,
            tensors | {"gate_bias": gate, "r_mag": self.r_mag, "mag_bias": self.mag_bias / scale},
            settings,
        )


class JumpReLU(Dense):
    """Each feature has a threshold of its own, which learns through a kernel of width ``bandwidth`` around
    it.
    """

    def __init__(self, d_in: int, table: SaeTable, *, bias: Float[Tensor, " d_in"], **options: Any) -> None:
        super().__init__(d_in, table, bias=bias, **options)
        self.threshold = nn.Parameter(torch.full((self.d_sae,), float(table.bandwidth)))
        with torch.no_grad():
            self.b_enc.copy_(-self.W_enc @ bias)  # its input is not centred

    def forward(self, x: Float[Tensor, "row d_in"], dead: Int64[Tensor, " dead"], strength: float) -> Step:
        codes, count = jump(self._linear(x, self.W_enc, self.b_enc), self.threshold, self.table.bandwidth)
        local = count / len(x)
        # the square is of the mean over all processes; what is descended is its tangent, which adds up over
        # them
        mean = self.ranks.sum(local) / self.ranks.world
        off = mean / self.table.k - 1
        penalty = (
            strength
            * self.table.penalty_or_default
            * (off**2 + 2 * off / self.table.k * (local - local.detach()))
        )
        return self._step(x, codes, penalty, dead)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_(min=0)

    def _before(
        self, x: Float[Tensor, "row d_in"], features: Int64[Tensor, " feature"]
    ) -> Float[Tensor, "row feature"]:
        return linear(x, self.W_enc[features], self.b_enc[features])

    def export(self, scale: float) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        name, tensors, settings = super().export(scale)
        return name, tensors | {"threshold": self.threshold / scale}, settings


TRAINABLE: dict[str, type[Trainable]] = {
    "topk": ByCount,
    "batch_topk": ByBatch,
    "matryoshka_batch_topk": Matryoshka,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def as_sae(model: Trainable, normalizer: Normalizer) -> SparseAutoencoder:
    """The SAE that was learned, for activations as the model gives them: codes are in units of the residual
    stream (``token``: of the token's deviation).
    """
    scale = normalizer.scale if normalizer.kind == "global" else 1.0
    name, tensors, settings = model.export(scale)
    held = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    return ARCHITECTURES[name](
        held, normalize="layer_norm" if normalizer.kind == "token" else "none", **settings
    )
