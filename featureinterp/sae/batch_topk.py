"""BatchTopK at inference: codes of ReLU((x − b_dec) W_enc + b_enc) above one threshold for the whole
dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.errors import IncompatibleError
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.codes import SparseCodes


class BatchTopK(SparseAutoencoder):
    """Bussmann et al. 2024, "BatchTopK sparse autoencoders". ``threshold`` is a scalar ≥ 0 learned in
    training.
    """

    architecture = "batch_topk"
    extra = ("threshold",)

    @classmethod
    def shapes(cls, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(d_in, d_sae) | {"threshold": ()}

    def __init__(self, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.threshold = tensors["threshold"]
        if not float(self.threshold) >= 0:
            raise IncompatibleError(
                f"the BatchTopK threshold is {float(self.threshold):g}, so it was never learned: use a "
                "checkpoint from the end of training"
            )

    def _encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        z = self._centred(x)
        return SparseCodes.from_dense(torch.where(z > self.threshold, z, 0))
