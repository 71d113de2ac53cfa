"""Folders that work is kept in: one process at a time, one request, and nothing deleted that nobody asked to
delete.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import HOOK
from test_cli import cli
from tiny import TINY_TEXTS

import featureinterp as fi
from featureinterp.claims import CODES, LOCK, OWNER, REQUEST, asked_in, check_free, claim, owned
from featureinterp.codes.collect import collect
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import DamagedStoreError, FolderInUseError, IncompatibleError
from featureinterp.files import content_key
from featureinterp.sae.load import load_sae
from featureinterp.subject.load import Subject
from featureinterp.training.extract import ExtractSettings, extract

POLICY = WindowPolicy(16, 8)
HOLD = """
import sys
from pathlib import Path
from featureinterp.claims import owned
with owned(Path(sys.argv[1]), "test"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, program: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdin is not None
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.stdin.close()
        child.wait()


def test_a_folder_has_one_owner_who_is_named_and_whose_death_frees_it(tmp_path: Path):
    with holder(tmp_path / "run") as child:
        for ask in (check_free, lambda folder: owned(folder, "second").__enter__()):
            with pytest.raises(
                FolderInUseError, match=rf"process {child.pid} on {os.uname().nodename} \(test\) .* since 20"
            ):
                ask(tmp_path / "run")
        child.send_signal(signal.SIGKILL)
        child.wait()
        check_free(tmp_path / "run")
        with owned(tmp_path / "run", "third"):
            assert json.loads((tmp_path / "run" / OWNER).read_text())["pid"] == os.getpid()
            with (
                pytest.raises(FolderInUseError, match=f"process {os.getpid()} "),
                owned(tmp_path / "run", "fourth"),
            ):
                pass
    check_free(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {LOCK}
    check_free(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_who_waits_gets_the_folder_when_it_is_free(tmp_path: Path):
    with holder(tmp_path) as child:
        told = []

        def waiting(line: str) -> None:
            told.append(line)
            child.send_signal(signal.SIGKILL)

        with owned(tmp_path, "second", waiting=waiting):
            assert len(told) == 1 and f"process {child.pid} " in told[0]


def test_a_claim_says_what_differs_and_deletes_its_own_parts_alone(tmp_path: Path):
    asked = {"corpus": "0" * 32, "window": {"length": 16, "min": 8}}
    claim(tmp_path, CODES, asked, about={"corpus": "a.txt"})
    claim(tmp_path, CODES, {**asked, "corpus": "1" * 32})  # nothing is there yet
    (tmp_path / "codes").mkdir()
    (tmp_path / "notes").write_text("mine")
    claim(tmp_path, CODES, {**asked, "corpus": "1" * 32}, about={"corpus": "moved.txt"})
    other = {"corpus": "2" * 32, "window": {"length": 32, "min": 8}}
    with pytest.raises(
        IncompatibleError, match=r"another corpus; window length 16 there, 32 asked for\).*--replace"
    ):
        claim(tmp_path, CODES, other)
    assert (tmp_path / "codes").is_dir()
    with owned(tmp_path / "codes", "at work"), pytest.raises(FolderInUseError):
        claim(tmp_path, CODES, other, replace=True)
    claim(tmp_path, CODES, other, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {REQUEST, "notes"}


@pytest.mark.parametrize("text", [None, '{"key": "0", "hook": "x"}'])
def test_what_does_not_say_what_it_is_of_is_not_taken_for_it(tmp_path: Path, text: str | None):
    (tmp_path / "codes").mkdir()
    if text is not None:
        (tmp_path / REQUEST).write_text(text)
    with pytest.raises(IncompatibleError, match="does not say of which request"):
        claim(tmp_path, CODES, {"hook": "x"})
    claim(tmp_path, CODES, {"hook": "x"}, earlier=lambda: {"hook": "x"})
    claim(tmp_path, CODES, {"hook": "x"})  # it is written down now


def test_every_byte_of_a_request_is_guarded_and_a_damaged_one_throws_nothing_away(tmp_path: Path):
    """Also those that were written without a checksum: their key is the hash of what was asked for."""
    path, asked = tmp_path / REQUEST, {"SAE": "x", "window": 16}
    (tmp_path / "codes").mkdir()
    claim(tmp_path, CODES, asked, earlier=lambda: asked)
    sealed = path.read_bytes()
    for at in range(len(sealed)):
        path.write_bytes(sealed[:at] + bytes([sealed[at] ^ (1 << at % 8)]) + sealed[at + 1 :])
        try:
            claim(tmp_path, CODES, asked)
        except DamagedStoreError as error:
            assert "start anew with --replace" in str(error)
    bare = {"key": content_key(asked), **asked, "about": {}}
    path.write_text(json.dumps(bare))
    claim(tmp_path, CODES, asked)
    assert json.loads(path.read_text()) == bare, "what an earlier version wrote is left as it is"
    for text in ("{", "[]", json.dumps({**bare, "window": 17}), json.dumps({**bare, "key": "0"})):
        path.write_text(text)
        with pytest.raises(DamagedStoreError, match=r"request\.json is damaged.*start anew with --replace"):
            claim(tmp_path, CODES, asked)
        assert path.read_text() == text and (tmp_path / "codes").is_dir()
    claim(tmp_path, CODES, asked, earlier=lambda: asked)  # the parts say it themselves
    assert path.read_bytes() == sealed
    path.write_text("{")
    claim(tmp_path, CODES, asked, replace=True)
    assert not (tmp_path / "codes").exists() and asked_in(tmp_path, CODES) == asked


def texts(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    rows = [
        [" ".join(TINY_TEXTS[i] for i in rng.integers(len(TINY_TEXTS), size=8)) for _ in range(2)]
        for _ in range(30)
    ]
    path.write_text("".join(json.dumps({"text": a, "other": b}) + "\n" for a, b in rows), encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_codes_are_of_one_request_and_what_is_finished_is_never_lost(
    tmp_path: Path, subject: Subject, sae_folder: Path
):
    file, run, sae = texts(tmp_path / "c.jsonl", 0), tmp_path / "run", load_sae(str(sae_folder))
    collect(subject, sae, load_corpus(str(file)), run, POLICY)
    (run / "records.jsonl").write_text("rows of these windows")
    moved = shutil.copyfile(file, tmp_path / "moved.jsonl")
    before = files_of(run)
    for corpus, policy, dtype, words in (
        (load_corpus(str(file), text_field="other"), POLICY, "float16", "another corpus"),
        (load_corpus(str(file)), WindowPolicy(8, 8), "float16", "window length 16 there, 8 asked for"),
        (load_corpus(str(file)), WindowPolicy(16, 8, 400), "float16", "max_tokens null there, 400 asked for"),
        (load_corpus(str(file)), POLICY, "float32", 'value dtype "float16" there, "float32" asked for'),
    ):
        with pytest.raises(IncompatibleError, match=words):
            collect(subject, sae, corpus, run, policy, value_dtype=dtype)
    texts(file, 1)
    with pytest.raises(IncompatibleError, match="another corpus"):
        collect(subject, sae, load_corpus(str(file)), run, POLICY)
    assert files_of(run) == before
    assert len(
        collect(subject, sae, load_corpus(str(moved)), run, POLICY).positions
    )  # the same text elsewhere
    old = CodesStore.open(run).windows.fingerprint
    found = collect(subject, sae, load_corpus(str(file)), run, POLICY, replace=True)
    assert found.windows.fingerprint != old and not (run / "records.jsonl").exists()


def test_an_extraction_is_of_one_request(tmp_path: Path, subject: Subject):
    file, out = texts(tmp_path / "c.jsonl", 0), tmp_path / "acts"
    extract(subject, HOOK, load_corpus(str(file)), out, POLICY)
    before = files_of(out)
    texts(file, 1)
    with pytest.raises(IncompatibleError, match="another corpus"):
        extract(subject, HOOK, load_corpus(str(file)), out, POLICY)
    with pytest.raises(IncompatibleError, match="settings held_out 0.1 there, 0.2 asked for"):
        extract(subject, HOOK, load_corpus(str(file)), out, POLICY, ExtractSettings(0.2))
    assert files_of(out) == before
    again = extract(subject, HOOK, load_corpus(str(file)), out, POLICY, replace=True)
    assert again.train is not None and files_of(out) != before


def test_every_verb_says_who_holds_the_folder_that_it_would_write(
    tmp_path: Path, run: Path, subject_folder: Path, sae_folder: Path, corpus_file: Path
):
    """Whichever verb the holder runs, it holds the folder by the same lock."""
    folder = shutil.copytree(run, tmp_path / "run")
    explained = (
        "explain",
        str(folder),
        "--features",
        "3",
        "--explainer",
        "top-tokens",
        "--simulator",
        "lexical",
        "--no-questions",
    )
    model, corpus = ("--model", str(subject_folder)), ("--corpus", str(corpus_file))
    assert cli(*explained, "--negatives", "random").returncode == 0
    acts, hook = tmp_path / "acts", ("--hook", HOOK, "--window", "16")
    verbs = {
        folder: (
            ("collect", *model, "--sae", str(sae_folder), *corpus, "--out", str(folder)),
            ("records", str(folder), "--features", "3"),
        ),
        folder / "explain": (
            (*explained, "--negatives", "random"),
            ("falsify", str(folder)),
            ("steer", str(folder)),
            ("report", str(folder / "explain")),
            ("export", str(folder), "--to", "csv"),
        ),
        folder / "probe": (("probe", str(folder), "--labels", "months", "--no-dense", *corpus),),
        acts: (
            ("extract", *model, *hook, *corpus, "--out", str(acts)),
            ("layers", *model, *corpus, "--out", str(acts)),
        ),
        tmp_path / "sens": (
            ("sensitivity", *model, "--sae-names", str(sae_folder), "--out", str(tmp_path / "sens")),
        ),
        tmp_path / "trained": (
            ("train", "--set", f"subject.model={subject_folder}", "--out", str(tmp_path / "trained")),
        ),
    }
    for held, commands in verbs.items():
        with holder(held) as child:
            before = files_of(held)
            for command in commands:
                done = cli(*command)
                assert done.returncode == 2 and f"process {child.pid} on " in done.stderr, (
                    command,
                    done.stderr,
                )
            assert files_of(held) == before
    assert cli(*explained, "--negatives", "random").returncode == 0


def test_a_verb_holds_its_folder_while_it_works(
    tmp_path: Path, subject: Subject, sae_folder: Path, corpus_file: Path
):
    run, seen = tmp_path / "run", []

    def progress(done: int, total: int) -> None:
        with pytest.raises(FolderInUseError, match="collect"):
            check_free(run)
        seen.append(done)

    collect(subject, load_sae(str(sae_folder)), load_corpus(str(corpus_file)), run, POLICY, progress=progress)

    def event(_: object) -> None:
        with pytest.raises(FolderInUseError, match="explain"):
            check_free(run / "explain")
        seen.append(-1)

    plan = fi.Plan(3, 2, negatives=("random",))
    fields = {
        "explainer": "top-tokens",
        "simulator": "lexical",
        "stages": ("explain", "simulate"),
        "plan": plan,
    }
    fi.explain(run, (3, 5), on_event=event, **fields)
    assert seen[0] > 0 and seen[-1] == -1
    check_free(run)
    check_free(run / "explain")


def test_a_job_is_of_its_run_s_codes(tmp_path: Path, subject: Subject, sae_folder: Path, corpus_file: Path):
    run, corpus = tmp_path / "run", load_corpus(str(corpus_file))
    collect(subject, load_sae(str(sae_folder)), corpus, run, POLICY)
    plan = fi.Plan(3, 2, negatives=("random",))
    fields = {
        "explainer": "top-tokens",
        "simulator": "lexical",
        "stages": ("explain", "simulate"),
        "plan": plan,
    }
    fi.explain(run, (3, 5), **fields)
    assert len(fi.explain(run, (3, 5, 9), **fields)) == 3, "other features of the same codes go on there"
    collect(subject, load_sae(str(sae_folder)), corpus, run, WindowPolicy(16, 8, 4000), replace=True)
    before = files_of(run / "explain")
    with pytest.raises(IncompatibleError, match=r"another codes.*explain --replace"):
        fi.explain(run, (3, 5), **fields)
    assert files_of(run / "explain") == before
    assert len(fi.explain(run, (3,), replace=True, **fields)) == 1
