"""Parts shared by the tests: tiny real models, tokenizers and SAEs, built in memory. No test reaches a
network.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FEATUREINTERP_LEARNT"] = ""  # a played endpoint may have the address of an earlier one

import numpy as np
import pytest
import torch
from tiny import TINY_TEXTS, make_sae, make_subject_folder

from featureinterp.codes.collect import collect
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.sae.load import load_sae, save_sae
from featureinterp.subject.load import Subject, load_subject

HOOK = "blocks.1.hook_resid_post"
D_MODEL = 32


@pytest.fixture(scope="session")
def subject_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_subject_folder(tmp_path_factory.mktemp("subject"), "llama")


@pytest.fixture(scope="session")
def subject(subject_folder: Path) -> Subject:
    return load_subject(str(subject_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    save_sae(folder, make_sae("topk", D_MODEL, 64), hook=HOOK, model="tiny")
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(60):
        text = " ".join(TINY_TEXTS[j] for j in rng.integers(len(TINY_TEXTS), size=8))
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, subject: Subject, sae_folder: Path, corpus_file: Path
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    collect(subject, load_sae(str(sae_folder)), load_corpus(str(corpus_file)), folder, WindowPolicy(16, 8))
    return folder


@pytest.fixture(scope="session")
def store(run: Path) -> CodesStore:
    return CodesStore.open(run)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
