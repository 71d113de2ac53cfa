"""Damage to every stored kind: what is read is right, or the error is one sentence that says what to do."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import Stored, attack
from markers import unseal
from typer.testing import CliRunner

from featureinterp.api.stored import verify
from featureinterp.claims import CODES, claim
from featureinterp.cli.main import app
from featureinterp.codes.dense import dense_twin
from featureinterp.codes.runs import RunWriter
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.domain.chat import Reply
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult
from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    DamagedStoreError,
    FeatureInterpError,
    IncompatibleError,
    IncompleteStoreError,
)
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.spec import job_of, make_job
from featureinterp.llm.cached import ReplyStore
from featureinterp.probing.study import Concept, Study, StudySettings
from featureinterp.reports.probing import read_annotations, write_study
from featureinterp.reports.render import read_results, write_results
from featureinterp.reports.sensitivity import write_sensitivity
from featureinterp.sampling.files import write_records
from featureinterp.sampling.similar import window_embeddings
from featureinterp.stored.sums import Sums, read_marker, write_marker
from featureinterp.stored.whole import DAMAGED, GOOD, UNCHECKED
from featureinterp.subject.load import Subject
from featureinterp.training.loop import (
    CHECKPOINT,
    LOG,
    Log,
    Trainer,
    check_log,
    prepare,
    read_checkpoint,
    read_log,
    write_checkpoint,
)
from featureinterp.training.settings import SaeTable, TrainingTable
from featureinterp.training.store import ActivationStore, StoreWriter

N_FEATURES, LENGTH = 7, 5


class Words:
    """One token per character but the last one of a text, which shares a token with the one before it."""

    fingerprint = "characters"

    def encode(self, texts: list[str]) -> list[object]:
        kind = type("E", (), {})
        out = []
        for text in texts:
            one = kind()
            one.ids, one.offsets = [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]
            out.append(one)
        return out


class Embeds:
    """Unit vectors from the first letters of a text."""

    fingerprint = "letters"

    def embed(self, texts: list[str]) -> np.ndarray:
        found = np.array([[1.0, *(ord(c) % 7 for c in text.ljust(3)[:3])] for text in texts], np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def make_windows(folder: Path, seed: int) -> WindowTable:
    rng = random.Random(seed)
    letters = "abcdeé 😀日"
    texts = ["".join(rng.choice(letters) for _ in range(rng.randint(6, 60))) for _ in range(12)]
    corpus = Corpus("texts", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts))
    return build_windows(corpus, Words(), WindowPolicy(LENGTH, 2), folder)


def make_run(run: Path, seed: int) -> None:
    windows = make_windows(run / "windows", seed)
    rng = np.random.default_rng(seed)
    n = len(windows) * LENGTH
    writer = RunWriter(
        run / "codes", n_features=N_FEATURES, n_positions=n, value_dtype="float16", flush_nonzeros=40
    )
    for row in range(len(windows)):
        at, features = np.nonzero(rng.random((int(windows.lengths[row]), N_FEATURES)) < 0.4)
        values, unscored = (
            rng.exponential(3, len(at)) + 0.01,
            np.array([row * LENGTH]) if row % 4 == 0 else None,
        )
        kept = at > 0 if row % 4 == 0 else at >= 0
        writer.add(
            (row * LENGTH + at)[kept],
            features[kept],
            values[kept],
            n_scored=1,
            end_window=row + 1,
            unscored=unscored,
        )
    writer.finish(
        {"key": "k", "corpus": {"name": "texts", "windows": windows.fingerprint}, "window_length": LENGTH}
    )
    window_embeddings(windows, Embeds(), run / "embeddings", chunk=5)


def read_windows(run: Path) -> object:
    table = WindowTable.open(run / "windows")
    rows = range(len(table))
    arrays = [
        np.asarray(a).tolist() for a in (table.tokens, table.ends, table.documents, table.starts, table.chars)
    ]
    return table.meta, arrays, [table.pieces(r) for r in rows], list(table.texts()), table.document_ids()


def read_codes(run: Path) -> object:
    store = CodesStore.open(run)
    codes = [(c.positions.tolist(), c.values.tolist()) for c in map(store.feature, range(store.n_features))]
    rows = [store.window_activations(f, [0, 3]).tolist() for f in range(store.n_features)]
    return dict(store.meta), codes, rows, store.scales.tolist(), store.scored_positions.tolist()


def read_embeddings(run: Path) -> object:
    return np.asarray(
        window_embeddings(WindowTable.open(run / "windows"), Embeds(), run / "embeddings")
    ).tolist()


def make_activations(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    writer = StoreWriter(folder, 6, "float16", shard_rows=9)
    for n in (4, 11, 8):
        sides = {name: rng.integers(0, 50, n) for name in ("documents", "windows", "offsets", "tokens")}
        writer.append(rng.normal(size=(n, 6)), **sides)
    writer.finish({"key": f"k{seed}", "hook": "blocks.0.hook_resid_post"})


def read_activations(folder: Path) -> object:
    store = ActivationStore.open(folder)
    sides = [
        np.asarray(getattr(store, name)).tolist() for name in ("documents", "windows", "offsets", "tokens")
    ]
    return store.meta, store.read(np.arange(len(store))[::-1]).tolist(), sides


def make_journal(folder: Path, seed: int) -> None:
    with Journal(folder / "journal.sqlite") as journal:
        number = journal.start("job", 12)
        for i in range(30):
            key, value = f"{seed}-{i:04}" * 4, {"text": "x" * (200 * i % 3000), "n": [i, seed]}
            journal.stage(
                key, i, "explain", value, usage=Usage(1, 10 * i, i, 0.5, 0.01 * i), partial=i % 5 == 0
            )
        for i in range(12):
            journal.finish("job", result_of(i, seed), "done")
        journal.end(number, "done", Usage(3, 4, 5, 6.0, 7.0))
    store = ReplyStore(folder / "replies.sqlite")
    for i in range(30):
        store.put(
            f"{seed}-{i:04}" * 4,
            "model",
            Reply((f"reply {i} " * 40,), (False,), Usage(1, i, 2, 0.1, None), ({},)),
        )
    store.close()


def result_of(feature: int, seed: int) -> FeatureResult:
    shortfalls = {"top/test": f"words {seed} like {feature} " * 20}
    return FeatureResult(feature, "sae", 0.5 + feature, 0.01, 30 + seed, (), shortfalls=shortfalls)


def read_journal(folder: Path) -> object:
    with Journal(folder / "journal.sqlite") as journal:
        journal.check()
        keys = [f"{1}-{i:04}" * 4 for i in range(30)]
        run = journal.last_run()
        assert run is not None
        run = {name: value for name, value in run.items() if name not in ("started", "ended")}
        found = [r.to_json() for r in journal.features("job")]
        return (
            [journal.get(k) for k in keys],
            found,
            journal.finished("job"),
            journal.stages(),
            journal.causes(),
            run,
        )


def read_replies(folder: Path) -> object:
    store = ReplyStore(folder / "replies.sqlite")
    try:
        store.check()
        return [store.get(f"{1}-{i:04}" * 4) for i in range(30)]
    finally:
        store.close()


def make_results(folder: Path, seed: int) -> None:
    write_results(
        folder, [result_of(i, seed) for i in range(8)], {"title": f"t{seed}", "facts": {"SAE": "s"}}
    )


def read_all_results(folder: Path) -> object:
    results, about = read_results(folder)
    return [r.to_json() for r in results], about


def make_marked(folder: Path, seed: int) -> None:
    """What is guarded by one marker or by itself: job, request, records, studies, sensitivity, checkpoint,
    dense twin.
    """
    job = make_job(run=folder / "run", features=f"0:{seed + 3}", simulator="lexical", plan={"seed": seed})
    with Journal(folder / "job" / "journal.sqlite") as journal:
        journal.start(f"k{seed}", 1)
    write_marker(
        folder / "job" / "job.json",
        {"key": f"k{seed}", "job": job.model_dump(mode="json"), "features": list(range(seed + 3))},
    )
    (folder / "request").mkdir()
    claim(folder / "request", CODES, asked_for(seed), about={"corpus": "texts"})
    (folder / "request" / "codes").mkdir()
    records = [FeatureRecord(FeatureId("sae", f), 1.0 + seed, 0.5, 9, {}, {"top": "few"}) for f in range(20)]
    write_records(folder / "records" / "records.jsonl", records, "fingerprint")
    concepts = tuple(Concept(f"concept {i}", 9, 8, 7, 6 + seed, undefined="too few") for i in range(4))
    labelled = {c.name: np.arange(i + seed, 300) for i, c in enumerate(concepts)}
    about = {"title": f"t{seed}", "subtitle": "s", "facts": {"Seed": seed}, "codes": "fingerprint"}
    write_study(
        folder / "probe",
        Study(concepts, (), 90, 40, 7, N_FEATURES, StudySettings(seed=seed)),
        labelled,
        about,
    )
    # tables without features are equal, and then a summary of another folder is the folder's own
    write_sensitivity(folder / "sensitivity", [], {"sae_name": "s"}, per_call=4)
    trainer = prepared(seed)
    trainer.one_step()
    write_checkpoint(trainer, folder / "checkpoint" / CHECKPOINT, f"key{seed}")


def asked_for(seed: int) -> dict[str, object]:
    return {"corpus": f"{seed}" * 32, "window": {"length": 16 + seed, "min": 8}}


def prepared(seed: int) -> Trainer:
    rng = np.random.default_rng(seed)
    rows = OwnRows(rng.normal(size=(64, 6)).astype(np.float32))
    table = TrainingTable(batch=8, samples=64, seed=seed, log_every=1)
    return prepare(rows, SaeTable(architecture="topk", d_sae=9, k=2, aux_k=0), table, torch.device("cpu"), 64)


class OwnRows:
    """The same rows again and again."""

    def __init__(self, rows: np.ndarray) -> None:
        self.all, self.cursor, self.d_model = rows, {"row": 0}, rows.shape[1]

    def sample(self, n: int, *, seed: int, n_shards: int | None) -> np.ndarray:
        return self.all

    def next(self) -> np.ndarray:
        return self.all[:8]

    def seek(self, cursor: dict[str, int]) -> None:
        self.cursor = cursor


def read_job(folder: Path) -> object:
    for found in verify(folder / "job").of(DAMAGED):
        raise DamagedStoreError(found.why)
    return job_of(folder / "job").model_dump(mode="json"), read_marker(
        folder / "job" / "job.json", "run it again"
    ).value


def read_request(folder: Path) -> object:
    """A request goes on where it is the same, and says what differs where it is another."""
    claim(folder / "request", CODES, asked_for(1))
    return json.loads((folder / "request" / "request.json").read_text())["contents"]["codes"]["key"]


def read_checkpoint_of(folder: Path) -> object:
    trainer = prepared(1)
    read_checkpoint(trainer, folder / "checkpoint" / CHECKPOINT, "key1")
    return trainer.step, {name: t.tolist() for name, t in trainer.state().items()}


def proved(name: str) -> Callable[[Path], object]:
    """Reads tables that other programs read: when ``verify`` lets them pass, their bytes count."""

    def read(folder: Path) -> object:
        for found in verify(folder / name).of(DAMAGED):
            raise DamagedStoreError(found.why)
        files = sorted(
            p for p in (folder / name).iterdir() if p.suffix in (".csv", ".parquet", ".npz", ".jsonl")
        )
        return [read_marker(p, "").value for p in (folder / name).glob("*.json")], [
            p.read_bytes() for p in files
        ]

    return read


def read_study(folder: Path) -> object:
    annotations, positions = read_annotations(folder / "probe", "fingerprint")
    if not positions:
        raise IncompatibleError("it is of other codes")
    return annotations, {name: p.tolist() for name, p in positions.items()}, proved("probe")(folder)


def read_dense(run: Path) -> object:
    def load() -> Subject:
        raise IncompleteStoreError("the subject would be asked again")

    return dense_twin(CodesStore.open(run), run, load).tolist()


def make_dense(run: Path, seed: int) -> None:
    store = CodesStore.open(run)
    values = np.random.default_rng(seed).normal(size=(len(store.scored_positions), 4)).astype(np.float32)
    (run / "dense").mkdir()
    (run / "dense" / "activations.bin").write_bytes(values.tobytes())
    state = {"codes": store.fingerprint, "width": 4, "next_window": len(store.windows)}
    write_marker(
        run / "dense" / "dense.json",
        state,
        {"activations.bin": Sums.of(run / "dense" / "activations.bin", 64)},
    )


MARKED = {
    "job": read_job,
    "request": read_request,
    "records": proved("records"),
    "probe": read_study,
    "sensitivity": proved("sensitivity"),
    "checkpoint": read_checkpoint_of,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Stored]:
    """Two of every kind."""
    found = []
    base = tmp_path_factory.mktemp("stored")
    made = {
        "run": make_run,
        "activations": make_activations,
        "journal": make_journal,
        "results": make_results,
        "marked": make_marked,
    }
    for name, make in made.items():
        for seed in (1, 2):
            (base / name / str(seed)).mkdir(parents=True)
            make(base / name / str(seed), seed)
    run, other = base / "run" / "1", base / "run" / "2"
    (embedded,), (named,) = run.glob("embeddings/*.npy"), run.glob("embeddings/*.json")
    for ours, suffix in ((embedded, "npy"), (named, "json")):
        shutil.copyfile(next(other.glob(f"embeddings/*.{suffix}")), other / "embeddings" / ours.name)
    parts = {"windows": read_windows, "codes": read_codes, "embeddings": read_embeddings}
    for name, read in parts.items():
        files = tuple(sorted(f"{name}/{p.name}" for p in (run / name).iterdir()))
        found.append(Stored(name, run, other, files, read))
    for name, read in {"activations": read_activations, "results": read_all_results}.items():
        folder = base / name / "1"
        files = tuple(sorted(p.name for p in folder.iterdir()))
        found.append(Stored(name, folder, base / name / "2", files, read))
    for file, read in {"journal.sqlite": read_journal, "replies.sqlite": read_replies}.items():
        found.append(Stored(file, base / "journal" / "1", None, (file,), read))
    return found


@pytest.fixture(scope="module")
def more_kinds(kinds: list[Stored]) -> list[Stored]:
    """The parts that one marker guards, or that guard themselves."""
    base = kinds[0].folder.parent.parent
    for seed in (1, 2):
        shutil.copytree(base / "run" / str(seed), base / "dense" / str(seed))
        make_dense(base / "dense" / str(seed), seed)
    names = ("dense/activations.bin", "dense/dense.json")
    found = [Stored("dense", base / "dense" / "1", base / "dense" / "2", names, read_dense)]
    base = base / "marked"
    for name, read in MARKED.items():
        kept = (".json", ".jsonl", ".csv", ".parquet", ".npz", ".safetensors")
        files = tuple(sorted(f"{name}/{p.name}" for p in (base / "1" / name).iterdir() if p.suffix in kept))
        found.append(Stored(name, base / "1", base / "2", files, read))
    return found


def run_attack(kinds: list[Stored], n: int, work: Path, seed: int) -> Counter[str]:
    """``n`` damages of each kind; fails with all that were wrong."""
    outcomes: Counter[str] = Counter()
    bad = []
    for number, stored in enumerate(kinds):
        for what, outcome in attack(stored, n, work, random.Random(seed + number)):
            outcomes[outcome.partition(":")[0]] += 1
            if outcome not in ("right", "refused"):
                bad.append(f"{what}: {outcome}")
    assert not bad, "\n".join(bad[:40])
    return outcomes


def test_no_damage_is_silent_and_none_gives_a_traceback(kinds: list[Stored], tmp_path: Path):
    outcomes = run_attack(kinds, 24, tmp_path / "work", 0)
    assert outcomes["refused"] > 100


def test_no_damage_to_markers_tables_and_checkpoints_is_silent(more_kinds: list[Stored], tmp_path: Path):
    outcomes = run_attack(more_kinds, 10, tmp_path / "work", 500)
    assert outcomes["refused"] > 40


@pytest.mark.slow
def test_a_thousand_damages_and_more(kinds: list[Stored], more_kinds: list[Stored], tmp_path: Path):
    outcomes = run_attack(kinds, 180, tmp_path / "work", 1000)
    assert outcomes["refused"] + outcomes["right"] >= 1200
    outcomes = run_attack(more_kinds, 80, tmp_path / "work", 2000)
    assert outcomes["refused"] + outcomes["right"] >= 500


ODD: tuple[object, ...] = (
    None, True, -1, 0, 1.5, 10**30, 1e308, float("inf"), "", "x", "\ud800", "../../x", [], [3], {}, {"a": 1},
)  # fmt: skip


def forged(value: object, rng: random.Random) -> str:
    """Puts something odd into one place of plain data; which."""
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]  # type: ignore[index]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            value[key] = odd = rng.choice(ODD)  # type: ignore[index]
            return f"{key} = {odd!r:.30}"
        value = inner
    return "nothing"


def forgeries(kinds: list[Stored], n: int, work: Path, seed: int) -> tuple[int, list[str]]:
    """``n`` changes of each marker, sealed anew as a forger would: how many, and those that were a
    traceback."""
    rng, tried, bad = random.Random(seed), 0, []
    for stored in kinds:
        for file in (f for f in stored.files if f.endswith(".json")):
            for _ in range(n):
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(stored.folder, work)
                marker = read_marker(work / file, "")
                what = forged(marker.value, rng)
                write_marker(work / file, marker.value, marker.files)
                tried += 1
                try:
                    stored.read(work)
                except FeatureInterpError as error:
                    if "\n" in str(error):
                        bad.append(f"{file}: {what}: several lines {error!r}")
                except Exception as error:
                    bad.append(f"{file}: {what}: {type(error).__name__}: {error}")
    return tried, bad


def test_no_forged_marker_is_a_traceback(kinds: list[Stored], more_kinds: list[Stored], tmp_path: Path):
    tried, bad = forgeries([*kinds, *more_kinds], 25, tmp_path / "work", 77)
    assert tried >= 200 and not bad, "\n".join(sorted(bad))


def test_tables_of_another_run_are_told(tmp_path: Path):
    """A journal goes by what was asked for: another one's rows are never taken, and ``verify`` says that it
    is not the job's.
    """
    for seed in (1, 2):
        make_journal(tmp_path / str(seed), seed)
    job = {"key": "another job", "job": {}, "features": []}
    write_marker(tmp_path / "1" / "job.json", {**job, "key": "job"})
    assert verify(tmp_path / "1").good
    write_marker(tmp_path / "1" / "job.json", job)
    assert "do not belong together" in verify(tmp_path / "1").of(DAMAGED)[0].why
    for file in ("journal.sqlite", "replies.sqlite"):
        shutil.copyfile(tmp_path / "2" / file, tmp_path / "1" / file)
    with Journal(tmp_path / "1" / "journal.sqlite") as journal:
        assert [journal.get(f"1-{i:04}" * 4) for i in range(30)] == [None] * 30
    store = ReplyStore(tmp_path / "1" / "replies.sqlite")
    assert [store.get(f"1-{i:04}" * 4) for i in range(30)] == [None] * 30
    store.close()


def test_every_byte_of_a_training_log_is_guarded(tmp_path: Path):
    path = tmp_path / LOG
    log = Log(path, 0)
    lines = [{"step": i, "loss": 1 / (i + 1), "l0": float("nan") if i == 2 else 3.0} for i in range(5)]
    for line in lines:
        log.write(line)
    whole = path.read_bytes()
    wanted = repr(lines)
    assert repr(read_log(path)) == wanted and check_log(path) == 0
    for at in range(len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            assert repr(read_log(path)) == wanted, at
        except DamagedStoreError as error:
            assert "delete it and run the same command again" in str(error)
    pieces = whole.splitlines(keepends=True)
    for kept in (pieces[1:], pieces[:2] + pieces[3:], [pieces[1], pieces[0], *pieces[2:]]):
        path.write_bytes(b"".join(kept))
        with pytest.raises(DamagedStoreError, match="lines before it are lost"):
            read_log(path)
    path.write_bytes(whole[:-9])  # a killed process
    assert repr(read_log(path)) == repr(lines[:-1])
    Log(path, 2).write({"step": 3})
    assert [line["step"] for line in read_log(path)] == [0, 1, 2, 3]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # an earlier version
    assert repr(read_log(path)) == wanted and check_log(path) == 5


def test_every_byte_of_a_small_marker_is_guarded(tmp_path: Path):
    path = tmp_path / "marker.json"
    value = {"format": 2, "n": 17, "name": "é", "list": [1.5, None]}
    write_marker(path, value, {"a.bin": Sums(64, 3, [7])})
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            try:
                marker = read_marker(path, "make it again")
            except DamagedStoreError as error:
                assert "make it again" in str(error)
            else:
                assert (
                    marker.value == value and marker.files is not None and marker.files["a.bin"].crcs == [7]
                ), at


def test_parts_that_do_not_belong_together_are_refused(kinds: list[Stored], tmp_path: Path):
    run, other = kinds[0].folder, kinds[0].other
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "windows")
    shutil.copytree(other / "windows", tmp_path / "run" / "windows")
    with pytest.raises(IncompatibleError, match=r"do not belong together .* collect again"):
        CodesStore.open(tmp_path / "run")
    embeddings = tmp_path / "run" / "embeddings"
    theirs = WindowTable.open(other / "windows").fingerprint[:16]
    for path in list(embeddings.iterdir()):
        path.rename(embeddings / f"{theirs}-letters{path.suffix}")
    with pytest.raises(FeatureInterpError, match=r"delete .* and run the same command again"):
        read_embeddings(tmp_path / "run")


def test_folders_of_earlier_versions_are_read_and_their_sizes_and_ranges_checked(
    kinds: list[Stored], tmp_path: Path
):
    run, wanted = tmp_path / "run", read_codes(kinds[0].folder)
    shutil.copytree(kinds[0].folder, run)
    for path in (run / "windows" / "windows.json", run / "codes" / "codes.json"):
        unseal(path)
    assert read_codes(run) == wanted
    codes = run / "codes"
    for name, dtype, value in (
        ("positions", np.uint32, 2**31),
        ("values", np.float16, np.nan),
        ("values", np.float16, -1.0),
        ("offsets", np.int64, 2**40),
        ("offsets", np.int64, -1),
        ("unscored", np.uint32, 2**31),
    ):
        data = (codes / f"{name}.bin").read_bytes()
        array = np.frombuffer(data, dtype).copy()
        array[1] = value
        (codes / f"{name}.bin").write_bytes(array.tobytes())
        with pytest.raises(DamagedStoreError, match=f"{name}.bin is damaged.* collect"):
            read_codes(run)
        (codes / f"{name}.bin").write_bytes(data)
    with (codes / "values.bin").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(DamagedStoreError, match="instead of"):
        read_codes(run)


def test_only_the_blocks_that_are_read_are_checked(tmp_path: Path):
    make_run(tmp_path, 3)
    store = CodesStore.open(tmp_path)
    path = tmp_path / "codes" / "values.bin"
    data = path.read_bytes()
    marker = read_marker(tmp_path / "codes" / "codes.json", "")
    small = Sums(64)
    small.add(data)
    write_marker(
        tmp_path / "codes" / "codes.json", marker.value, {**(marker.files or {}), "values.bin": small}
    )
    path.write_bytes(data[:-2] + b"\x00\x01")
    store = CodesStore.open(tmp_path)
    assert (
        store.feature(0).values.tolist()
        == np.frombuffer(data, np.float16)[: len(store.feature(0).values)].tolist()
    )
    with pytest.raises(DamagedStoreError, match=r"values.bin is damaged at byte [\d,]+: delete"):
        store.feature(N_FEATURES - 1)


def test_replies_without_checksums_are_read_and_get_them(tmp_path: Path):
    path = tmp_path / "replies.sqlite"
    usage = {"requests": 1, "prompt_tokens": 2, "completion_tokens": 3, "seconds": 0.5, "cost_usd": None}
    value = {"texts": ["hi"], "truncated": [False], "usage": usage, "first_token": [{}], "read": []}
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE replies (key TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL, created "
        "REAL NOT NULL) STRICT;"
    )
    connection.execute("INSERT INTO replies VALUES ('a', 'm', ?, 1.0)", (json.dumps(value),))
    connection.commit()
    connection.close()
    store = ReplyStore(path)
    found = store.get("a")
    assert found is not None and found.texts == ("hi",) and store.check() == 1
    store.put("a", "m", found)
    assert store.get("a") == found and store.check() == 0
    store.close()


def test_verify_reads_all_and_names_what_is_damaged(kinds: list[Stored], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(kinds[0].folder, run)
    shutil.copytree(kinds[-1].folder, run / "explain")
    make_results(run / "explain", 1)
    whole = verify(run)
    assert whole.good and not whole.of(UNCHECKED) and len(whole.of(GOOD)) >= 20, whole
    assert sum(f.n_bytes for f in whole.found) == sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    values = run / "codes" / "values.bin"
    data = values.read_bytes()
    values.write_bytes(data[:100] + bytes([data[100] ^ 16]) + data[101:])
    (run / "explain" / "about.json").write_text("{")
    journal = run / "explain" / "journal.sqlite"
    connection = sqlite3.connect(journal)
    connection.execute("UPDATE results SET value = '1' WHERE feature = 3")
    connection.commit()
    connection.close()
    found = verify(run)
    assert sorted(Path(f.part).name for f in found.of(DAMAGED)) == [
        "about.json",
        "journal.sqlite",
        "values.bin",
    ]
    assert "damaged at byte 0 " in next(f.why for f in found.of(DAMAGED) if f.part.endswith("values.bin"))
    assert json.loads(json.dumps(found.to_json()))["counts"]["damaged"] == 3
    told = CliRunner().invoke(app, ["verify", str(run)])
    assert (
        told.exit_code == 1
        and "\ndamaged: " in told.output
        and "3 damaged, 0 without checksums" in told.output
    )


def test_verify_says_which_parts_do_not_belong_together_and_which_have_no_checksums(
    kinds: list[Stored], tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(kinds[0].folder, run)
    write_records(run / "records.jsonl", [], "another store")
    (found,) = verify(run).of(DAMAGED)
    assert "records.jsonl is of other codes than" in found.why
    (run / "records.sums.json").unlink()
    shutil.copytree(kinds[-1].folder, run / "explain")
    write_marker(run / "explain" / "job.json", {"key": "another", "job": {}, "features": []})
    (found,) = verify(run).of(DAMAGED)
    assert "journal.sqlite do not belong together" in found.why
    shutil.rmtree(run / "explain")
    unseal(run / "codes" / "codes.json")
    found = verify(run)
    assert found.good
    assert {Path(f.part).name for f in found.of(UNCHECKED)} == {
        "codes.json",
        *(p.name for p in (run / "codes").glob("*.bin")),
    }
