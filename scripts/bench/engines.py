"""The engines that can read the embedded simulator's and judge's prompts, beside one another: transformers in
each dtype, and llama.cpp.

    python scripts/bench/engines.py [--quick] [--device cpu|cuda]

transformers: suffixes of three tokens behind a shared prefix of 250, in the batches of the token-wise
simulator; random weights of the shape of Qwen2.5-1.5B, two of its 28 layers, scaled to all. llama.cpp: one
prompt of 512 tokens by the embedded server, when the embedded explainer is in the cache (no shared prefix
helps it there: its server reads each prompt's own end alone). Tokens per second of each, and its ratio to the
fastest; ``auto`` names the dtype that the product takes.
"""

from __future__ import annotations

import time

import httpx
import torch
from common import arguments, report, seconds
from transformers import Qwen2Config, Qwen2ForCausalLM

from featureinterp.assets import fetch, is_cached
from featureinterp.llm.config import EMBEDDED
from featureinterp.llm.local_server import local_server
from featureinterp.local.prefix_cache import PrefixModel
from featureinterp.machine import DTYPES, this_machine

LAYERS, ALL_LAYERS = 2, 28
PREFIX, ROWS, SUFFIX = 250, 333, 3


def main() -> None:
    args = arguments(__doc__ or "")
    rounds = args.rounds or (2 if args.quick else 5)
    found = {}
    for dtype in ("float32", "bfloat16"):
        native = this_machine().native(dtype, args.device)
        found[f"transformers, {dtype}"] = transformers_speed(dtype, args.device, rounds if native else 1)
    if is_cached(EMBEDDED):
        found["llama.cpp, its own 4-bit weights"] = llama_speed(128 if args.quick else 512)
    best = max(found.values())
    for name, speed in found.items():
        report(
            f"engine {name}", speed, best, speed / best, unit="tokens/s", auto=args.dtype, device=args.device
        )


@torch.inference_mode()
def transformers_speed(dtype: str, device: str, rounds: int) -> float:
    """Tokens per second of suffixes behind a shared prefix."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(vocab_size=49_152, num_hidden_layers=LAYERS, **sizes)
    model = PrefixModel(Qwen2ForCausalLM(config).to(device, DTYPES[dtype]).eval().requires_grad_(False))
    prefix = model.prefix(list(range(1000, 1000 + PREFIX)))
    rows = ROWS if this_machine().native(dtype, device) else ROWS // 8
    ids = torch.randint(0, 49_152, (rows, SUFFIX), device=device)
    model.hidden(prefix, ids)
    best = min(seconds(lambda: model.hidden(prefix, ids), device) for _ in range(rounds))
    return ids.numel() / best * LAYERS / ALL_LAYERS


def llama_speed(n: int) -> float:
    """Tokens per second of one prompt that nothing of is cached."""
    with local_server(fetch(EMBEDDED).file) as server:
        url = server.base_url.removesuffix("/v1") + "/completion"
        body = {"prompt": [1000 + i * 7 % 5000 for i in range(n)], "n_predict": 1, "cache_prompt": False}
        headers = {"Authorization": f"Bearer {server.key}"}
        start = time.perf_counter()
        httpx.post(url, json=body, headers=headers, timeout=600).raise_for_status()
        return n / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
