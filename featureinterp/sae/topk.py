"""TopK: of ReLU((x − b_dec) W_enc + b_enc), the k largest codes of each token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.codes import SparseCodes


class TopK(SparseAutoencoder):
    """Gao et al. 2024, "Scaling and evaluating sparse autoencoders". Setting ``k``."""

    architecture = "topk"
    settings = ("k",)

    def _encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        values, indices = torch.topk(self._centred(x), self.options["k"], dim=-1, sorted=False)
        return SparseCodes.from_top(indices, values, self.d_sae)
