"""The all-at-once simulator against its limit, and against a long prompt simulated the ordinary way.

    python scripts/bench/simulate.py [--quick] [--device cpu|cuda]

Limit: the bare blocks over the explanation's and the windows' own tokens at the same prompt, the shared prefix free, six rows of the output
matrix. Long prompt: a header of 1,000 tokens whose keys and values are copied for every window, 4.7 prompt tokens per token of the window, all
logits of the levels' rows. Random weights of the shape of Qwen2.5-1.5B, the default simulator; on a processor with 4 of its 28 layers.
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, compare, report
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.record import Window
from featureinterp.simulate.all_at_once import AllAtOnce

WINDOW = 32


class Letters:
    """Stands in for a tokenizer whose words, levels, tab and fill have one token each."""

    bos_token_id = None

    def encode(self, text: str, **_: object) -> list[int]:
        if len(text) <= 1:
            return [ord(text) % 997 + 1] if text else []
        if text == "unknown\n":
            return [2001, 2002]
        return [hash_of(word) for word in text.replace("\n", " \n ").replace("\t", " \t ").split(" ") if word] or [5]


def hash_of(word: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(word)) % 30_000 + 3000


def main() -> None:
    args = arguments(__doc__ or "")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=49_152 if args.device == "cpu" else 151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=4 if args.device == "cpu" else 28,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).to(args.device, torch.bfloat16).eval().requires_grad_(False)
    n_windows, rules = (8, 1) if args.quick else (32, 3) if args.device == "cpu" else (256, 5)
    windows = [Window(0, 0, np.arange(WINDOW), tuple(f" w{i}x{j}" for j in range(WINDOW)), np.zeros(WINDOW, np.float32)) for i in range(n_windows)]
    explanations = [Explanation.sentence(f"words about subject number {i} and the like", Provenance("bench")) for i in range(rules)]
    simulator = AllAtOnce(lambda: (model, Letters()), name="bench", batch_tokens=1024 if args.device == "cpu" else 32_768)

    def ours() -> None:
        for explanation in explanations:
            simulator.predict(explanation, windows)

    built = [simulator.builder.window(w.pieces) for w in windows]
    width = len(built[0].ids)
    ids = torch.tensor([b.ids for b in built], device=args.device)
    positions = torch.tensor([b.positions for b in built], device=args.device)
    levels = torch.tensor(simulator.builder.levels, device=args.device)
    head = model.get_output_embeddings().weight[levels]
    batch = max(1, simulator.batch_tokens // width)

    @torch.inference_mode()
    def limit() -> None:
        for explanation in explanations:
            own = torch.tensor([simulator.builder.explanation(explanation.text)], device=args.device)
            model.base_model(input_ids=own, use_cache=False)
            for start in range(0, n_windows, batch):
                hidden = model.base_model(input_ids=ids[start : start + batch], use_cache=False).last_hidden_state
                hidden = torch.gather(hidden, 1, positions[start : start + batch, :, None].expand(-1, -1, hidden.shape[-1]))
                torch.softmax((hidden @ head.T).float(), -1).cpu()

    long_width = round(4.7 * WINDOW)
    long_ids = torch.randint(3000, 30_000, (n_windows, long_width), device=args.device)
    with torch.inference_mode():
        cache = DynamicCache()
        model.base_model(input_ids=torch.randint(3000, 30_000, (1, 1000), device=args.device), past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def long_prompt() -> None:
        for _ in explanations:
            for start in range(0, n_windows, batch):
                part = long_ids[start : start + batch]
                copy = DynamicCache()
                for number, layer in enumerate(cache.layers):
                    copy.update(layer.keys.repeat(len(part), 1, 1, 1), layer.values.repeat(len(part), 1, 1, 1), number)
                hidden = model.base_model(input_ids=part, past_key_values=copy, use_cache=True).last_hidden_state
                torch.softmax((hidden @ head.T).float(), -1).cpu()

    rounds = args.rounds or (2 if args.quick else 5)
    mine, bare = compare(ours, limit, args.device, rounds)
    units, unit, tokens = n_windows * rules, "s per window and rule", width / WINDOW
    report("simulate", mine / units, bare / units, bare / mine, unit=unit, target=">= 0.85", tokens_per_token=tokens, device=args.device)
    mine, slow = compare(ours, long_prompt, args.device, rounds)
    report("simulate, long prompt", mine / units, slow / units, slow / mine, unit=unit, target=">= 3", device=args.device)


if __name__ == "__main__":
    main()
