"""Batches that fit by trying, and copies that wait once: memory errors and queues are injected, since no GPU
is needed to be right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featureinterp.codes.collect import collect
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import DeviceMemoryError
from featureinterp.live.activator import TextActivator
from featureinterp.machine import accelerator
from featureinterp.machine.accelerator import Fit, fit_of, in_parts, to_device, to_host
from featureinterp.sae.codes import SparseCodes
from featureinterp.sae.load import load_sae
from featureinterp.subject import reading
from featureinterp.subject.load import Subject, load_subject

POLICY = WindowPolicy(16, 8)
CPU = torch.device("cpu")


@pytest.fixture
def limited(subject_folder: Path) -> tuple[Subject, list[int]]:
    """A subject of its own that holds 3 windows at once, and how many it was given each time."""
    subject, given = load_subject(str(subject_folder), dtype="float32"), list[int]()

    def check(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        given.append(len(kwargs["input_ids"]))
        if given[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    subject.model.register_forward_pre_hook(check, with_kwargs=True)
    return subject, given


def same_bytes(one: Path, other: Path) -> None:
    for name in ("positions", "values", "offsets"):
        assert (one / "codes" / f"{name}.bin").read_bytes() == (other / "codes" / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("ahead", [False, True])
def test_codes_are_the_same_whatever_fits(
    tmp_path: Path,
    limited: tuple[Subject, list[int]],
    subject: Subject,
    sae_folder: Path,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    ahead: bool,
):
    small, given = limited
    sae, corpus = load_sae(str(sae_folder)), load_corpus(str(corpus_file))
    collect(subject, sae, corpus, tmp_path / "whole", POLICY)
    if ahead:  # as on a GPU: the next batch is begun before this one is written, from pinned memory
        monkeypatch.setattr(reading, "queues", lambda _: True)
        monkeypatch.setattr(reading, "on_gpu", lambda _: True)
    found = collect(small, sae, corpus, tmp_path / "parts", POLICY)
    assert isinstance(found, CodesStore) and max(given) > 3 and any(1 < n <= 3 for n in given)
    refused = [n for n in given if n > 3]
    assert len(refused) <= 11 and given[: len(refused)] == refused, "what was learnt is kept"
    same_bytes(tmp_path / "whole", tmp_path / "parts")


def test_memory_that_is_short_later_is_met_too(
    tmp_path: Path,
    subject_folder: Path,
    subject: Subject,
    sae_folder: Path,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    own, sae, corpus = (
        load_subject(str(subject_folder), dtype="float32"),
        load_sae(str(sae_folder)),
        load_corpus(str(corpus_file)),
    )
    collect(subject, sae, corpus, tmp_path / "whole", POLICY)
    real, calls = sae.sae._encode, []

    def short(x: torch.Tensor) -> SparseCodes:
        calls.append(len(x))
        if len(x) > 40:
            raise RuntimeError("MPS backend out of memory")
        return real(x)

    monkeypatch.setattr(sae.sae, "_encode", short)
    collect(own, sae, corpus, tmp_path / "parts", POLICY)
    assert max(calls) > 40
    same_bytes(tmp_path / "whole", tmp_path / "parts")


def test_texts_are_read_in_parts_that_fit(
    limited: tuple[Subject, list[int]], subject: Subject, sae_folder: Path
):
    small, _ = limited
    sae, texts = (
        load_sae(str(sae_folder)),
        ["The army marched in March.", "a", "", "In 1849 the treaty of peace was signed.", "Trade"] * 3,
    )
    whole, parts = (TextActivator(model, sae).read([5, 0, 5], texts) for model in (subject, small))
    for one, other in zip(whole, parts, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.activations, b.activations, rtol=1e-4, atol=1e-5)


def test_parts_are_halved_in_order_and_bugs_are_raised():
    fit, tried = Fit("work"), list[int]()

    def work(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(part.start, part.stop))

    found = [rows for _, rows in in_parts(11, 5, 1000, fit, CPU, work)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]] and tried == [11, 6, 3, 3, 3, 2]
    assert fit.rows(5, 1000) == 3 and fit.rows(5, 10) == 2

    def bug(_: slice) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_parts(2, 5, 1000, Fit("work"), CPU, bug))


def test_one_row_that_does_not_fit_is_an_error():
    def work(_: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceMemoryError, match=r"reading: one row of 7 tokens .* cpu; end what else"):
        list(in_parts(4, 7, 1000, Fit("reading"), CPU, work))


def test_what_was_learnt_is_of_one_model_and_one_kind():
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert fit_of(one, "a") is fit_of(one, "a")
    assert fit_of(one, "a") is not fit_of(one, "b") and fit_of(one, "a") is not fit_of(other, "a")


def test_copies_wait_once_for_all(monkeypatch: pytest.MonkeyPatch):
    waits = []
    monkeypatch.setattr(accelerator, "queues", lambda _: True)
    monkeypatch.setattr(accelerator, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(accelerator, "_wait", waits.append)
    tensors = [torch.arange(6).reshape(2, 3).T, torch.tensor(True), torch.zeros(0, 3)]
    for tensor, array in zip(tensors, to_host(*tensors), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert waits == [CPU]
    assert torch.equal(to_device(tensors[0], CPU), tensors[0]) and len(waits) == 1


def test_columns_are_those_of_the_dense_codes():
    dense = torch.relu(torch.randn(7, 9, generator=torch.Generator().manual_seed(0)))
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.columns([8, 2, 8]), dense[:, [8, 2, 8]]) and codes.columns([]).shape == (7, 0)
    none = replace(codes, rows=codes.rows[:0], features=codes.features[:0], values=codes.values[:0])
    assert not none.columns([1]).any()
