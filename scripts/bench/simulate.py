"""The simulators on a local model against their limit, against the plain way, and against a long prompt
simulated the ordinary way.

    python scripts/bench/simulate.py [--quick] [--device cpu|cuda]

20 windows of 32 tokens are simulated by an explanation of 3 rules, whole, the header computed before. Words
are drawn as in text, by Zipf's law. Limit: the bare blocks over the tokens that the simulator itself reads,
in batches of the same size, the shared prefix free, six rows of the output matrix. Plain way (all-at-once):
one prompt per rule and window, header included, all logits. Long prompt: a header of 1,000 tokens whose keys
and values are copied for every window, 4.7 prompt tokens per token of the window. Random weights of the shape
of Qwen2.5-1.5B, the default simulator, in the dtype that the device computes fastest; on a processor with 4
of its 28 layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import arguments, compare, report
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.record import Window
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.local.simulator import LocalSimulator, batches, padded
from featureinterp.local.token_wise import TokenWise
from featureinterp.machine import DTYPES

WINDOW, WINDOWS, RULES = 32, 20, 3
EXPLANATION = Explanation(
    tuple(Rule(f"words about subject number {i} and the like", 5 - i) for i in range(RULES)),
    Provenance("bench"),
)


class Letters:
    """Stands in for a tokenizer whose words, levels, tab and fill have one token each."""

    bos_token_id = None

    def encode(self, text: str, **_: object) -> list[int]:
        if len(text) <= 1:
            return [ord(text) % 997 + 1] if text else []
        if text == "unknown\n":
            return [2001, 2002]
        return [
            hash_of(word) for word in text.replace("\n", " \n ").replace("\t", " \t ").split(" ") if word
        ] or [5]


def hash_of(word: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(word)) % 30_000 + 3000


def words(n_windows: int) -> list[Window]:
    """Windows of words drawn by Zipf's law from 5,000."""
    share = 1 / np.arange(1, 5001)
    drawn = np.random.default_rng(0).choice(5000, (n_windows, WINDOW), p=share / share.sum())
    return [
        Window(0, 0, np.arange(WINDOW), tuple(f" w{i}" for i in row), np.zeros(WINDOW, np.float32))
        for row in drawn
    ]


def main() -> None:
    args = arguments(__doc__ or "")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=49_152 if args.device == "cpu" else 151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=(2 if args.quick else 4) if args.device == "cpu" else 28,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).to(args.device, DTYPES[args.dtype]).eval().requires_grad_(False)
    windows, rounds = words(WINDOWS), args.rounds or (2 if args.quick else 5)
    batch_tokens = 1024 if args.device == "cpu" else 32_768
    units, unit = WINDOWS * RULES, "s per window and rule"
    for kind in (TokenWise, AllAtOnce):
        simulator = kind(
            lambda: (model, Letters()), name="bench", dtype=args.dtype, batch_tokens=batch_tokens
        )
        rows = rows_of(simulator, windows)
        read = round(sum(map(len, rows)) / (WINDOWS * WINDOW), 2)

        def ours(simulator: LocalSimulator = simulator) -> None:
            if isinstance(simulator, TokenWise):
                simulator._neutral.clear()
            simulator.predict(EXPLANATION, windows)

        name, more = f"simulate, {kind.kind}", {"unit": unit, "read": read, "device": args.device}
        mine, bare = compare(ours, Bare(simulator, rows, prefix=[]), args.device, rounds)
        report(name, mine / units, bare / units, bare / mine, target=">= 0.85", **more)
        mine, long = compare(ours, LongPrompt(simulator), args.device, rounds)
        report(
            f"{name}, long prompt",
            mine / units,
            long / units,
            long / mine,
            target=">= 3" if kind is TokenWise else "",
            **more,
        )
        if kind is AllAtOnce:
            mine, plain = compare(
                ours, Bare(simulator, rows, prefix=simulator.header, all_logits=True), args.device, rounds
            )
            report(f"{name}, plain way", mine / units, plain / units, plain / mine, target="", **more)


def rows_of(simulator: LocalSimulator, windows: Sequence[Window]) -> list[list[int]]:
    """What a simulator reads of some windows for one rule."""
    if isinstance(simulator, TokenWise):
        return [simulator.token(piece) for piece in sorted({p for w in windows for p in w.pieces})]
    assert isinstance(simulator, AllAtOnce)
    return [list(simulator.builder.window(w.pieces).ids) for w in windows]


class Bare:
    """The bare blocks over rows of tokens, for every rule, and for the neutral topic where a simulator reads
    one.
    """

    def __init__(
        self,
        simulator: LocalSimulator,
        rows: Sequence[list[int]],
        *,
        prefix: list[int],
        all_logits: bool = False,
    ) -> None:
        self.model = simulator.model.model
        rows = [[*prefix, *row] for row in rows]
        budget = max(simulator.batch_tokens, len(rows[0]))
        self.parts = [padded([rows[i] for i in batch], self.model.device) for batch in batches(rows, budget)]
        self.times = RULES + isinstance(simulator, TokenWise)
        self.head = self.model.get_output_embeddings().weight
        self.head = self.head if all_logits else self.head[:6]
        self.read = slice(-1, None) if isinstance(simulator, TokenWise) else slice(None)

    @torch.inference_mode()
    def __call__(self) -> None:
        for _ in range(self.times):
            for ids in self.parts:
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                torch.softmax((hidden[:, self.read] @ self.head.T).float(), -1).cpu()


class LongPrompt:
    """A long header, copied for every window, and many prompt tokens per token."""

    def __init__(self, simulator: LocalSimulator) -> None:
        self.model, self.batch = simulator.model.model, max(1, simulator.batch_tokens // round(4.7 * WINDOW))
        self.ids = torch.randint(3000, 30_000, (WINDOWS, round(4.7 * WINDOW)), device=self.model.device)
        self.head = self.model.get_output_embeddings().weight[:6]
        with torch.inference_mode():
            self.cache = DynamicCache()
            self.model.base_model(
                input_ids=torch.randint(3000, 30_000, (1, 1000), device=self.model.device),
                past_key_values=self.cache,
                use_cache=True,
            )

    @torch.inference_mode()
    def __call__(self) -> None:
        for _ in range(RULES):
            for part in self.ids.split(self.batch):
                copy = DynamicCache()
                for number, layer in enumerate(self.cache.layers):
                    copy.update(
                        layer.keys.repeat(len(part), 1, 1, 1), layer.values.repeat(len(part), 1, 1, 1), number
                    )
                hidden = self.model.base_model(
                    input_ids=part, past_key_values=copy, use_cache=True
                ).last_hidden_state
                torch.softmax((hidden @ self.head.T).float(), -1).cpu()


if __name__ == "__main__":
    main()
