"""Features that write in nearly the same direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

_CHUNK = 1024


@torch.inference_mode()
def nearest_directions(
    decoder: Float[Tensor, "d_sae d_in"], features: Sequence[int], k: int
) -> tuple[Int64[np.ndarray, "feature k"], Float32[np.ndarray, "feature k"]]:
    """For each of ``features`` the ``k`` others (fewer in a smaller dictionary) with the largest cosine
    between rows of ``decoder``: their indices, nearest first, and cosines."""
    unit = torch.nn.functional.normalize(decoder.float(), dim=-1)
    k = min(k, len(unit) - 1)
    wanted = torch.tensor(list(features), dtype=torch.int64, device=unit.device)
    indices, cosines = [], []
    for part in wanted.split(_CHUNK):
        cosine = unit[part] @ unit.T
        cosine[torch.arange(len(part), device=unit.device), part] = -torch.inf
        found = cosine.topk(k, dim=-1)
        indices.append(found.indices.cpu().numpy())
        cosines.append(found.values.cpu().numpy())
    shape = (0, max(k, 0))
    return np.concatenate([np.zeros(shape, np.int64), *indices]), np.concatenate(
        [np.zeros(shape, np.float32), *cosines]
    )
