"""Verbs in one folder, one after the other: what each made is there, whole, and is not made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import HOOK
from test_claims import POLICY, files_of, texts
from test_cli import cli, embed, refused
from test_training_runs import recipe
from tiny import make_subject_folder

from featureinterp.api import training
from featureinterp.claims import CODES, EXTRACTION, JOB, REQUEST, asked_in
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import IncompatibleError
from featureinterp.files import content_key
from featureinterp.machine import AUTO
from featureinterp.sampling.similar import SentenceEmbedder
from featureinterp.stored.sums import write_marker
from featureinterp.subject.load import Subject
from featureinterp.training.extract import ExtractSettings, extract, merge
from featureinterp.training.settings import recipe_toml

ORDERS = {
    "codes first": ("collect", "records", "explain", "extract", "train", "probe", "layers"),
    "activations first": ("layers", "train", "extract", "collect", "probe", "explain", "records"),
}
DRAWN = (".png", ".svg", ".html")
"""Made by libraries that write the time into them."""
COSTLY = ("codes/", "windows/", "train/", "test/", "checkpoint.safetensors")


def commands(x: Path, model: Path, sae: Path, corpus: Path, config: Path) -> dict[str, tuple[str, ...]]:
    """Every verb with all that it writes in one folder."""
    subject, text = ("--model", str(model), "--dtype", "float32"), ("--corpus", str(corpus))
    job = ("--features", "3,5", "--explainer", "top-tokens", "--simulator", "lexical", "--no-questions")
    small = ("--config", str(config))
    return {
        "collect": ("collect", *subject, *text, "--sae", str(sae), "--window", "16", "--out", str(x)),
        "records": ("records", str(x), "--features", "3,5"),
        "explain": ("explain", str(x), *job, "--negatives", "random", "--out", str(x)),
        "extract": ("extract", *small, "--out", str(x)),
        "train": ("train", *small, "--activations", str(x), "--out", str(x)),
        "probe": ("probe", str(x), "--labels", "months", "--no-dense", *text, "--out", str(x)),
        "layers": ("layers", *subject, *text, "--window", "16", "--blocks", "1", "--out", str(x)),
    }


def kept(x: Path) -> dict[str, bytes]:
    """What is of the verbs that have run, without what says what it is of."""
    return {
        name: content
        for name, content in files_of(x).items()
        if name != REQUEST and not name.endswith(DRAWN) and ".sqlite-" not in name
    }


def made_at(x: Path) -> dict[str, int]:
    found = (p for p in x.rglob("*") if p.is_file())
    return {str(p): p.stat().st_mtime_ns for p in found if str(p.relative_to(x)).startswith(COSTLY)}


@pytest.mark.parametrize(
    "order", [pytest.param(order, id=name) for name, order in ORDERS.items()], scope="function"
)
def test_verbs_leave_what_others_made_in_the_same_folder(
    tmp_path: Path,
    subject_folder: Path,
    sae_folder: Path,
    corpus_file: Path,
    order: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """In both orders, so that of any two verbs each one comes first once, and each comes again."""
    monkeypatch.setattr(SentenceEmbedder, "embed", embed)
    config, x = tmp_path / "recipe.toml", tmp_path / "x"
    config.write_text(
        recipe_toml(
            recipe(subject_folder, corpus_file, **{"training.samples": 1280, "evaluation.ce_windows": 0})
        )
    )
    verbs = commands(x, subject_folder, sae_folder, corpus_file, config)
    before: dict[str, bytes] = {}
    for verb in order:
        done = cli(*verbs[verb])
        assert done.returncode == 0, (verb, done.stderr)
        after = kept(x)
        assert {name: after.get(name) for name in before} == before, verb
        before = after
    said, at = (x / REQUEST).read_bytes(), made_at(x)
    journal = json.loads(said)["contents"]
    assert set(journal) == {"codes", "job", "extraction", "training", "layers", "study"}
    for verb in order:
        done = cli(*verbs[verb])
        assert done.returncode == 0, (verb, done.stderr)
    assert made_at(x) == at and (x / REQUEST).read_bytes() == said
    after = kept(x)
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {"journal.sqlite", "log.jsonl"}, changed  # how the newest run ended
    assert cli("verify", str(x)).returncode == 0


def test_what_one_request_was_written_over_says_itself_what_it_is_of(
    tmp_path: Path, subject_folder: Path, sae_folder: Path, corpus_file: Path
):
    """Earlier versions kept one request per folder: that of the last verb."""
    config, x = tmp_path / "recipe.toml", tmp_path / "x"
    config.write_text(recipe_toml(recipe(subject_folder, corpus_file)))
    verbs = commands(x, subject_folder, sae_folder, corpus_file, config)
    for verb in ("collect", "extract"):
        assert cli(*verbs[verb]).returncode == 0
    asked = {content.name: asked_in(x, content) for content in (CODES, EXTRACTION)}
    at = made_at(x)
    (x / REQUEST).unlink()
    job = {"codes": "fingerprint"}
    write_marker(x / REQUEST, {"key": content_key(job), **job, "about": {}})
    for verb, content in (("collect", CODES), ("extract", EXTRACTION)):
        done = cli(*verbs[verb])
        assert done.returncode == 0, done.stderr
        assert asked_in(x, content) == asked[content.name]
    assert made_at(x) == at and asked_in(x, JOB) == job
    (x / REQUEST).unlink()
    refused(cli(*verbs["extract"], "--set", "training.seed=1"), "another request", "settings seed 0 there")


def test_an_evaluation_does_not_write_over_the_metrics_of_a_run(
    tmp_path: Path, subject_folder: Path, corpus_file: Path
):
    small = recipe(subject_folder, corpus_file, **{"training.samples": 1280, "evaluation.ce_windows": 0})
    training.train(tmp_path / "run", small)
    before = files_of(tmp_path / "run")
    args = ("evaluate", str(tmp_path / "run"), "--ce-windows", "0", "--out")
    refused(cli(*args, str(tmp_path / "run")), "holds a training run, and an evaluation would write over")
    assert files_of(tmp_path / "run") == before
    for _ in range(2):
        assert cli(*args, str(tmp_path / "judged")).returncode == 0
    config = tmp_path / "recipe.toml"
    config.write_text(recipe_toml(small))
    for more in ((), ("--replace",)):
        done = cli("train", "--config", str(config), "--out", str(tmp_path / "judged"), *more)
        refused(done, "holds an evaluation, and a training run would write over its metrics.json")
    assert (tmp_path / "judged" / "metrics.json").exists()


def test_replacing_a_run_deletes_only_what_lies_in_its_folder(
    tmp_path: Path, subject_folder: Path, corpus_file: Path
):
    own, theirs = tmp_path / "run" / "held-out", tmp_path / "theirs"
    options = {"training.online": True, "training.buffer": 512, "training.samples": 1280}
    options |= {"evaluation.ce_windows": 0}
    for store in (own, theirs):
        out = tmp_path / "run" if store is own else tmp_path / "first"
        training.train(out, recipe(subject_folder, corpus_file, **options, **{"store.folder": store}))
    other = recipe(subject_folder, corpus_file, **options, **{"corpus.window": 8, "store.folder": theirs})
    before = files_of(theirs)
    for replace in (False, True):
        with pytest.raises(
            IncompatibleError,
            match=r"theirs holds an extraction of another request.*window length 16 there, 8 asked.*"
            "delete what lies there yourself .*'featureinterp train --replace' deletes nothing outside",
        ):
            training.train(tmp_path / "second", other, replace=replace)
    assert files_of(theirs) == before
    (tmp_path / "run" / "linked").symlink_to(theirs)
    linked = other.changed({"store.folder": tmp_path / "run" / "linked"})
    with pytest.raises(IncompatibleError, match="another request"):
        training.train(tmp_path / "run", linked, replace=True)
    assert files_of(theirs) == before
    done = training.train(tmp_path / "run", other.changed({"store.folder": own}), replace=True)
    assert WindowTable.open(own / "windows").length == 8 and done.recipe.corpus.window == 8


def make_other(folder: Path) -> Path:
    """A model of the same shape and tokenizer with other weights."""
    return make_subject_folder(folder / "other", "llama", scale=0.2)


@pytest.mark.parametrize("verb", ["collect", "extract", "layers"])
def test_what_was_begun_in_another_dtype_goes_on_in_that(
    tmp_path: Path, subject_folder: Path, sae_folder: Path, corpus_file: Path, verb: str
):
    """As when a machine of another kind began it, and ``auto`` stands for something else here."""
    config, x = tmp_path / "recipe.toml", tmp_path / "x"
    config.write_text(recipe_toml(recipe(subject_folder, corpus_file, **{"subject.dtype": "float32"})))
    command = commands(x, subject_folder, sae_folder, corpus_file, config)[verb]
    made = cli(*command, "--dtype", "bfloat16")
    assert made.returncode == 0, made.stderr
    before = files_of(x)
    said = cli(*command, "--dtype", "float32")
    refused(said, 'dtype "bfloat16" there, "float32" asked for', "go on there with --dtype bfloat16")
    assert ("subject.dtype of a recipe" in said.stderr) == (verb == "extract")
    assert "another model" not in said.stderr, "the same weights, cast"
    other = tuple(str(make_other(tmp_path)) if a == str(subject_folder) else a for a in command)
    if verb == "extract":
        other = (*command, "--model", str(make_other(tmp_path)))
    said = cli(*other, "--dtype", "float32")
    refused(said, "another model", "give another folder")
    assert "go on there" not in said.stderr
    assert files_of(x) == before
    assert cli(*command, "--dtype", "bfloat16").returncode == 0
    shutil.rmtree(x)
    assert cli(*command, "--dtype", "float32").returncode == 0
    refused(cli(*command, "--dtype", "bfloat16"), "go on there with --dtype float32")


def test_a_run_that_was_begun_in_another_dtype_goes_on_in_that(
    tmp_path: Path, subject_folder: Path, corpus_file: Path
):
    """Also one of an earlier version, whose recipe leaves the choice to the machine."""
    changes = {"training.samples": 1280, "evaluation.ce_windows": 0}
    for dtype, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
        run = tmp_path / dtype
        training.train(run, recipe(subject_folder, corpus_file, **changes, **{"subject.dtype": dtype}))
        wanted = recipe(subject_folder, corpus_file, **changes, **{"subject.dtype": other})
        with pytest.raises(
            IncompatibleError, match=rf"on there with --dtype {dtype} \(subject.dtype of a recipe\), give"
        ):
            training.train(run, wanted)
        (run / REQUEST).unlink()
        text = (run / "recipe.toml").read_text()
        assert f'dtype = "{dtype}"' in text.split("[corpus]")[0]
        (run / "recipe.toml").write_text(text.replace(f'dtype = "{dtype}"', f'dtype = "{AUTO}"', 1))
        with pytest.raises(IncompatibleError, match=f'subject dtype "{dtype}" there, "{other}" asked for'):
            training.train(run, wanted)
        training.train(run, wanted.changed({"subject.dtype": dtype}))


@pytest.mark.parametrize("place", ["source", "source.model.dtype", "source.model.fingerprint", "source.hook"])
def test_activations_that_do_not_say_what_they_are_of_are_one_sentence(
    tmp_path: Path, subject_folder: Path, corpus_file: Path, trained_acts: Path, place: str
):
    acts = Path(shutil.copytree(trained_acts, tmp_path / "acts"))
    for split in ("train", "test"):
        path = acts / split / "metadata.json"
        meta = json.loads(path.read_text())
        for name in ("checksum", "files"):
            del meta[name]
        *above, last = place.split(".")
        table = meta
        for name in above:
            table = table[name]
        del table[last]
        path.write_text(json.dumps(meta))
    config = tmp_path / "recipe.toml"
    config.write_text(recipe_toml(recipe(subject_folder, corpus_file)))
    run = ("train", "--config", str(config), "--activations", str(acts), "--out", str(tmp_path / "run"))
    refused(cli(*run), "does not say what its activations are", f"no {place}", "extract them again")
    found = cli("doctor", str(acts), "--no-model")
    assert found.returncode == 1 and "Traceback" not in found.stderr and f"no {place}" in found.stderr


@pytest.fixture(scope="module")
def trained_acts(tmp_path_factory: pytest.TempPathFactory, subject: Subject, corpus_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("acts")
    extract(subject, HOOK, load_corpus(str(corpus_file)), folder, POLICY)
    return folder


def test_merged_parts_are_what_one_worker_would_have_been_asked_for(
    tmp_path: Path, subject: Subject, corpus_file: Path
):
    corpus = load_corpus(str(corpus_file))
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for i, folder in enumerate(parts):
        extract(subject, HOOK, corpus, folder, POLICY, ExtractSettings(0.2, part=i, parts=2))
    out = tmp_path / "out"
    merge(parts, out)
    at, before = made_at(out), files_of(out)
    assert merge(parts[::-1], out).train is not None
    assert extract(subject, HOOK, corpus, out, POLICY, ExtractSettings(0.2)).train is not None
    assert made_at(out) == at and files_of(out) == before
    with pytest.raises(IncompatibleError, match=r"settings held_out 0.2 there, 0.3 asked for"):
        extract(subject, HOOK, corpus, out, POLICY, ExtractSettings(0.3))
    other = tmp_path / "other"
    file = texts(tmp_path / "c.jsonl", 0)
    extract(subject, HOOK, load_corpus(str(file)), other, POLICY, ExtractSettings(0.2))
    with pytest.raises(IncompatibleError, match="another corpus"):
        merge([other], out)
    shutil.rmtree(out / "test")  # a merge that was killed between its stores
    assert merge(parts, out).test is not None and files_of(out) == before
    assert (
        merge([other], out, replace=True).windows.fingerprint
        != merge(parts, tmp_path / "new").windows.fingerprint
    )
