"""Verbs as processes of their own on one folder: one works, the other says who holds it or reads there, and
who was killed blocks nobody.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import D_MODEL, HOOK
from endpoint import endpoint
from test_claims import POLICY, files_of
from test_cli import cli
from test_training_runs import recipe
from tiny import make_sae
from verbs import Verbs, verbs_at_hand

from featureinterp.claims import OWNER
from featureinterp.corpus.text import load_corpus
from featureinterp.files import parse_json
from featureinterp.sae.load import save_sae
from featureinterp.subject.load import Subject
from featureinterp.training.extract import extract
from featureinterp.training.settings import recipe_toml

SAYS_IT = r"process {pid} on {host} \({verb}\) {does} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"


@dataclass
class Places:
    """Where the parts of the verbs are. ``run``: codes with a job in the same folder."""

    run: Path
    activations: Path
    sae: Path
    recipe: Path
    model: Path
    corpus: Path
    url: str

    def args(self, verb: str, x: Path, out: Path | None = None) -> tuple[str, ...]:
        """A verb that writes into the run ``x``, or what it reads there into ``out``."""
        model, corpus = ("--model", str(self.model)), ("--corpus", str(self.corpus))
        there = str(out or x)
        llm = ("--base-url", self.url, "--llm-model", "m")
        small = ("--config", str(self.recipe))
        job = ("--features", "3,5", "--explainer", "top-tokens", "--simulator", "lexical", "--no-questions")
        found = {
            "collect": ("--window", "16", "--dtype", "float32", "--sae", str(self.sae), *model, *corpus),
            "records": (str(x), "--features", "3,5", *(("--out", f"{out}/r.jsonl") if out else ())),
            "explain": (str(x), *job, "--negatives", "random", "--out", there, *llm),
            "falsify": (str(x), *llm, "--texts", "2"),
            "steer": (str(x), *llm),
            "report": (str(x),),
            "export": (str(x), "--to", "csv"),
            "extract": (*small, "--out", there),
            "train": (*small, "--out", there),
            "probe": (str(x), "--labels", "months", "--no-dense", *corpus, "--out", there),
            "layers": (*model, *corpus, "--window", "16", "--blocks", "1", "--dtype", "float32"),
            "sensitivity": (*model, "--sae-names", str(self.sae), "--features", "2", *llm),
            "evaluate": (str(self.sae), "--activations", str(self.activations), "--ce-windows", "0"),
        }[verb]
        if verb == "sensitivity":
            found = (
                *found,
                "--dataset-name",
                str(self.corpus),
                "--total-tokens",
                "3000",
                "--context-size",
                "16",
            )
        if verb in ("collect", "layers", "sensitivity", "evaluate"):
            found = (*found, "--out", there)
        return (verb, *found)


@pytest.fixture(scope="module")
def verbs() -> Iterator[Verbs]:
    with verbs_at_hand() as found:
        yield found


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, subject: Subject, subject_folder: Path, corpus_file: Path
) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("places")
    save_sae(folder / "sae", make_sae("topk", D_MODEL, 64), hook=HOOK, model=str(subject_folder))
    extract(subject, HOOK, load_corpus(str(corpus_file)), folder / "acts", POLICY)
    (folder / "recipe.toml").write_text(
        recipe_toml(recipe(subject_folder, corpus_file, **{"evaluation.ce_windows": 0}))
    )
    with endpoint() as server:
        found = Places(
            folder / "run",
            folder / "acts",
            folder / "sae",
            folder / "recipe.toml",
            subject_folder,
            corpus_file,
            server.url,
        )
        for verb in ("collect", "explain"):
            done = cli(*found.args(verb, found.run))
            assert done.returncode == 0, done.stderr
        yield found


WRITERS = (
    *("collect", "records", "explain", "falsify", "steer", "report", "export"),
    *("extract", "train", "probe", "layers", "sensitivity", "evaluate"),
)
HOLDS_AS = {"falsify": "explain", "steer": "explain"}
"""A job's stages are of the job."""
APART = {"sensitivity"}
"""Its journal would be the job's that is in the folder."""
FEW = ("collect", "explain", "train")


def owner_of(folder: Path, deadline_s: float = 60) -> dict[str, object]:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if (folder / OWNER).exists():
            return dict(parse_json((folder / OWNER).read_text()))
    raise AssertionError(f"nobody owned {folder} in {deadline_s} s")


def check_pairs(verbs: Verbs, places: Places, folder: Path, first: str, others: tuple[str, ...]) -> None:
    """``first`` holds a run; all others are refused; it is killed, and begins again."""
    run = Path(shutil.copytree(places.run, folder / "run"))
    here = verbs.run(*places.args("explain", run))
    assert here.code == 0, here.stderr  # the job is of this folder now
    held = verbs.start(*places.args(first, run), stop="owner", at=run).wait()
    assert held.code is None, held.stderr
    owner = owner_of(run)
    assert (owner["pid"], owner["verb"]) == (held.pid, HOLDS_AS.get(first, first))
    expected = SAYS_IT.format(
        pid=held.pid, host=os.uname().nodename, verb=HOLDS_AS.get(first, first), does="holds it"
    )
    before = files_of(run)
    for second in others:
        refused = verbs.run(*places.args(second, run))
        assert refused.code == 2 and re.search(expected, refused.stderr), (first, second, refused.stderr)
        assert "Traceback" not in refused.stderr and files_of(run) == before, (first, second)
    held.kill()
    again = verbs.run(*places.args(first, run))
    if first in APART:
        assert again.code == 2 and "would write over its journal" in again.stderr
    else:
        assert again.code == 0, (first, again.stderr)


@pytest.mark.parametrize("first", ["collect"])
def test_a_second_process_says_who_holds_the_folder_and_death_frees_it(
    verbs: Verbs, places: Places, tmp_path: Path, first: str
):
    check_pairs(verbs, places, tmp_path, first, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("first", WRITERS)
def test_every_pair_of_writing_verbs(verbs: Verbs, places: Places, tmp_path: Path, first: str):
    check_pairs(verbs, places, tmp_path, first, WRITERS)


def replace_codes(places: Places, run: Path) -> tuple[str, ...]:
    args = places.args("collect", run)
    return (*(a if a != "16" else "8" for a in args), "--replace")


def replace_extraction(places: Places, folder: Path) -> tuple[str, ...]:
    return (*places.args("extract", folder), "--set", "corpus.window=8", "--replace")


READERS: dict[str, Callable[[Places, Path, Path], tuple[str, ...]]] = {
    **{
        verb: lambda places, run, out, verb=verb: places.args(verb, run, out)  # type: ignore[misc]
        for verb in ("explain", "records", "probe")
    },
    "train": lambda places, acts, out: (*places.args("train", out), "--activations", str(acts)),
    "evaluate": lambda places, acts, out: tuple(
        str(acts) if a == str(places.activations) else a for a in places.args("evaluate", out)
    ),
    "doctor": lambda places, acts, out: ("doctor", str(acts), "--no-model"),
}


def check_reader(verbs: Verbs, places: Places, folder: Path, reader: str) -> None:
    """Nobody replaces what is read; the reader goes on and ends well; one that was killed blocks nobody."""
    of_run = reader in ("explain", "records", "probe")
    dead = shutil.ignore_patterns(".reader-*")  # of verbs that were killed
    x = Path(shutil.copytree(places.run if of_run else places.activations, folder / "x", ignore=dead))
    replace = (replace_codes if of_run else replace_extraction)(places, x)
    name = "codes" if of_run else "extraction"
    for number, end in enumerate(("goes on", "is killed")):
        out = folder / f"out{number}"
        out.mkdir()
        reads = verbs.start(*READERS[reader](places, x, out), stop="reader", at=x).wait()
        assert reads.code is None, reads.stderr
        before = files_of(x)
        refused = verbs.run(*replace)
        said = SAYS_IT.format(pid=reads.pid, host=os.uname().nodename, verb=reader, does=f"reads its {name}")
        assert refused.code == 2 and re.search(said, refused.stderr), refused.stderr
        assert files_of(x) == before
        if end == "goes on":
            assert reads.go_on().code == 0, reads.stderr
            assert not list(x.glob(".reader-*"))
        else:
            reads.kill()
    done = verbs.run(*replace)
    assert done.code == 0, done.stderr
    assert not list(x.glob(".reader-*")) and files_of(x) != before


def test_codes_that_explain_reads_are_not_replaced(verbs: Verbs, places: Places, tmp_path: Path):
    check_reader(verbs, places, tmp_path, "explain")


@pytest.mark.slow
@pytest.mark.parametrize("reader", [r for r in READERS if r != "explain"])
def test_what_any_verb_reads_is_not_replaced(verbs: Verbs, places: Places, tmp_path: Path, reader: str):
    check_reader(verbs, places, tmp_path, reader)
