"""What needs batches of its own, on a device whose memory is short: the error is injected, and the numbers
stay the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_holistic import busiest, sae_of, subject_of
from test_local_model import ask, ask_all, parts, questions
from test_simulate import RULES, WINDOWS
from tiny import make_model

from featureinterp.errors import DeviceMemoryError
from featureinterp.live.holistic import HolisticActivations
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.local.chat import LocalModel
from featureinterp.local.simulator import LocalSimulator
from featureinterp.local.token_wise import TokenWise
from featureinterp.sae.codes import SparseCodes

FULL = torch.OutOfMemoryError("CUDA out of memory")


def limit(module: torch.nn.Module, *, rows: int = 10**9, tokens: int = 10**9) -> list[int]:
    """Lets a model fail on larger inputs; gives the rows of each that was tried."""
    tried: list[int] = []

    def check(_: object, args: object, kwargs: dict[str, Any]) -> None:
        given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        tried.append(len(given))
        if given.shape[0] > rows or given.shape[0] * given.shape[1] > tokens:
            raise FULL

    module.register_forward_pre_hook(check, with_kwargs=True)
    return tried


@pytest.mark.parametrize("kind", [TokenWise, AllAtOnce])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_simulations_are_the_same_whatever_fits(kind: type[LocalSimulator], family: str):
    def made(model: Any) -> LocalSimulator:
        return kind(lambda: (model, parts()[1]), name="tiny", dtype="float32")

    whole = made(make_model(family)).predict(RULES, WINDOWS)
    small = make_model(family)
    tried = limit(small.base_model, rows=len(RULES.rules))
    found = made(small).predict(RULES, WINDOWS)
    assert max(tried) > len(RULES.rules)
    for one, other in zip(whole, found, strict=True):
        np.testing.assert_allclose(one.expected, other.expected, atol=1e-5)
    again = len(tried)
    made(small).predict(RULES, WINDOWS)
    assert max(tried[again:]) <= len(RULES.rules), "what fitted is known"


def test_short_answers_are_the_same_whatever_fits():
    loaded = parts()
    asked = questions(9, answers=("none of its words",))
    whole = ask_all(LocalModel(lambda: loaded, name="tiny"), asked)
    small = parts()
    tried = limit(small[0].base_model, rows=2)
    found = ask_all(LocalModel(lambda: small, name="tiny"), asked)
    assert max(tried) > 2 and [r.texts for r in found] == [r.texts for r in whole]
    for one, other in zip(whole, found, strict=True):
        assert one.first_token[0] == pytest.approx(other.first_token[0], abs=1e-4)


def test_a_reply_that_does_not_fit_is_one_sentence():
    small = parts()
    limit(small[0].base_model, tokens=20)
    model = LocalModel(lambda: small, name="tiny")
    for request in questions(2)[1:] + questions(2, answers=("yes",))[1:]:
        with pytest.raises(DeviceMemoryError, match="one row of .* does not fit"):
            ask(model, request)


@pytest.mark.parametrize("packs", [True, False])
def test_exact_causes_are_the_same_whatever_fits(packs: bool):
    ids, sae = torch.randint(2, 400, (2, 11)), sae_of()
    subject, small = subject_of(make_model("llama")), subject_of(make_model("llama"))
    feature = busiest(subject, sae, ids)
    whole = HolisticActivations(subject, sae).of(feature, list(ids.numpy()))
    tried = limit(small.model, rows=10**9 if packs else 4, tokens=40)
    method = HolisticActivations(small, sae)
    assert method._deletions is not None and method._deletions.packs
    method._deletions.packs = packs
    for _ in range(2):
        found = method.of(feature, list(ids.numpy()))
        np.testing.assert_allclose(found, whole, atol=1e-4)
    assert np.abs(found[0]).max() > 0.01 and (packs or max(tried) > 4)


def test_a_single_deletion_that_does_not_fit_is_one_sentence():
    small, sae = subject_of(make_model("llama")), sae_of()
    method = HolisticActivations(small, sae)
    limit(small.model, tokens=8)
    with pytest.raises(DeviceMemoryError, match="leaving out tokens: one row"):
        method.of(0, [np.arange(2, 13)])


def test_gradients_and_codes_are_the_same_whatever_fits(monkeypatch: pytest.MonkeyPatch):
    ids, sae = torch.randint(2, 400, (7, 9)), sae_of()
    subject, small = subject_of(make_model("llama")), subject_of(make_model("llama"))
    feature = busiest(subject, sae, ids)
    whole = {
        m: HolisticActivations(subject, sae, m).of(feature, list(ids.numpy())) for m in ("exact", "gradient")
    }  # type: ignore[arg-type]
    tried = limit(small.model, rows=2)
    found = HolisticActivations(small, sae, "gradient").of(feature, list(ids.numpy()))
    np.testing.assert_allclose(found, whole["gradient"], atol=1e-5)
    assert max(tried) == 7
    real, sizes = sae.sae._encode, list[int]()

    def short(x: torch.Tensor) -> SparseCodes:
        sizes.append(len(x))
        if len(x) > 20:
            raise FULL
        return real(x)

    monkeypatch.setattr(sae.sae, "_encode", short)
    np.testing.assert_allclose(
        HolisticActivations(subject, sae).of(feature, list(ids.numpy())), whole["exact"], atol=1e-5
    )
    assert max(sizes) > 20
