"""ReLU with a sparsity penalty in training: ReLU((x − b_dec) W_enc + b_enc)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.codes import SparseCodes


class ReLU(SparseAutoencoder):
    """Bricken et al. 2023, "Towards monosemanticity"; p-annealed SAEs encode the same way."""

    architecture = "relu"

    def _encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        return SparseCodes.from_dense(torch.relu(self._centred(x)))
