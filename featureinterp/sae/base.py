"""What all architectures share: the tensors' names and shapes, input normalisation, decoding, and their
checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from featureinterp.errors import IncompatibleError
from featureinterp.sae.codes import SparseCodes

Normalize = Literal["none", "layer_norm", "center"]
LAYER_NORM_EPSILON = 1e-5


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite, without a copy of the tensor."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def layer_norm(
    x: Float[Tensor, "*token d_in"],
) -> tuple[Float[Tensor, "*token d_in"], Float[Tensor, " *token"], Float[Tensor, " *token"]]:
    """((x − mean) / (deviation + 1e-5), mean, deviation) of every row; the deviation is the unbiased one."""
    mean = x.mean(-1, keepdim=True)
    deviation = x.std(-1, keepdim=True)
    return (x - mean) / (deviation + LAYER_NORM_EPSILON), mean.squeeze(-1), deviation.squeeze(-1)


class SparseAutoencoder:
    """Base of the architectures. ``decode(encode(x))`` reconstructs activations ``x [token, d_in]``.

    ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``, and what ``extra``
    names.
    ``normalize``: what is done to every token before it is encoded, and undone by decoding: nothing;
    :func:`layer_norm`, codes are then in units of the token's deviation; or ``center``, the token less its
    own mean.

    Raises ``IncompatibleError`` for settings and tensors with which nothing could be encoded.
    """

    architecture: ClassVar[str]
    extra: ClassVar[tuple[str, ...]] = ()
    """Further tensors, each ``[d_sae]`` unless ``shapes`` says otherwise."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Keys of the configuration that the encoder needs, each an integer from 1 to ``d_sae``."""
    required_biases: ClassVar[tuple[str, ...]] = ("b_enc",)

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, normalize: Normalize = "none", **settings: Any
    ) -> None:
        if normalize not in get_args(Normalize):
            raise IncompatibleError(
                f"there is no input normalisation {repr(normalize)[:60]}: known are "
                f"{', '.join(get_args(Normalize))}"
            )
        self.tensors, self.normalize = dict(tensors), normalize
        self.W_enc, self.W_dec, self.b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
        self.b_enc = tensors.get("b_enc")
        for name in self.settings:
            value = settings.get(name)
            if type(value) is not int or not 1 <= value <= self.d_sae:
                raise IncompatibleError(
                    f"a {self.architecture} SAE of {self.d_sae:,} features needs a positive integer "
                    f"{name!r} up to that number in its "
                    f"configuration, not {repr(value)[:60]}",
                )
        self.options = {name: settings[name] for name in self.settings}

    @classmethod
    def shapes(cls, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of this architecture."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (d_in, d_sae),
            "W_dec": (d_sae, d_in),
            "b_dec": (d_in,),
        }
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
        return type(self)(
            {k: v.to(device, dtype) for k, v in self.tensors.items()},
            normalize=self.normalize,
            **self.options,
        )

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        """Sparse codes of activations (any float dtype; computed in the SAE's own)."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise IncompatibleError(
                f"the SAE takes activations [token, {self.d_in}], not {list(x.shape)}: it belongs to a "
                "model of another width"
            )
        x = x.to(self.W_enc.device, self.W_enc.dtype)
        if self.normalize == "none":
            return self._checked(x)
        if self.normalize == "center":
            mean = x.mean(-1)
            return replace(self._checked(x - mean[:, None]), shift=mean, scale=torch.ones_like(mean))
        normal, mean, deviation = layer_norm(x)
        return replace(self._checked(normal), shift=mean, scale=deviation)

    def check(self, where: object) -> None:
        """Raises ``IncompatibleError`` when a tensor, or what the encoder makes of one, is not finite in this
        dtype, or when the decoder is zero. ``where``: what is named in the message."""
        for name, tensor in {**self.tensors, **self._derived()}.items():
            if not all_finite(tensor):
                raise IncompatibleError(
                    f"{where} is not finite in {str(tensor.dtype).removeprefix('torch.')} ({name}): it is "
                    "damaged, its training "
                    "diverged, or it needs a wider dtype",
                )
        if not bool(self.W_dec.any()):
            raise IncompatibleError(
                f"the decoder of {where} is zero: no code of it could be reconstructed or steered"
            )

    def _derived(self) -> dict[str, torch.Tensor]:
        """What is computed from the tensors alone, before any input."""
        return {"the shift of its input": self.b_dec @ self.W_enc}

    @cached_property
    def _gain(self) -> float:
        """How much longer than an input a code can be at most: the largest norm of an encoder's column."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        return max(
            (float(part.to(wide).norm(dim=0).max()) for part in self.W_enc.split(4096, dim=1)), default=0.0
        )

    def _checked(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        """The codes of normalised activations. Raises ``IncompatibleError`` when one is beyond what the dtype
        can hold.

        By Cauchy and Schwarz no product exceeds the input's norm times ``_gain``; below the limit none needs
        to be looked at. A GPU is waited for once.
        """
        codes = self._encode(x)
        if not len(x):
            return codes
        exact = torch.promote_types(x.dtype, torch.float32)
        ends = codes.values.aminmax() if codes.values.numel() else (codes.values.new_zeros(()),) * 2
        longest, *sizes = torch.stack(
            [end.detach().to(exact) for end in (x.to(exact).norm(dim=1).max(), *ends)]
        ).tolist()
        fits = longest * self._gain < torch.finfo(x.dtype).max / 4 or all_finite(x @ self.W_enc)
        if not fits or not all(map(math.isfinite, sizes)):
            raise IncompatibleError(
                f"the SAE's codes are not finite in {str(x.dtype).removeprefix('torch.')}: its weights or "
                "the activations are too "
                "large or damaged; use a wider dtype or another SAE",
            )
        return codes

    def decode(self, codes: SparseCodes) -> Float[Tensor, "token d_in"]:
        """``codes @ W_dec + b_dec``, with the input's normalisation undone."""
        found = codes.matmul(self.W_dec) + self.b_dec
        if codes.scale is None or codes.shift is None:
            return found
        return found * codes.scale[:, None] + codes.shift[:, None]

    def units(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, " *token"]:
        """By how much a code of 1 moves each token along its decoder row: the token's deviation where tokens
        are normalised by it, else 1.
        """
        return layer_norm(x)[2] if self.normalize == "layer_norm" else torch.ones_like(x[..., 0])

    def _encode(self, x: Float[Tensor, "token d_in"]) -> SparseCodes:
        raise TypeError(f"{type(self).__name__} has no encoder")

    def _centred(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """``(x − b_dec) W_enc + b_enc`` in one fused product."""
        bias = -(self.b_dec @ self.W_enc)
        return torch.addmm(bias if self.b_enc is None else bias + self.b_enc, x, self.W_enc)
