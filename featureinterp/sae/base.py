"""What all architectures share: the tensors' names and shapes, decoding, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from featureinterp.errors import IncompatibleError
from featureinterp.sae.codes import SparseCodes


class SparseAutoencoder:
    """Base of the architectures. ``decode(encode(x))`` reconstructs activations ``x`` ``[token, d_in]``.

    ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``, and what ``extra`` names.
    """

    architecture: ClassVar[str]
    extra: ClassVar[tuple[str, ...]] = ()
    """Further tensors, each ``[d_sae]`` unless ``shapes`` says otherwise."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Keys of the configuration that the encoder needs, each a positive integer."""
    required_biases: ClassVar[tuple[str, ...]] = ("b_enc",)

    def __init__(self, tensors: Mapping[str, torch.Tensor], **settings: int) -> None:
        self.tensors = dict(tensors)
        self.W_enc, self.W_dec, self.b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
        self.b_enc = tensors.get("b_enc")
        for name in self.settings:
            if not isinstance(settings.get(name), int) or settings[name] < 1:
                raise IncompatibleError(f"a {self.architecture} SAE needs a positive integer {name!r} in its configuration, not {settings.get(name)!r}")
        self.options = {name: settings[name] for name in self.settings}

    @classmethod
    def shapes(cls, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of this architecture."""
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        return shapes | dict.fromkeys((*cls.required_biases, *cls.extra), (d_sae,))

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.W_enc.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_enc.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SparseAutoencoder:
        """The same SAE elsewhere or in another dtype."""
        return type(self)({k: v.to(device, dtype) for k, v in self.tensors.items()}, **self.options)

    def encode(self, x: torch.Tensor) -> SparseCodes:
        """Sparse codes of activations ``[token, d_in]`` (any float dtype; computed in the SAE's own)."""
        raise TypeError(f"{type(self).__name__} has no encoder")

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        """``codes @ W_dec + b_dec``: ``[token, d_in]``."""
        return codes.matmul(self.W_dec) + self.b_dec

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise IncompatibleError(f"the SAE takes activations [token, {self.d_in}], not {list(x.shape)}: it belongs to a model of another width")
        return x.to(self.W_enc.device, self.W_enc.dtype)

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        """``(x − b_dec) W_enc + b_enc`` in one fused product."""
        bias = -(self.b_dec @ self.W_enc)
        return torch.addmm(bias if self.b_enc is None else bias + self.b_enc, self._input(x), self.W_enc)
