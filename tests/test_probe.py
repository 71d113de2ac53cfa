"""The study of a run by labels: against scikit-learn on the held-out tokens, through the verb, on its page,
and beside explanations.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import HOOK
from sklearn.metrics import roc_auc_score
from test_cli import cli, refused
from test_probing import bursts, random_codes
from test_report import rendered
from tiny import make_subject_folder

import featureinterp as fi
from featureinterp.codes import dense as dense_module
from featureinterp.codes.collect import collect
from featureinterp.codes.dense import dense_twin
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.errors import DamagedStoreError, IncompatibleError, InputError
from featureinterp.probing import (
    ActivationBuffer,
    Annotation,
    RunTokens,
    domain_f1,
    load_labels,
    split_indices,
)
from featureinterp.probing.agreement import agreement_with, agreements
from featureinterp.probing.study import Study, StudySettings, study
from featureinterp.reports.probing import read_annotations, study_table, write_study
from featureinterp.sae.load import load_sae
from featureinterp.subject.load import Subject, load_subject

SETTINGS = StudySettings(n_shifts=40, top=3)


def planted() -> ActivationBuffer:
    """Three concepts: one with a feature of its own, one that a feature is silent on, one that is nowhere;
    and a dense twin that knows the first.
    """
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(30), 40).astype(np.int32)
    labels = np.concatenate([bursts(rng, 1200, 2, 3, 0.15), np.zeros((1200, 1), bool)], axis=1)
    codes = random_codes(rng, 1200, 40, 0.1, 100)
    codes[:, 5] = labels[:, 0] * (0.5 + rng.random(1200)) * (rng.random(1200) < 0.9)
    codes[:, 6] = ~labels[:, 1] * (0.5 + rng.random(1200))
    dense = rng.normal(size=(1200, 4)) + labels[:, :1] * 3
    return ActivationBuffer(
        codes, labels, ("plain", "absent", "<b>none</b>"), dense.astype(np.float32), {}, documents
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> Study:
    return study(planted(), SETTINGS)


def test_what_a_study_says_is_true_of_the_held_out_tokens(found: Study):
    buffer = planted()
    _, test = split_indices(1200, 0.4, 0, buffer.documents)
    codes = buffer.codes.dense(np.arange(40))
    plain, absent, none = found.concepts
    assert (
        plain.by_auroc[0].feature == 5
        and plain.by_auroc[0].sign == 1
        and absent.by_auroc[0].feature == 6
        and absent.by_auroc[0].sign == -1
    )
    assert (
        [len(c.by_auroc) for c in found.concepts] == [3, 3, 0]
        and none.undefined is not None
        and none.n_tokens == 0
    )
    for place, concept in enumerate((plain, absent)):
        for f in concept.by_auroc:
            assert f.auroc == pytest.approx(
                roc_auc_score(buffer.labels[test, place], f.sign * codes[test, f.feature])
            )
        assert (
            concept.n_test == buffer.labels[test, place].sum()
            and concept.n_tokens == buffer.labels[:, place].sum()
        )
        interval = concept.auroc_interval
        assert interval is not None and interval.low <= (concept.by_auroc[0].auroc or 0) <= interval.high
        assert (
            concept.auroc_null is not None
            and concept.auroc_null < (concept.by_auroc[0].auroc or 0)
            and concept.auroc_p == pytest.approx(1 / 41)
        )
    best, ids = plain.by_f1, buffer.instances_of("plain")[test]
    assert best is not None and best.feature == 5
    train = split_indices(1200, 0.4, 0, buffer.documents)[0]
    again = domain_f1(
        codes[test][:, [5]],
        codes[train][:, [5]].max(0),
        buffer.labels[test, 0],
        ids,
        thresholds=(best.threshold or 0,),
    )
    assert (best.f1, best.precision, best.recall) == pytest.approx(
        (again.f1[0], again.precision[0], again.recall[0])
    )
    assert plain.f1_interval is not None and plain.f1_interval.low <= (best.f1 or 0) <= plain.f1_interval.high
    assert (
        plain.codes_auroc is not None
        and plain.codes_auroc > 0.9
        and plain.dense_auroc is not None
        and plain.dense_auroc > 0.95
    )
    assert (
        absent.dense_auroc is not None and abs(absent.dense_auroc - 0.5) < 0.12 and none.dense_auroc is None
    )
    assert {(a.feature_id, a.label) for a in found.annotations} == {(5, "plain")}
    assert {a.auroc is None for a in found.annotations} == {True, False}, "by both methods"


def test_a_study_without_decoders_and_without_documents_is_possible():
    buffer = planted()
    bare = study(replace(buffer, dense=None, documents=None), replace(SETTINGS, decoders=False))
    assert (
        bare.concepts[0].codes_auroc is None
        and bare.concepts[0].auroc_interval is None
        and bare.n_documents == 1
    )
    with pytest.raises(InputError, match="0 features per concept"):
        StudySettings(top=0)


def repeated(seed: int = 0, n_documents: int = 40, length: int = 12) -> ActivationBuffer:
    """Noise that a decoder can learn by heart: every document stands there twice, and all begin with the same
    window.
    """
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.arange(n_documents), rng.permutation(n_documents)])
    rows = np.concatenate([np.r_[:4, 4 + d * length : 4 + (d + 1) * length] for d in of])  # of what differs
    n = 4 + n_documents * length
    texts = np.repeat(np.arange(1 + 2 * n_documents), [4, *[length // 2] * (2 * n_documents)])[rows]
    codes = random_codes(rng, n, 10, 0.3, 100)[rows]
    labels, dense = (rng.random((n, 1)) < 0.3)[rows], rng.normal(size=(n, n)).astype(np.float32)[rows]
    documents = np.repeat(np.arange(2 * n_documents), 4 + length)
    return ActivationBuffer(codes, labels, ("noise",), dense, {}, documents, texts)  # type: ignore[arg-type]


def test_what_is_learnt_by_heart_is_not_found_again_in_the_test():
    buffer = repeated()
    naive = study(replace(buffer, texts=None), StudySettings(n_shifts=20))
    assert (
        naive.concepts[0].dense_auroc is not None
        and naive.concepts[0].dense_auroc > 0.8
        and naive.n_repeated == 0
    )
    found = study(buffer, StudySettings(n_shifts=20))
    assert found.concepts[0].dense_auroc is not None and 0.35 < found.concepts[0].dense_auroc < 0.65
    train, test = split_indices(len(buffer), 0.4, 0, buffer.documents, buffer.texts)
    assert found.n_test == len(test) and found.n_repeated == len(buffer) - len(train) - len(test)
    n_held_out = len(np.unique(buffer.documents[np.setdiff1d(np.arange(len(buffer)), train)]))  # type: ignore[index]
    assert found.n_repeated == 4 * n_held_out, "the common window of every held-out document"


def test_copies_make_an_interval_no_narrower():
    buffer = repeated()
    assert buffer.groups is not None and len(np.unique(buffer.groups)) == 40
    assert {
        len(set(buffer.groups[buffer.texts == text].tolist())) for text in np.unique(buffer.texts)[1:]
    } == {1}  # type: ignore[call-overload]


def test_texts_are_kept_with_the_buffer(tmp_path: Path):
    buffer = repeated(n_documents=4)
    buffer.save(tmp_path / "b.npz")
    again = ActivationBuffer.load(tmp_path / "b.npz")
    assert again.texts is not None and again.texts.dtype == np.uint64
    np.testing.assert_array_equal(again.texts, buffer.texts)
    with pytest.raises(IncompatibleError, match="texts of shape"):
        replace(buffer, texts=np.arange(3))


def test_tables_page_and_what_reports_read(found: Study, tmp_path: Path):
    about = {
        "title": "<i>t</i>",
        "subtitle": "s",
        "facts": {"Labels": "<script>alert(1)</script>"},
        "codes": "abc",
    }
    page = write_study(
        tmp_path, found, {"plain": np.array([3, 9]), "absent": np.array([], int)}, about
    ).read_text()
    assert (
        "&lt;b&gt;none&lt;/b&gt;" in page
        and "<b>none</b>" not in page
        and "<script>" not in page
        and "http" not in page.replace("http-equiv", "")
    )
    rows = pyarrow.parquet.read_table(tmp_path / "concepts.parquet").to_pylist()
    assert [r["name"] for r in rows] == ["plain", "absent", "<b>none</b>"]
    assert (
        rows[0]["best_by_auroc_feature"] == 5
        and rows[0]["best_by_auroc_auroc"] == found.concepts[0].by_auroc[0].auroc
        and rows[2]["undefined"]
    )
    with (tmp_path / "features.csv").open() as file:
        assert [(int(r["feature_id"]), r["label"]) for r in csv.DictReader(file)] == [
            (a.feature_id, a.label) for a in found.annotations
        ]
    ranked = pyarrow.parquet.read_table(tmp_path / "concept_features.parquet").to_pylist()
    assert [(r["name"], r["rank"], r["feature"]) for r in ranked[:1]] == [("plain", 1, 5)] and len(
        ranked
    ) == 6
    annotations, positions = read_annotations(tmp_path, "abc")
    assert tuple(annotations) == found.annotations and positions["plain"].tolist() == [3, 9]
    assert read_annotations(tmp_path, "other codes") == ([], {}) and read_annotations(
        tmp_path / "nowhere", "abc"
    ) == ([], {})
    assert (tmp_path / "concepts.png").stat().st_size > 5000 and (tmp_path / "concepts.svg").exists()
    assert "plain" in study_table(found) and "&lt;b&gt;none" in study_table(found)
    (tmp_path / "labels.npz").write_bytes(b"x")
    with pytest.raises(
        DamagedStoreError, match="labels.npz is damaged.*run the same 'featureinterp probe' again"
    ):
        read_annotations(tmp_path, "abc")


def test_the_dense_twin_is_what_the_sae_read(
    tmp_path: Path, run: Path, store: CodesStore, subject: Subject, monkeypatch: pytest.MonkeyPatch
):
    found = dense_twin(store, tmp_path, lambda: subject, batch_tokens=64)
    rows = RunTokens(store)
    assert found.shape == (len(rows.positions), subject.d_model) and found.dtype == np.float32
    length = store.windows.length
    for row in (0, 5, len(store.windows) - 1):
        expected = subject.residual(torch.from_numpy(store.windows.ids(row).astype(np.int64))[None], HOOK)[
            0
        ].numpy()
        mine = np.flatnonzero(rows.positions // length == row)
        np.testing.assert_allclose(found[mine], expected[rows.positions[mine] % length], rtol=1e-4, atol=1e-5)

    def forbidden() -> Subject:
        raise AssertionError("nothing is missing")

    np.testing.assert_array_equal(dense_twin(store, tmp_path, forbidden), found)
    calls = []
    real = dense_module.positions_of

    def dies(*args: object) -> np.ndarray:
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("featureinterp.subject.reading.CHUNK_TOKENS", 128)
    monkeypatch.setattr(dense_module, "positions_of", dies)
    with pytest.raises(KeyboardInterrupt):
        dense_twin(store, tmp_path / "cut", lambda: subject, batch_tokens=64)
    done = json.loads((tmp_path / "cut" / "dense" / "dense.json").read_text())["next_window"]
    assert 0 < done < len(store.windows)
    monkeypatch.setattr(dense_module, "positions_of", lambda *a: calls.append(int(a[1].min())) or real(*a))
    calls.clear()
    np.testing.assert_allclose(
        dense_twin(store, tmp_path / "cut", lambda: subject, batch_tokens=64), found, rtol=1e-4, atol=1e-5
    )
    assert min(calls) >= done, "what was done is not done again"
    other = load_subject(str(make_subject_folder(tmp_path / "other", "gpt2")), dtype="float32")
    with pytest.raises(IncompatibleError, match="another model"):
        dense_twin(store, tmp_path / "other-run", lambda: other)


@pytest.fixture
def run_copy(tmp_path: Path, run: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_verb(run_copy: Path, subject_folder: Path, tmp_path: Path):
    labels = tmp_path / "l.toml"
    labels.write_text("months = 'March|May'\n'a <tag>' = 'Congress'\n")
    done = cli(
        "probe",
        str(run_copy),
        "--labels",
        str(labels),
        "--model",
        str(subject_folder),
        "--shifts",
        "30",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [c["name"] for c in found["concepts"]] == ["months", "a <tag>"] and all(
        c["dense_auroc"] is not None for c in found["concepts"]
    )
    assert {p.name for p in (run_copy / "probe").iterdir()} >= {
        "probe.html",
        "study.json",
        "labels.npz",
        "features.csv",
        "features.parquet",
        "concepts.png",
    }
    again = cli(
        "probe",
        str(run_copy),
        "--labels",
        str(labels),
        "--no-decoders",
        "--shifts",
        "30",
        "--out",
        str(tmp_path / "p"),
    )
    assert (
        again.returncode == 0
        and "months" in again.stdout
        and "Page: " in again.stdout
        and not (tmp_path / "p" / "dense").exists()
    )
    refused(cli("probe", str(run_copy), "--labels", "nothing"), "no labels 'nothing'")
    refused(cli("probe", str(run_copy), "--labels", str(labels), "--corpus", "sotu-2"), "sotu-2")
    refused(cli("probe", str(tmp_path / "nowhere")), "no run folder")
    refused(
        cli("probe", str(run_copy), "--labels", str(labels), "--no-decoders", "--shifts", "5"),
        "cannot be seen in 5 shifts",
    )


def test_a_run_of_repeated_documents(
    tmp_path: Path, subject: Subject, sae_folder: Path, subject_folder: Path
):
    header = "Trade with the islands grew; the harbour was deepened. " * 2
    rng = np.random.default_rng(0)
    bodies = [
        header
        + " ".join(rng.permutation(["March", "tax", "army", "peace", "May", "fleet", "ports", "door"] * 4))
        for _ in range(20)
    ]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*bodies, *bodies[:10]]))
    collect(
        subject, load_sae(str(sae_folder)), load_corpus(str(corpus)), tmp_path / "run", WindowPolicy(16, 8)
    )
    tokens = RunTokens(CodesStore.open(tmp_path / "run"))
    (tmp_path / "l.toml").write_text("months = 'March|May'\n")
    done = cli(
        "probe",
        str(tmp_path / "run"),
        "--labels",
        str(tmp_path / "l.toml"),
        "--no-decoders",
        "--shifts",
        "30",
    )
    assert done.returncode == 0, done.stderr
    train, test = split_indices(len(tokens.positions), 0.4, 0, tokens.documents, tokens.texts)
    n = len(tokens.positions) - len(train) - len(test)
    assert n > 0 and f"{n:,} tokens of held-out documents are left out" in done.stdout
    table, length = tokens.windows, tokens.windows.length
    sides = [
        {table.text(row) for row in np.unique(tokens.positions[side] // length).tolist()}
        for side in (train, test)
    ]
    assert all(sides) and not sides[0] & sides[1]
    corpus.rename(tmp_path / "renamed.jsonl")
    labels = load_labels(tmp_path / "l.toml")
    assert tokens.labelled(labels, load_corpus(str(tmp_path / "renamed.jsonl"))).n_spans == sum(
        t.count("March") + t.count("May") for t in bodies + bodies[:10]
    )
    (tmp_path / "renamed.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(IncompatibleError, match="give the same corpus"):
        tokens.labelled(labels, load_corpus(str(tmp_path / "renamed.jsonl")))


def test_labels_from_python(run_copy: Path, subject_folder: Path):
    def mark(text: str):
        start = text.find("army")
        while start >= 0:
            yield start, start + 4, "army"
            start = text.find("army", start + 1)

    found = fi.probe(run_copy, mark, dense=False, settings=fi.StudySettings(n_shifts=30, decoders=False))
    assert (
        [c.name for c in found.study.concepts] == ["army"]
        and found.n_spans > 0
        and "army" in found._repr_html_()
    )


def result_of(predicted: list[list[float]], activations: list[list[float]]) -> FeatureResult:
    windows = [
        ShownWindow("test", "top", row, "d", tuple("abcd"), tuple(a), tuple(p))
        for row, (a, p) in enumerate(zip(activations, predicted, strict=True))
    ]
    windows.append(ShownWindow("train", "top", 99, "d", tuple("abcd"), (1.0,) * 4))
    return FeatureResult(3, "s", 4.0, 0.01, 90, tuple(windows))


MONTHS = Annotation(3, "months", 0.97, None, 0.98, 20, None, 0.01)
LABELLED = np.array([1, 5, 9, 13])  # the second token of each of four windows of four
TRUE = [[0, 4, 0, 0]] * 4


def test_explanations_agree_or_disagree_with_annotations():
    agrees = agreement_with(result_of([[0, 5, 0, 1]] * 4, TRUE), MONTHS, LABELLED, 4)
    assert (
        agrees.verdict == "agrees"
        and agrees.predicted == 1.0
        and agrees.actual == 1.0
        and (agrees.n_tokens, agrees.n_labelled) == (16, 4)
    )
    disagrees = agreement_with(result_of([[5, 0, 0, 1]] * 4, TRUE), MONTHS, LABELLED, 4)
    assert disagrees.verdict == "disagrees" and disagrees.predicted == pytest.approx(
        (0.5 + 0.5 + 0) / 3, abs=0.2
    )
    unsure = agreement_with(result_of([[0, 5, 0, 1], [5, 0, 0, 1]] * 2, TRUE), MONTHS, LABELLED, 4)
    assert unsure.verdict == "unknown" and unsure.interval is not None and unsure.interval.low <= 0.5
    weak = agreement_with(result_of([[0, 3, 5, 5]] * 4, [[0, 0.2, 0, 0]] * 4), MONTHS, LABELLED, 4)
    assert weak.predicted == pytest.approx(1 / 3) and weak.verdict == "disagrees"
    assert (
        agreement_with(result_of([[0, 5, 0, 1]] * 4, TRUE), MONTHS, np.array([400]), 4).verdict == "unknown"
    )
    assert (
        agreement_with(result_of([[0, 5, 0, 1]] * 4, [[4, 0, 4, 4]] * 4), MONTHS, LABELLED, 4).verdict
        == "unknown"
    ), "nor does the feature itself"
    assert agreement_with(result_of([], []), MONTHS, LABELLED, 4).verdict == "unknown"
    by_f1 = Annotation(3, "months", None, 0.8, 0.9, 20, 0.5, 0.01)
    both = agreements([result_of([[0, 5, 0, 1]] * 4, TRUE)], [MONTHS, by_f1], {"months": LABELLED}, 4)
    assert [a.annotation for a in both[3]] == [MONTHS] and not agreements([result_of([], [])], [], {}, 4)


def test_the_report_says_where_they_disagree():
    result = result_of([[5, 0, 0, 1]] * 4, TRUE)
    bad = replace(MONTHS, label="<u>months</u>")
    shown = agreements([result], [bad], {"<u>months</u>": LABELLED}, 4)
    page = rendered([result], {"title": "t", "subtitle": "s", "facts": {}}, shown)
    assert (
        "it disagrees" in page
        and "AUROC 0.97" in page
        and "&lt;u&gt;months" in page
        and "<u>months" not in page
    )
    assert "by labels" not in rendered([result], {"title": "t", "subtitle": "s", "facts": {}})


def test_reports_take_annotations_from_the_run(run_copy: Path, tmp_path: Path):
    store = CodesStore.open(run_copy)
    feature = int(np.argmax(store.counts()))
    done = cli(
        "explain",
        str(run_copy),
        "--features",
        str(feature),
        "--explainer",
        "top-tokens",
        "--simulator",
        "lexical",
        "--no-questions",
        "--negatives",
        "random",
    )
    assert done.returncode == 0, done.stderr
    folder = next(run_copy.rglob("results.jsonl")).parent
    annotation = Annotation(feature, "made up", 0.9, None, 0.9, 5, None, 0.01)
    made = replace(study(planted(), replace(SETTINGS, decoders=False)), annotations=(annotation,))
    made = replace(made, concepts=tuple(replace(c, name="made up") for c in made.concepts[:1]))
    about = {"title": "t", "subtitle": "s", "facts": {}, "codes": store.fingerprint}
    write_study(
        run_copy / "probe", made, {"made up": np.asarray(store.feature(feature).positions, np.int64)}, about
    )
    assert cli("report", str(folder)).returncode == 0
    page = (folder / "report.html").read_text()
    assert "made up</b> by labels: AUROC 0.90" in page
    assert asdict(annotation)["feature_id"] == feature
