"""JumpReLU: z = x W_enc + b_enc, kept where z exceeds the feature's own threshold. The input is not
centred.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.codes import SparseCodes


class JumpReLU(SparseAutoencoder):
    """Rajamanoharan et al. 2024, "Jumping ahead". ``threshold [d_sae]``."""

    architecture = "jumprelu"
    extra = ("threshold",)

    def __init__(self, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.threshold = tensors["threshold"]

    def _encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        z = torch.addmm(self.tensors["b_enc"], x, self.W_enc)
        return SparseCodes.from_dense(torch.where((z > self.threshold) & (z > 0), z, 0))
