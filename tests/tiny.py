"""Tiny real models of the families that the project supports, with a real byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.load import ARCHITECTURES

TINY_TEXTS = (
    "The army marched in March and the fleet sailed in May.",
    "Congress shall not levy a tax on the states, nor on commerce.",
    "In 1849 the treaty of peace was signed at the capital.",
    "A café in Zürich sold 25% more in the year 2001 😀.",
    "She said: “we are not afraid”, and closed the door.",
    "Trade with the islands grew; the harbour was deepened.",
    "naïve people — of every nation — hoped for better schools.",
    "日本の港は開かれた。 The ports were opened.",
)
NASTY = (
    "tab\there and\nnew lines\r\n\n",
    "<<marked>> {{ braces }} {% block %} </script><script>alert(1)</script> <|endoftext|> <|im_start|>",
    "emoji 👩‍👩‍👧‍👦 flags 🇨🇭 and combining e\u0301\u0323 marks",
    "right to left: \u202eabc\u202c שלום عربي",
    "nul \x00 and controls \x07\x1b[31m",
    "quotes \" ' ` back\\slash \\n \\t",
    "x" * 300,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \ufeff zero\u200bwidth \u2028 line",
)


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the tiny texts: it encodes any text, splitting rare characters
    into bytes.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>"],
    )
    raw.train_from_iterator(TINY_TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>" if bos else None, eos_token="<|endoftext|>"
    )


_SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _neox() -> GPTNeoXConfig:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
    }
    return GPTNeoXConfig(vocab_size=512, bos_token_id=0, eos_token_id=0, **sizes)


FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_embd=32, n_layer=3, n_head=4, n_positions=2048, bos_token_id=0, eos_token_id=0
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(_neox()),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=4096)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=8)),
}


def make_model(family: str, scale: float = 0.15) -> torch.nn.Module:
    """A random model of a family whose logits differ visibly between tokens."""
    torch.manual_seed(1)
    model = FAMILIES[family]()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=scale)
    return model.eval().requires_grad_(False)


def make_subject_folder(
    folder: Path, family: str, bos: bool = True, *, dtype: torch.dtype = torch.float32, scale: float = 0.15
) -> Path:
    """A model and its tokenizer as a Hugging Face folder; its weights are stored in ``dtype``."""
    make_model(family, scale).to(dtype).save_pretrained(folder)
    tokenizer(bos).save_pretrained(folder)
    return folder


def make_sae(architecture: str, d_in: int, d_sae: int) -> SparseAutoencoder:
    """A random SAE of an architecture."""
    generator = torch.Generator().manual_seed(0)
    kind = ARCHITECTURES[architecture]
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in kind.shapes(d_in, d_sae).items()
    }
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return kind(tensors, **dict.fromkeys(kind.settings, 4))
