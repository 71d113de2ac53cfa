"""Holistic activations against the plain way: every token left out, everything run again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_model, make_sae, tokenizer
from transformers import MistralConfig, MistralForCausalLM

from featureinterp.codes.collect import scored_tokens
from featureinterp.codes.store import CodesStore
from featureinterp.domain.record import FeatureRecord
from featureinterp.errors import IncompatibleError, InputError
from featureinterp.live import holistic as holistic_module
from featureinterp.live.holistic import HolisticActivations
from featureinterp.sae.load import LoadedSae, load_sae
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.subject import attribution
from featureinterp.subject.hooks import find_blocks, residual_after
from featureinterp.subject.load import Subject

HOOK = "blocks.1.hook_resid_post"


def subject_of(model: torch.nn.Module, bos: bool = True, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject(
        "tiny", model.base_model.to(dtype), tokenizer(bos), 3, 32, 2048, torch.device("cpu"), dtype
    )


def sae_of(architecture: str = "topk", dtype: torch.dtype = torch.float32) -> LoadedSae:
    return LoadedSae("tiny", make_sae(architecture, 32, 64).to("cpu", dtype), HOOK, "tiny", {}, "f")


@torch.no_grad()
def mean_activation(subject: Subject, sae: LoadedSae, feature: int, ids: list[int]) -> float:
    """By the dense codes of a window, one window at a time."""
    if not ids:
        return 0.0
    residual = subject.residual(torch.tensor([ids]), HOOK)
    scored = scored_tokens(residual, subject)[0]
    dense = sae.sae.encode(residual[0]).to_dense()[:, feature]
    return float((dense * scored).sum()) / len(ids)


def brute_force(subject: Subject, sae: LoadedSae, feature: int, ids: list[int]) -> list[float]:
    whole = mean_activation(subject, sae, feature, ids)
    return [whole - mean_activation(subject, sae, feature, ids[:t] + ids[t + 1 :]) for t in range(len(ids))]


def busiest(subject: Subject, sae: LoadedSae, ids: torch.Tensor) -> int:
    codes = sae.sae.encode(subject.residual(ids, HOOK).reshape(-1, 32))
    return int(torch.bincount(codes.features, minlength=64).argmax())


@pytest.fixture
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attribution, "PACKED_TOKENS", 20)
    monkeypatch.setattr(attribution, "BATCH_TOKENS", 40)
    monkeypatch.setattr(holistic_module, "ENCODED_ROWS", 30)
    yield


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_deleting_every_token(family: str, bos: bool):
    subject, sae = subject_of(make_model(family), bos), sae_of()
    ids = torch.randint(2, 400, (2, 11))
    feature = busiest(subject, sae, ids)
    method = HolisticActivations(subject, sae)
    assert method._deletions is not None and method._deletions.packs
    windows = [
        ids[0].numpy(),
        ids[1, :5].numpy(),
        ids[1].numpy(),
        ids[0, :1].numpy(),
        ids[0, :2].numpy(),
        ids[0, :0].numpy(),
    ]
    found = method.of(feature, windows)
    for window, values in zip(windows, found, strict=True):
        np.testing.assert_allclose(values, brute_force(subject, sae, feature, window.tolist()), atol=1e-4)
    assert np.abs(found[0]).max() > 0.01


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "relu", "gated"])
def test_every_architecture_and_long_windows_in_several_sequences(architecture: str, short_sequences: None):
    subject, sae = subject_of(make_model("llama")), sae_of(architecture)
    ids = torch.randint(2, 400, (1, 14))
    feature = busiest(subject, sae, ids)
    np.testing.assert_allclose(
        HolisticActivations(subject, sae).of(feature, [ids[0].numpy()])[0],
        brute_force(subject, sae, feature, ids[0].tolist()),
        atol=1e-4,
    )


def test_groups_hold_every_deletion_once(short_sequences: None):
    for n in (1, 2, 7, 30):
        groups = attribution._groups(n, 20)
        assert groups[0][0] == 0 and groups[-1][1] == n and all(a[1] == b[0] for a, b in pairwise(groups))


@pytest.mark.parametrize("packs", [True, False])
def test_a_sliding_window_shorter_than_the_text_takes_the_plain_way(packs: bool):
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = (
        MistralForCausalLM(MistralConfig(vocab_size=512, **sizes, sliding_window=100 if packs else 4))
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.15)
    subject, sae = subject_of(model), sae_of()
    ids = torch.randint(2, 400, (1, 9))
    feature = busiest(subject, sae, ids)
    method = HolisticActivations(subject, sae)
    assert method._deletions is not None and method._deletions._fits(9) is packs
    np.testing.assert_allclose(
        method.of(feature, [ids[0].numpy()])[0],
        brute_force(subject, sae, feature, ids[0].tolist()),
        atol=1e-4,
    )


def test_a_model_that_takes_no_such_mask_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch):
    subject, sae = subject_of(make_model("llama")), sae_of()
    real = attribution.Deletions._run

    def refuses(self: attribution.Deletions, **inputs: object) -> torch.Tensor:
        raise ValueError("no custom masks")

    monkeypatch.setattr(attribution.Deletions, "_run", refuses)
    method = HolisticActivations(subject, sae)
    assert method._deletions is not None and not method._deletions.packs
    monkeypatch.setattr(
        attribution.Deletions, "_run", lambda self, **inputs: real(self, **inputs | {"attention_mask": None})
    )
    assert not attribution.Deletions(subject, HOOK).packs
    ids = torch.randint(2, 400, (1, 8))
    feature = busiest(subject, sae, ids)
    np.testing.assert_allclose(
        method.of(feature, [ids[0].numpy()])[0],
        brute_force(subject, sae, feature, ids[0].tolist()),
        atol=1e-4,
    )


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_equals_the_derivative_along_the_embedding(family: str, bos: bool):
    subject, sae = subject_of(make_model(family), bos, torch.float64), sae_of("relu", torch.float64)
    ids = torch.randint(2, 400, (2, 7))
    feature = busiest(subject, sae, ids)
    found = np.stack(HolisticActivations(subject, sae, "gradient").of(feature, list(ids.numpy())))
    lead = int(bos)
    read = torch.cat([torch.zeros(2, lead, dtype=torch.long), ids], 1)
    embedded = subject.model.get_input_embeddings()(read)
    block = find_blocks(subject.model, 3)[1]

    def mean(window: int, token: int, factor: float) -> float:
        moved = embedded.clone()
        moved[window, lead + token] *= factor
        residual = residual_after(subject.model, block, {"inputs_embeds": moved, "use_cache": False})[
            window, lead:
        ]
        dense = sae.sae.encode(residual).to_dense()[:, feature]
        return float(dense[0 if bos else 1 :].sum()) / 7

    step = 1e-5 if family == "gpt2" else 2e-3  # the norms of the others compute in float32
    expected = [
        [(mean(w, t, 1 + step) - mean(w, t, 1 - step)) / (2 * step) for t in range(7)] for w in range(2)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5 if family == "gpt2" else 1e-3)
    assert np.abs(found).max() > 0.01


def test_a_feature_that_is_silent_has_no_causes():
    subject, sae = subject_of(make_model("llama")), sae_of()
    ids = torch.randint(2, 400, (1, 6))
    quiet = int(
        torch.bincount(sae.sae.encode(subject.residual(ids, HOOK)[0]).features, minlength=64).argmin()
    )
    assert not np.any(HolisticActivations(subject, sae, "gradient").of(quiet, [ids[0].numpy()])[0])


def test_records_get_causes_where_an_explainer_looks(store: CodesStore, subject: Subject, sae_folder: object):
    sae = load_sae(str(sae_folder))
    method = HolisticActivations.of_run(store, subject, sae)
    features = [i for i in range(64) if store.counts()[i] > 60][:2]
    plain = list(
        RecordBuilder(
            store, RecordPolicy({"top": (3, 2, 2), "weighted": (2, 0, 0), "random": (2, 2, 2)})
        ).build(features)
    )
    records: list[FeatureRecord] = list(method.add(iter(plain)))
    for before, after in zip(plain, records, strict=True):
        assert after.holistic == "exact" and before.holistic is None
        for split, by_source in after.splits.items():
            for source, windows in by_source.items():
                for window, old in zip(windows, before.splits[split][source], strict=True):
                    assert (window.holistic is not None) is (split == "train" and window.fires)
                    assert np.array_equal(window.activations, old.activations)
                    if window.holistic is not None:
                        expected = brute_force(subject, sae, after.feature.index, window.token_ids.tolist())
                        np.testing.assert_allclose(window.holistic, expected, atol=1e-4)


def test_what_is_refused(store: CodesStore, subject: Subject):
    with pytest.raises(InputError, match="exact, gradient"):
        HolisticActivations(subject, sae_of(), "magic")  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError, match="another SAE"):
        HolisticActivations.of_run(store, subject, sae_of())
