"""Subjects and SAEs of real shapes with random weights, so that nothing has to be fetched, in the dtype that
the device computes fastest.

``smollm2-135m``: the embedded ones. For a GPU: ``gemma-2-2b-16k``, ``gemma-2-2b-65k`` (to block 12) and
``llama-3.1-8b`` (to block 16).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from featureinterp.machine import DTYPES, choice
from featureinterp.sae.load import LoadedSae
from featureinterp.sae.topk import TopK
from featureinterp.subject.hooks import find_blocks
from featureinterp.subject.load import Subject

D_MODEL, D_SAE, K, BLOCKS = 576, 4608, 32, 15


@dataclass(frozen=True)
class Shape:
    """A model's configuration, the blocks that are run, and the SAE behind them."""

    config: Any
    model: Any
    blocks: int
    d_sae: int
    k: int


def _llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(bos_token_id=1, **sizes)


_SMALL = {
    "vocab_size": 49_152,
    "hidden_size": D_MODEL,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
_LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_GEMMA_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
SHAPES = {
    "smollm2-135m": lambda: Shape(_llama(**_SMALL), LlamaForCausalLM, BLOCKS, D_SAE, K),
    "gemma-2-2b-16k": lambda: Shape(
        Gemma2Config(bos_token_id=1, **_GEMMA_2B), Gemma2ForCausalLM, 13, 16_384, 64
    ),
    "gemma-2-2b-65k": lambda: Shape(
        Gemma2Config(bos_token_id=1, **_GEMMA_2B), Gemma2ForCausalLM, 13, 65_536, 64
    ),
    "llama-3.1-8b": lambda: Shape(_llama(**_LLAMA_8B), LlamaForCausalLM, 17, 32_768, 64),
}


class Ids:
    """Stands in for a tokenizer: token ids written as decimal numbers."""

    fingerprint = "bench"
    bos_token_id = 1

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        out = []
        for text in texts:
            words = text.split(" ")
            ends = np.cumsum([len(w) + 1 for w in words]) - 1
            out.append(
                type(
                    "E",
                    (),
                    {
                        "ids": [int(w) for w in words],
                        "offsets": list(zip([0, *(ends[:-1] + 1)], ends, strict=True)),
                    },
                )()
            )
        return out


def shapes(device: str, name: str = "smollm2-135m") -> tuple[Subject, LoadedSae]:
    """A subject in the fastest dtype of the device, and a float32 TopK SAE, hooked after the last block that
    is run.
    """
    torch.manual_seed(0)
    shape, dtype = SHAPES[name](), DTYPES[choice(device=device)["dtype"]]
    shape.config.num_hidden_layers = min(
        shape.config.num_hidden_layers, shape.blocks + 1
    )  # the rest is never run
    with torch.device(device):
        model = shape.model._from_config(shape.config, dtype=dtype).eval().requires_grad_(False).model
    d_model, n_blocks = shape.config.hidden_size, shape.config.num_hidden_layers
    subject = Subject("bench", model, Ids(), n_blocks, d_model, 8192, torch.device(device), dtype)
    subject.__dict__["encoder"] = Ids()
    tensors = {
        "W_enc": torch.randn(d_model, shape.d_sae, device=device) / d_model**0.5,
        "W_dec": torch.randn(shape.d_sae, d_model, device=device),
        "b_enc": torch.zeros(shape.d_sae, device=device),
        "b_dec": torch.zeros(d_model, device=device),
    }
    loaded = LoadedSae(
        "bench", TopK(tensors, k=shape.k), f"blocks.{shape.blocks - 1}.hook_resid_post", "bench", {}, "bench"
    )
    return subject, loaded


def bare_blocks(subject: Subject, hook: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The residual stream after the hooked block for ids ``[window, token]`` behind a BOS, by nothing but the
    blocks: ``[window, token, d]``.
    """
    model, n = subject.model, subject.check_hook(hook) + 1
    blocks = find_blocks(model, subject.n_blocks)[:n]
    short: Any = copy.copy(model)  # a class of the library, whose types are not read
    short._modules = {**model._modules, "layers": blocks, "norm": torch.nn.Identity()}
    short.config = copy.copy(short.config)
    short.config.num_hidden_layers = n

    def run(ids: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([torch.ones_like(ids[:, :1]), ids], 1)
        return short(input_ids=ids, use_cache=False).last_hidden_state[:, 1:]

    return run
