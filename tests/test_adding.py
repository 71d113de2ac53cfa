"""Parts of another package: docs/adding.md does what it says, from command line and Python, and packages that
are wrong or missing are one sentence."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint import endpoint
from service import configured
from test_cli import cli, embed, refused
from tiny import make_sae

import featureinterp as fi
from featureinterp.errors import InputError, UnknownNameError
from featureinterp.registry import FORMATS, LAYOUTS, REGISTRIES, SIMULATORS, Registry
from featureinterp.sampling.similar import SentenceEmbedder

DOC = Path(__file__).parents[1] / "docs" / "adding.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
FILES = {text.split("\n")[0][2:]: text for _, text in BLOCKS if text.startswith("# ")}
STEPS = [(kind, text) for kind, text in BLOCKS if not text.startswith("# ")]


def install(place: Path, name: str, points: dict[str, dict[str, str]], **files: str) -> None:
    """What pip leaves of a package of single modules: its files, and what is known of it."""
    place.mkdir(exist_ok=True)
    for module, text in files.items():
        (place / module).write_text(text, encoding="utf-8")
    about = place / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for group, own in points.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that this process sees, too."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        if str(place) in (getattr(sys.modules[name], "__file__", "") or ""):
            del sys.modules[name]


@pytest.fixture
def my_parts(site: Path) -> Path:
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    install(site, project["name"], project["entry-points"], **{n: FILES[n] for n in FILES if n != "job.toml"})
    return site


def test_each_part_of_the_docs_is_one_short_file():
    assert sorted(FILES) == [
        *("job.toml", "my_format.py", "my_layout.py", "my_simulator.py", "my_stage.py", "pyproject.toml")
    ]
    assert max(len(text.splitlines()) for text in FILES.values()) <= 40
    assert [kind for kind, _ in STEPS] == ["sh", "python"] * 4


def test_the_docs_do_what_they_say(
    my_parts: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SentenceEmbedder, "embed", embed)
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(run, work / "RUN")
    (work / "job.toml").write_text(FILES["job.toml"], encoding="utf-8")
    (work / "my-sae").mkdir()
    made = make_sae("relu", 32, 64)
    decoder = made.tensors["W_dec"] / made.tensors["W_dec"].norm(dim=1, keepdim=True)
    tensors = {**made.tensors, "W_dec": decoder}
    np.savez(work / "my-sae" / "dictionary.npz", **{n: t.numpy() for n, t in tensors.items()})
    (work / "my-sae" / "site.json").write_text('{"layer": 1, "model": "tiny"}')
    monkeypatch.chdir(work)
    known: dict[str, Any] = {}
    with endpoint() as server:
        config = configured(tmp_path / "config.toml", server.url)
        config.write_text(config.read_text().replace("endpoints.played", "endpoints.mine"))
        monkeypatch.setenv("FEATUREINTERP_CONFIG", str(config))
        monkeypatch.setenv("TEST_KEY", "k")
        for kind, text in STEPS:
            if kind == "python":
                exec(text, known)
                continue
            done = cli(*shlex.split(text.removeprefix("featureinterp ")))
            assert done.returncode == 0, done.stderr
        assert len(server.ledger) == 1 + 3, "the check, and a question for each feature"
    lines = (work / "by-stems" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    page = (work / "doubted" / "report.html").read_text(encoding="utf-8")
    assert "<td>doubt</td>" in page and "Could this describe nearly any text?" in page
    table = (work / "table.md").read_text(encoding="utf-8").splitlines()
    assert table == (work / "by-stems" / "features.markdown").read_text(encoding="utf-8").splitlines()
    assert table[0] == "| feature | explanation | correlation |" and len(table) == 5
    x = np.linspace(-1, 1, 2 * 32, dtype=np.float32).reshape(2, 32)
    plain = {n: t.numpy() for n, t in tensors.items()}
    expected = np.maximum((x - plain["b_dec"]) @ plain["W_enc"] + plain["b_enc"], 0)
    import torch

    codes = known["sae"].sae.encode(torch.from_numpy(x)).columns(range(64)).numpy()
    np.testing.assert_allclose(codes, expected, rtol=1e-5, atol=1e-6)


def test_a_new_process_lists_and_uses_another_package(my_parts: Path, run: Path, tmp_path: Path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(my_parts), str(DOC.parents[1])])}
    program = [sys.executable, "-m", "featureinterp.cli.main", "list", "simulators"]
    done = subprocess.run(program, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "stems" in line)
    assert "words that begin as a word of the rule does" in line and "my-parts 1.0" in line
    assert [name for name in SIMULATORS.own if name not in done.stdout] == []


def test_listing_as_json(my_parts: Path):
    found = json.loads(cli("list", "--json").stdout)
    assert set(found) == set(REGISTRIES)
    assert {p["name"]: p["source"] for p in found["layouts"]}["npz"] == "my-parts 1.0"
    assert all(p["says"] and p["trouble"] is None for parts in found.values() for p in parts)
    refused(cli("list", "simulator"), "'simulator'", "simulators")


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_own_name_can_be_loaded(kind: str):
    for name, entry in REGISTRIES[kind].own.items():
        part = REGISTRIES[kind].load(name)
        assert callable(part) or (part.matches and part.read)
        assert entry.says and "\n" not in entry.says and REGISTRIES[kind].check(name) == name


def test_nothing_of_others_is_imported_before_a_name_of_theirs_is_asked_for(site: Path, run: Path):
    install(site, "loud", {"featureinterp.simulators": {"loud": "loud_one:Loud"}}, **{"loud_one.py": "1 / 0"})
    assert SIMULATORS.has("token-wise", "local") and SIMULATORS.check("lexical") and SIMULATORS.load("rated")
    assert "loud" in SIMULATORS.names() and "loud_one" not in sys.modules
    with pytest.raises(
        InputError, match="'loud' of the package loud 1.0 cannot be loaded .ZeroDivisionError"
    ):
        SIMULATORS.load("loud")
    listed = {p.name: p for p in SIMULATORS.listed()}
    assert "ZeroDivisionError" in (listed["loud"].trouble or "") and listed["lexical"].trouble is None
    refused(cli("explain", str(run), "--simulator", "loud"), "loud 1.0", "cannot be loaded")


def test_two_packages_with_one_name_and_one_that_takes_an_own_name(site: Path):
    one = {"one.py": 'def make(path, rows):\n    """one."""\n    return 1\n'}
    install(site, "first", {"featureinterp.formats": {"xml": "one:make", "csv": "one:make"}}, **one)
    install(site, "second", {"featureinterp.formats": {"xml": "two:make"}})
    with pytest.raises(InputError, match=r"several packages have a format 'xml' \(first 1.0, second 1.0\)"):
        FORMATS.load("xml")
    assert FORMATS.load("csv").__module__ == "featureinterp.reports.export"
    taken = [p for p in FORMATS.listed() if p.name == "csv"]
    assert [p.trouble for p in taken] == [None, "not used: another format has this name"]


def test_a_name_that_stands_for_nothing_says_what_there_is(my_parts: Path, tmp_path: Path):
    with pytest.raises(UnknownNameError, match="no simulator 'best': choose from token-wise, .*, stems"):
        SIMULATORS.load("best")
    with pytest.raises(InputError, match="there is no stage 'score2'.*falsify, steer, doubt"):
        fi.explain(tmp_path, "0:1", stages=("explain", "score2"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UnknownNameError, match="holds no SAE.*featureinterp list layouts"):
        fi.load_sae(str(tmp_path / "none"))


def test_a_layout_that_gives_something_else_is_one_sentence(site: Path, tmp_path: Path):
    text = "def matches(folder):\n    return True\n\n\ndef read(folder):\n    return {}\n"
    install(site, "odd", {"featureinterp.layouts": {"odd": "odd_layout"}}, **{"odd_layout.py": text})
    (tmp_path / "sae").mkdir()
    with pytest.raises(InputError, match=r"layout 'odd' reads .* as a dict: it must give a Checkpoint"):
        fi.load_sae(str(tmp_path / "sae"))
    assert LAYOUTS.load("odd").__name__ == "odd_layout"


ENDS = """def from_the_end(offer):
    \"\"\"the last window of the corpus first.\"\"\"
    return range(offer.n_windows - 1, -1, -1)
"""


def test_a_kind_of_window_of_another_package(site: Path, run: Path, tmp_path: Path):
    points = dict.fromkeys(("ends", "ends_negative"), "ends:from_the_end")
    install(site, "ends", {"featureinterp.windows": points}, **{"ends.py": ENDS})
    policy = fi.RecordPolicy({"top": (2, 2, 2), "ends": (0, 2, 2), "ends_negative": (2, 2, 4)})
    for record in fi.records(run, "0:4", policy=policy):
        for split in ("train", "valid", "test"):
            rows = [w.row for w in record.get(split, "ends_negative")]
            assert (
                rows == sorted(rows, reverse=True)
                and len(rows)
                == policy.counts["ends_negative"][0 if split == "train" else 1 if split == "valid" else 2]
            )
            assert not any(w.fires for w in record.get(split, "ends_negative"))
    out = tmp_path / "out"
    results = fi.explain(
        run,
        "0:3",
        out=out,
        explainer="top-tokens",
        simulator="lexical",
        stages=("explain", "simulate"),
        plan={"negatives": ("ends", "ends_negative")},
        records=policy,
    )
    names = {score.name for score in results[0].scores}
    assert {"correlation", "correlation_ends_negative", "false_positives_ends_negative"} <= names
    args = ["explain", str(run), "--features", "0:2", "--explainer", "top-tokens", "--simulator", "lexical"]
    refused(cli(*args, "--negatives", "beginnings"), "'beginnings'", "choose from random, ", "ends_negative")
    for make in (lambda: fi.Plan(negatives=("never",)), lambda: fi.TreeSettings(negatives=("never",))):
        with pytest.raises(UnknownNameError, match="no kind of window 'never'"):
            make()
    with pytest.raises(UnknownNameError, match="no kind of window 'never'"):
        fi.RecordPolicy({"never": (1, 1, 1)})


OTHERS = """import numpy as np

from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.score import Score


class Says:
    \"\"\"says the same of every feature.\"\"\"

    def __init__(self, parts):
        self.words = parts.options("says").get("words", "the sea")
        self.settings = {"explainer": "says", "words": self.words}

    async def explain(self, record):
        return Explanation((Rule(f"{self.words} {record.feature.index}", 5),), Provenance("says"))


class Length:
    \"\"\"how many letters an explanation has, beside another feature's.\"\"\"

    name, traits, settings = "length", ("null",), {"scorer": "length"}

    def __init__(self, parts):
        pass

    async def run(self, state):
        null = None if state.other is None else float(len(state.other.text))
        state.scores.append(Score("length", float(len(state.explained.text)), 1, null=null))


class Flat:
    \"\"\"embeds every text alike.\"\"\"

    fingerprint = "flat"

    def embed(self, texts):
        return np.tile(np.array([[1.0, 0.0]], np.float32), (len(texts), 1))
"""


@pytest.fixture
def others(site: Path) -> None:
    points = {"explainers": {"says": "others:Says"}, "scorers": {"length": "others:Length"}}
    groups = {f"featureinterp.{kind}": own for kind, own in points.items()}
    install(
        site, "others", groups | {"featureinterp.embedders": {"flat": "others:Flat"}}, **{"others.py": OTHERS}
    )


def test_an_explainer_and_a_scorer_of_another_package(others: None, run: Path, tmp_path: Path):
    plan = {"n_test": 2, "n_valid": 2, "negatives": ("random",)}
    results = fi.explain(
        run,
        "3,5",
        out=tmp_path / "out",
        explainer="says",
        stages=("explain", "score"),
        scorers=("length",),
        plan=plan,
        records=fi.RecordPolicy({"top": (2, 2, 2)}),
        options={"says": {"words": "an island"}},
        llm=fi.Endpoint("http://127.0.0.1:9/v1", "m", None),
    )
    assert [r.explanation.text for r in results if r.explanation] == ["an island 3", "an island 5"]
    length = results[0].score("length")
    assert length is not None and (length.value, length.null, results[0].null_of) == (11.0, 11.0, 5)


def test_an_embedder_of_another_package(others: None, run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    policy = fi.RecordPolicy({"top": (2, 2, 2), "similar_negative": (1, 1, 1)})
    found = list(fi.records(tmp_path / "run", "3", policy=policy, embedder="flat"))
    assert len(found[0].get("train", "similar_negative")) == 1
    assert [p.suffix for p in sorted((tmp_path / "run" / "embeddings").glob("*-flat*"))] == [".json", ".npy"]


def test_the_service_reads_the_same_names(my_parts: Path, monkeypatch: pytest.MonkeyPatch):
    from featureinterp.server import forms

    forms._served.cache_clear()
    try:
        asked = {"run": "r", "simulator": "stems", "stages": ["explain", "doubt"]}
        assert forms.Submission(**asked).simulator == "stems"
        for wrong in ({"simulator": "best"}, {"stages": ["explain", "falsify"]}, {"explainer": "stems"}):
            with pytest.raises(ValueError, match="here: choose from"):
                forms.Submission(**asked | wrong)
    finally:
        forms._served.cache_clear()


def test_a_part_of_this_process():
    made: Registry[Any] = Registry("things", "thing", {})
    made.register("mine", len, "counts")
    assert made.names() == ["mine"] and made.load("mine") is len
    assert [(p.name, p.says, p.source) for p in made.listed()] == [("mine", "counts", "this process")]
    with pytest.raises(InputError, match="'lexical' is this project's own"):
        SIMULATORS.register("lexical", lambda parts: parts.simulator)
    with pytest.raises(UnknownNameError, match="no thing 'other': choose from mine"):
        made.load("other")
