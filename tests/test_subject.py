"""Subjects of every family: the residual stream is the right one, the run stops there, and nothing stays
behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model, make_subject_folder, tokenizer

from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.subject.hooks import block_of, find_blocks, residual_after
from featureinterp.subject.load import (
    PrependToken,
    SkipFirst,
    Subject,
    load_causal_lm,
    load_subject,
    weights_fingerprint,
)


def subject_of(family: str, bos: bool = True) -> tuple[Subject, torch.nn.Module]:
    model = make_model(family)
    made = Subject("tiny", model.base_model, tokenizer(bos), 3, 32, 2048, torch.device("cpu"), torch.float32)
    return made, model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [0, 1])
def test_residual_equals_the_models_own_hidden_states(family: str, block: int):
    subject, model = subject_of(family)
    ids = torch.randint(2, 400, (3, 9))
    with torch.no_grad():
        everything = model(
            torch.cat([torch.zeros(3, 1, dtype=torch.long), ids], 1), output_hidden_states=True
        ).hidden_states
    found = subject.residual(ids, f"blocks.{block}.hook_resid_post")
    torch.testing.assert_close(found, everything[block + 1][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_later_block_runs_and_no_hook_stays(family: str):
    subject, _ = subject_of(family)
    blocks = find_blocks(subject.model, 3)
    ran = []
    handles = [b.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    subject.residual(torch.randint(2, 400, (1, 5)), "blocks.1.hook_resid_post")
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_the_hook_goes_even_when_the_forward_pass_fails():
    subject, _ = subject_of("llama")
    block = find_blocks(subject.model, 3)[2]
    with pytest.raises(TypeError):
        residual_after(subject.model, block, {"no_such_argument": 1, "input_ids": "wrong"})
    assert not block._forward_hooks


def test_without_bos_position_0_is_the_windows_own():
    subject, model = subject_of("gpt2", bos=False)
    assert isinstance(subject.sink, SkipFirst)
    ids = torch.randint(2, 400, (2, 6))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(
        subject.residual(ids, "blocks.1.hook_resid_post"), expected, rtol=1e-5, atol=1e-5
    )
    assert isinstance(subject_of("gpt2")[0].sink, PrependToken)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.hook_resid_post",
        "blocks.-1.hook_resid_post",
        "blocks.1.hook_resid_pre",
        "layers.1",
        "blocks.1.hook_resid_post ",
    ],
)
def test_hooks_that_do_not_exist(name: str):
    with pytest.raises(UnknownNameError, match=r"blocks\.0\.hook_resid_post to blocks\.2\.hook_resid_post"):
        block_of(name, 3)


def test_loading_from_a_folder_and_what_is_refused(subject_folder: Path, tmp_path: Path):
    loaded = load_subject(str(subject_folder), dtype="float32")
    assert (loaded.n_blocks, loaded.d_model, loaded.dtype) == (3, 32, torch.float32)
    for wrong in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UnknownNameError) as caught:
            load_subject(str(wrong))
        assert "\n" not in str(caught.value)
    with pytest.raises(UnknownNameError, match="dtype"):
        load_subject(str(subject_folder), dtype="int4")
    with pytest.raises(UnknownNameError, match="device"):
        load_subject(str(subject_folder), device="nowhere")
    with pytest.raises(UnknownNameError, match="cannot be loaded"):
        load_subject("no-such-model-anywhere")


def test_a_checkpoint_that_lacks_weights_or_is_damaged_is_refused(subject_folder: Path, tmp_path: Path):
    folder = tmp_path / "m"
    shutil.copytree(subject_folder, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)

    def written(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file, metadata={"format": "pt"})
        return str(folder)

    name = next(key for key in weights if "layers.1" in key and weights[key].ndim == 2)
    with pytest.raises(IncompatibleError, match=rf"1 weights of .* such as {name}, and would be random"):
        load_subject(written({k: v for k, v in weights.items() if k != name}))
    without_head = written({k: v for k, v in weights.items() if k != "lm_head.weight"})
    ids = torch.tensor([[5, 6, 7]])
    assert (
        "lm_head.weight" in weights
        and load_subject(without_head, dtype="float32")
        .residual(ids, "blocks.1.hook_resid_post")
        .isfinite()
        .all()
    )
    with pytest.raises(IncompatibleError, match=r"such as lm_head.weight"):
        load_causal_lm(without_head)
    for damage in (
        lambda: written({**weights, name: weights[name][:3].clone()}),
        lambda: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    ):
        damage()
        with pytest.raises(IncompatibleError, match="is damaged or does not fit its configuration") as caught:
            load_subject(str(folder))
        assert "\n" not in str(caught.value)


def test_windows_longer_than_the_context_are_refused():
    subject, _ = subject_of("llama")
    with pytest.raises(IncompatibleError, match="2048"):
        subject.residual(torch.zeros(1, 2048, dtype=torch.long), "blocks.0.hook_resid_post")


def test_fingerprints_tell_models_apart(tmp_path: Path):
    a, b = make_model("llama"), make_model("llama")
    assert weights_fingerprint(a) == weights_fingerprint(b)
    with torch.no_grad():
        b.model.norm.weight[0] += 1
    assert weights_fingerprint(a) != weights_fingerprint(b)
    again = load_subject(str(make_subject_folder(tmp_path / "m", "llama")), dtype="float32")
    assert again.fingerprint == load_subject(str(tmp_path / "m"), dtype="float32").fingerprint
