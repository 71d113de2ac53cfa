"""Texts are embedded in batches that fit: a memory error is injected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from featureinterp.errors import DeviceMemoryError
from featureinterp.sampling.similar import SentenceEmbedder


class Limited:
    """Embeds a text as its length, at most ``most`` of them at once."""

    device = torch.device("cpu")

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, list[int]()

    def encode(self, texts: list[str], *, batch_size: int, **_: Any) -> np.ndarray:
        self.sizes.append(min(batch_size, len(texts)))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return np.array([[len(text)] for text in texts], np.float64)


def test_batches_are_halved_and_the_size_is_kept():
    embedder = SentenceEmbedder("tiny")
    embedder._model = model = Limited(20)
    texts = ["x" * n for n in range(100)]
    for _ in range(2):
        found = embedder.embed(texts)
        assert found.dtype == np.float32 and found[:, 0].tolist() == list(range(100))
    assert model.sizes == [64, 32, 16, 16]


def test_one_text_that_does_not_fit_is_an_error():
    embedder = SentenceEmbedder("tiny")
    embedder._model = Limited(0)
    with pytest.raises(DeviceMemoryError, match="embedding texts: one row"):
        embedder.embed(["a", "b", "c"])
