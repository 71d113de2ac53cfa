"""Gated: u = (x − b_dec) W_enc decides by u + gate_bias which features fire, and ReLU(exp(r_mag) u +
mag_bias) how much.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.codes import SparseCodes


class Gated(SparseAutoencoder):
    """Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"."""

    architecture = "gated"
    extra = ("r_mag", "gate_bias", "mag_bias")
    required_biases = ()

    def _derived(self) -> dict[str, torch.Tensor]:
        return super()._derived() | {"exp(r_mag)": torch.exp(self.tensors["r_mag"])}

    def _encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        u = self._centred(x)
        size = torch.relu(torch.exp(self.tensors["r_mag"]) * u + self.tensors["mag_bias"])
        return SparseCodes.from_dense(torch.where(u + self.tensors["gate_bias"] > 0, size, 0))
