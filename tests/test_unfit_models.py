"""Models and tokenizers that would be read wrongly: cut or padded texts, masked models, blocks of another
form, ids and contexts that do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY_TEXTS, make_model, make_sae, tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from featureinterp.codes.collect import scored_tokens
from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.subject.attribution import Deletions, embedding_effects
from featureinterp.subject.hooks import replaced
from featureinterp.subject.load import HubTokenizer, Subject, as_subject, check_causal, load_subject
from featureinterp.training.evaluate import loss_recovered

HOOK = "blocks.1.hook_resid_post"
TEXT = " ".join(TINY_TEXTS * 4)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("what", ["truncation", "fixed padding", "padding of a batch", "all"])
def test_a_tokenizer_files_own_cutting_and_padding_do_nothing(tmp_path: Path, what: str):
    plain = tokenizer()
    expected = [e.ids for e in HubTokenizer(plain).encode([TEXT, "a"])]
    assert len(expected[0]) > 300 and len(expected[1]) == 1
    odd = tokenizer()
    if what in ("truncation", "all"):
        odd.backend_tokenizer.enable_truncation(64)
    if what in ("fixed padding", "all"):
        odd.backend_tokenizer.enable_padding(length=500, pad_token="<|endoftext|>")
    if what == "padding of a batch":
        odd.backend_tokenizer.enable_padding(pad_token="<|endoftext|>")
    odd.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = HubTokenizer(AutoTokenizer.from_pretrained(tmp_path))
    for encoder in (HubTokenizer(odd), loaded):
        assert [e.ids for e in encoder.encode([TEXT, "a"])] == expected
        assert encoder.fingerprint == HubTokenizer(plain).fingerprint
    assert loaded.encode([TEXT])[0].offsets[-1][1] == len(TEXT)


def test_the_tokenizer_itself_stays_as_it_was():
    odd = tokenizer()
    odd.backend_tokenizer.enable_truncation(5)
    HubTokenizer(odd).encode(["<|endoftext|> one"])
    assert odd.backend_tokenizer.truncation["max_length"] == 5
    assert odd.backend_tokenizer.encode("<|endoftext|>").ids == [0]


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_masked_models_and_encoders_with_decoders_are_refused_by_what_they_say(tmp_path: Path):
    bert = saved(BertForMaskedLM(BertConfig(**SIZES)), tmp_path / "bert")
    with pytest.raises(UnknownNameError, match=r"masked language model \(BertForMaskedLM\)"):
        load_subject(bert, device="cpu", dtype="float32")
    t5 = T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(UnknownNameError, match="an encoder with a decoder"):
        load_subject(saved(T5ForConditionalGeneration(t5), tmp_path / "t5"), device="cpu", dtype="float32")


def test_a_model_that_sees_later_tokens_is_refused_whatever_it_says(tmp_path: Path):
    config = BertConfig(**SIZES, architectures=["BertLMHeadModel"])
    folder = Path(saved(BertForMaskedLM(config), tmp_path / "bert"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("BertForMaskedLM", "BertLMHeadModel"))
    with pytest.raises(IncompatibleError, match="its tokens see the ones after them"):
        load_subject(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass(family: str, dtype: torch.dtype):
    check_causal(as_subject(family, make_model(family).to(dtype), tokenizer()))


def test_the_usable_context_is_behind_the_padding_position(tmp_path: Path):
    config = RobertaConfig(**SIZES, max_position_embeddings=34, is_decoder=True, pad_token_id=1)
    subject = load_subject(
        saved(RobertaForCausalLM(config), tmp_path / "roberta"), device="cpu", dtype="float32"
    )
    assert subject.context_length == 32
    ids = torch.randint(5, 400, (1, 31))
    assert subject.residual(ids, HOOK).shape == (1, 31, 32)
    with pytest.raises(IncompatibleError, match=r"32 tokens|\(32\)"):
        subject.residual(torch.randint(5, 400, (1, 32)), HOOK)


def tiny_subject(bos: bool = True) -> tuple[Subject, torch.nn.Module]:
    model = make_model("llama")
    return as_subject("tiny", model, tokenizer(bos)), model


def test_ids_that_the_embedding_lacks_are_refused_everywhere():
    subject, _ = tiny_subject()
    ids = torch.tensor([[3, 4, 512]])
    for read in (
        lambda: subject.residual(ids, HOOK),
        lambda: Deletions(subject, HOOK).residuals(ids),
        lambda: embedding_effects(subject, HOOK, ids, lambda r: r.sum((1, 2))),
    ):
        with pytest.raises(IncompatibleError, match="gives the token 512, and its embedding has 512 rows"):
            read()


class Stacked(torch.nn.Module):
    """A block whose output has a further dimension in front, as models with several streams have."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **options: object) -> torch.Tensor:
        found = self.block(*args, **options)
        return torch.stack([found[0] if isinstance(found, tuple) else found] * 2)


def test_blocks_that_put_out_another_form_are_refused():
    subject, model = tiny_subject()
    model.model.layers[1] = Stacked(model.model.layers[1])
    with pytest.raises(IncompatibleError, match=r"Stacked\) put out shape \[2, 1, 4, 32\]"):
        subject.residual(torch.tensor([[3, 4, 5]]), HOOK)
    with pytest.raises(IncompatibleError, match="Stacked"), replaced(model, HOOK, lambda r: r):
        model(torch.tensor([[3, 4, 5]]))


@dataclass
class Given:
    ids: list[int]
    offsets: list[tuple[int, int]]


class GivenIds:
    """An encoder whose ids are given."""

    fingerprint = "given"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def encode(self, texts: list[str]) -> list[Given]:
        return [Given(self.ids, [(i, i + 1) for i in range(len(self.ids))]) for _ in texts]


def table(folder: Path, ids: list[int]) -> WindowTable:
    corpus = Corpus("given", lambda: iter([Document("0", "x" * len(ids))]), 1)
    return build_windows(corpus, GivenIds(ids), WindowPolicy(len(ids), 1), folder)


@pytest.mark.parametrize("bos", [True, False])
def test_evaluation_scores_the_tokens_that_collecting_scores(tmp_path: Path, bos: bool):
    subject, model = tiny_subject(bos)
    big, small = 100, 50
    with torch.no_grad():
        model.model.embed_tokens.weight[big] *= 1000
    windows = table(tmp_path / "w", [big, small, big, small, big])
    ids = torch.from_numpy(np.array(windows.tokens, np.int64))
    scored = scored_tokens(subject.residual(ids, HOOK), subject)[0].tolist()
    assert scored == (
        [True] * 5 if bos else [False, True, True, True, True]
    )  # three of five are large: so is the median
    found = loss_recovered(model, tokenizer(bos), HOOK, make_sae("topk", 32, 48), windows, np.arange(1))
    assert found.n_tokens == sum(scored[:-1])
    with torch.no_grad():
        read = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids], 1) if bos else ids
        logits = model(read).logits[0, int(bos) : -1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert found.clean == pytest.approx(float(losses[torch.tensor(scored[:-1])].mean()), rel=1e-5)
