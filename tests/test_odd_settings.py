"""Settings that would give other numbers than they say are one sentence."""

from __future__ import annotations

import bz2
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK
from test_cli import cli, refused
from tiny import TINY_TEXTS, make_sae

import featureinterp as fi
from featureinterp.api import training
from featureinterp.codes.collect import collect
from featureinterp.codes.runs import narrow_values
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import CorpusError, FeatureInterpError, InputError, StorageError
from featureinterp.probing.labels import load_labels
from featureinterp.probing.study import StudySettings
from featureinterp.sae.load import load_sae, save_sae
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.subject.load import Subject
from featureinterp.training.extract import ExtractSettings
from featureinterp.training.settings import make_recipe
from featureinterp.training.store import StoreWriter

SEEDED = (fi.Plan, fi.SensitivityPlan, RecordPolicy, StudySettings, ExtractSettings)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None])
@pytest.mark.parametrize("kind", SEEDED)
def test_a_seed_is_one_of_every_generator(kind: Any, seed: Any):
    with pytest.raises(InputError, match="the seed .* is not possible: give a whole number from 0"):
        kind(seed=seed)
    assert kind(seed=2**32 - 1).seed == 2**32 - 1


def test_the_verbs_say_that_a_seed_is_none(run: Path, tmp_path: Path, subject_folder: Path):
    with pytest.raises(InputError, match="seed"):
        make_recipe({"training": {"seed": -1}})
    for work in (
        lambda: training.layers(model=str(subject_folder), seed=-1),
        lambda: training.evaluate("demo", tmp_path, seed=-1),
        lambda: list(training.doctor(model=str(subject_folder), hook=HOOK, seed=-1)),
        lambda: fi.demo(out=tmp_path / "demo", seed=-1),
    ):
        with pytest.raises(InputError, match="the seed -1 is not possible"):
            work()
    for verb in (["records", str(run)], ["explain", str(run)], ["probe", str(run)]):
        refused(cli(*verb, "--seed", "-1"), "the seed -1 is not possible")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"n_test": -3}, "-3 test windows judge nothing"),
        ({"n_test": 0}, "0 test windows judge nothing"),
        ({"n_valid": -1}, "-1 validation windows"),
        ({"negatives": []}, "at least one kind of windows"),
        ({"negatives": ["random", "random"]}, "each once"),
        ({"negatives": ["top"]}, "at least one kind of windows"),
    ],
)
def test_a_plan_that_would_judge_by_other_windows(run: Path, plan: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        fi.explain(run, "1", explainer="top-tokens", simulator="lexical", plan=plan)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"half_width": -1}, "half_width = -1"),
        ({"n_quantiles": 0}, "n_quantiles = 0"),
        ({"counts": {"top": (1.5, 2, 2)}}, "three whole numbers"),
        ({"counts": {"top": (True, 2, 2)}}, "three whole numbers"),
    ],
)
def test_a_policy_that_would_cut_other_windows(policy: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        RecordPolicy(**policy)


def test_a_job_without_features_is_told_so(run: Path):
    with pytest.raises(InputError, match="names no features"):
        fi.explain(run, (), explainer="top-tokens", simulator="lexical")


@pytest.mark.parametrize(
    "change", [{"n_shifts": 0}, {"alpha": 2.0}, {"min_auroc": -0.1}, {"min_f1": float("nan")}]
)
def test_a_study_that_would_promise_nothing(change: dict[str, float]):
    with pytest.raises(InputError, match="not possible|no null"):
        StudySettings(**change)  # type: ignore[arg-type]


def test_values_that_half_precision_would_make_alike_are_refused(
    tmp_path: Path, subject: Subject, corpus_file: Path
):
    """Codes around 1e-8 would all be stored as the smallest number."""
    made = make_sae("relu", D_MODEL, 16)
    tensors = {
        name: tensor * (1e-9 if name in ("W_enc", "b_enc") else 1.0) for name, tensor in made.tensors.items()
    }
    save_sae(tmp_path / "sae", type(made)(tensors), hook=HOOK, model="tiny")
    sae, corpus = load_sae(str(tmp_path / "sae")), load_corpus(str(corpus_file))
    policy = WindowPolicy(16, 8, 500)
    with pytest.raises(StorageError, match="so small .* --value-dtype float32"):
        collect(subject, sae, corpus, tmp_path / "half", policy)
    store = collect(subject, sae, corpus, tmp_path / "whole", policy, value_dtype="float32")
    row = store.windows.ids(3)
    x = subject.residual(torch.from_numpy(row[None].astype(np.int64)), HOOK)[0].float()
    plain = np.maximum(
        (x - tensors["b_dec"]).numpy() @ tensors["W_enc"].numpy() + tensors["b_enc"].numpy(), 0
    )
    found = np.stack([store.window_activations(f, [3])[0, : len(row)] for f in range(16)], 1)
    np.testing.assert_allclose(found, plain, rtol=1e-3, atol=1e-12)
    few = np.full(10, 1e-7, np.float32)
    assert (narrow_values(few, np.dtype("float16")) > 0).all(), "a few small codes among others are kept"


def test_activations_that_half_precision_would_make_alike_are_refused(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * 1e-7
    sides = {name: np.zeros(8, np.int32) for name in ("documents", "windows", "offsets", "tokens")}
    with pytest.raises(FeatureInterpError, match="so small .* --store-dtype"):
        StoreWriter(tmp_path / "a", 4, "float16").append(rows, **sides)
    StoreWriter(tmp_path / "b", 4, "float32").append(rows, **sides)


def test_a_hook_before_a_block_is_the_one_after_the_block_before(tmp_path: Path):
    save_sae(tmp_path, make_sae("topk", D_MODEL, 16), hook="blocks.2.hook_resid_pre", model="tiny")
    assert load_sae(str(tmp_path)).hook == HOOK == "blocks.1.hook_resid_post"


def test_files_of_rows_that_are_nearly_right(tmp_path: Path):
    lines = "\n".join(json.dumps({"text": text}) for text in TINY_TEXTS)
    (tmp_path / "a.json").write_text("\n \n" + lines)
    assert [d.text for d in load_corpus(str(tmp_path / "a.json"))] == list(TINY_TEXTS)
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(CorpusError, match="2 columns named 'text'"):
        list(load_corpus(str(tmp_path / "b.csv")))
    (tmp_path / "c.jsonl.bz2").write_bytes(b"no bzip2 at all")
    with pytest.raises(CorpusError, match="is damaged, or is not compressed as its name says"):
        load_corpus(str(tmp_path / "c.jsonl.bz2"))
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    assert load_corpus(str(tmp_path / "d.jsonl.bz2")).n_documents == len(TINY_TEXTS)


def test_names_of_files_that_are_not_utf_8(tmp_path: Path, subject_folder: Path, sae_folder: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        text = " ".join(TINY_TEXTS[(i + j) % 8] for j in range(4))
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff%d.txt" % i)).write_text(text)
    run = tmp_path / "run"
    options = {"model": str(subject_folder), "sae": str(sae_folder), "dtype": "float32", "window": 16}
    store = fi.collect(out=run, corpus=str(folder), **options)
    assert store.windows.document_ids()[0] == "\\xff0.txt"
    found = fi.explain(
        run,
        [1, 2],
        explainer="top-tokens",
        simulator="lexical",
        stages=("explain", "simulate"),
        plan={"negatives": ["random"], "n_test": 2, "n_valid": 1},
    )
    assert len(found) == 2 and found[0].windows[0].document.startswith("\\xff")


def test_labels_may_hold_half_a_character_and_functions_no_spans(tmp_path: Path):
    file = tmp_path / "l.jsonl"
    file.write_text('{"document": "a", "start": 0, "end": 2, "label": "\\ud800"}')
    assert load_labels(file).names == ("\ufffd",)
    with pytest.raises(InputError, match="gives None instead of spans"):
        list(load_labels(lambda text: None).of("d", "abc"))  # type: ignore[arg-type,return-value]
