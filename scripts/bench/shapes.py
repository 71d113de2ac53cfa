"""A subject and an SAE of the embedded ones' shapes, with random weights, so that nothing has to be fetched."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from featureinterp.sae.load import LoadedSae
from featureinterp.sae.topk import TopK
from featureinterp.subject.load import Subject

D_MODEL, D_SAE, K, BLOCKS = 576, 4608, 32, 15


class Ids:
    """Stands in for a tokenizer: token ids written as decimal numbers."""

    fingerprint = "bench"
    bos_token_id = 1

    def encode(self, texts: list[str]) -> list[object]:
        out = []
        for text in texts:
            words = text.split(" ")
            ends = np.cumsum([len(w) + 1 for w in words]) - 1
            out.append(type("E", (), {"ids": [int(w) for w in words], "offsets": list(zip([0, *(ends[:-1] + 1)], ends, strict=True))})())
        return out


def demo_shapes(device: str) -> tuple[Subject, LoadedSae]:
    """In bfloat16 and float32, hooked after block 14 of 30."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=D_MODEL, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, bos_token_id=1
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False).model
    subject = Subject("bench", model, Ids(), 30, D_MODEL, 8192, torch.device(device), torch.bfloat16)
    subject.__dict__["encoder"] = Ids()
    tensors = {"W_enc": torch.randn(D_MODEL, D_SAE) / 24, "W_dec": torch.randn(D_SAE, D_MODEL), "b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(D_MODEL)}
    sae = TopK({k: v.to(device) for k, v in tensors.items()}, k=K)
    loaded = LoadedSae("bench", sae, f"blocks.{BLOCKS - 1}.hook_resid_post", "bench", {}, "bench")
    return subject, loaded


def bare_blocks(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The residual stream after the hooked block for ids ``[window, token]`` behind a BOS, by nothing but the blocks: ``[window, token, d]``."""
    ids = torch.cat([torch.ones_like(ids[:, :1]), ids], 1)
    x = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = model.rotary_emb(x, positions)
    for block in model.layers[:BLOCKS]:
        x = block(x, position_embeddings=rotary, position_ids=positions)
    return x[:, 1:]
