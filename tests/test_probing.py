"""Probing against scikit-learn, plain slow loops, and values computed by hand."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.probing import (
    ActivationBuffer,
    annotate_features,
    as_columns,
    auroc_all,
    auroc_interval,
    auroc_null,
    auroc_vec,
    best_single_train_test,
    decode_eval,
    domain_f1,
    f1_interval,
    fit_logreg,
    fit_softmax,
    macro_auroc,
    p_values,
    runs_of,
    shift_rows,
    split_indices,
    standardize,
)
from featureinterp.probing.tensors import DenseMatrix, SparseMatrix, rank_sums

NAN = float("nan")


def random_codes(
    rng: np.random.Generator, n: int, f: int, density: float, levels: int, dtype: type = np.float32
) -> np.ndarray:
    """Codes with heavy ties, dead features and, by chance, full columns."""
    codes = rng.integers(1, levels + 1, (n, f)) / levels * (rng.random((n, f)) < density)
    codes[:, rng.random(f) < 0.1] = 0
    return codes.astype(dtype)


def by_scikit_learn(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    out = np.full((codes.shape[1], labels.shape[1]), np.nan)
    for f, label in itertools.product(range(codes.shape[1]), range(labels.shape[1])):
        if 0 < labels[:, label].sum() < len(labels):
            out[f, label] = roc_auc_score(labels[:, label], codes[:, f].astype(np.float64))
    return out


FORMS = {
    "dense": lambda c: c,
    "fortran": np.asfortranarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "coo array": sp.coo_array,
    "torch": torch.from_numpy,
    "torch sparse": lambda c: torch.from_numpy(c).to_sparse(),
    "torch csr": lambda c: torch.from_numpy(c).to_sparse_csr(),
    "columns": as_columns,
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_auroc_is_that_of_scikit_learn(data: st.DataObject):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n = data.draw(st.one_of(st.integers(2, 40), st.integers(41, 3000), st.integers(3001, 100_000)))
    density, levels = (
        data.draw(st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0])),
        data.draw(st.sampled_from([1, 2, 7, 5000])),
    )
    codes = random_codes(
        rng,
        n,
        data.draw(st.integers(1, 5)),
        density,
        levels,
        data.draw(st.sampled_from([np.float16, np.float32, np.float64])),
    )
    labels = rng.random((n, data.draw(st.integers(1, 4)))) < data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    form = data.draw(
        st.sampled_from(
            [
                f
                for f in FORMS
                if codes.dtype != np.float16 or f in ("dense", "fortran", "torch", "torch sparse", "columns")
            ]
        )
    )
    np.testing.assert_allclose(
        auroc_all(FORMS[form](codes), labels), by_scikit_learn(codes, labels), rtol=0, atol=1e-9
    )


def test_auroc_of_many_tokens_and_features():
    rng = np.random.default_rng(0)
    n, f = 100_000, 700
    codes = sp.random(n, f, density=0.002, format="csc", random_state=rng, dtype=np.float32)
    codes.data = np.round(codes.data * 50 + 1).astype(np.float32)
    labels = rng.random((n, 3)) < [0.5, 0.01, 0.0001]
    found = auroc_all(codes, labels)
    for feature in (0, 255, 256, 699):
        column = codes[:, [feature]].toarray()
        np.testing.assert_allclose(found[[feature]], by_scikit_learn(column, labels), atol=1e-9)


def test_memory_grows_with_the_nonzeros_and_not_with_the_matrix():
    """20,000 × 40,000 codes: a dense column block of 1,000 features alone would take 80 MB."""
    rng = np.random.default_rng(0)
    rows, features = np.repeat(np.arange(20_000), 10), rng.integers(0, 40_000, 200_000)
    codes = as_columns(
        sp.csc_matrix(
            (rng.random(200_000).astype(np.float32) + 0.1, (rows, features)), shape=(20_000, 40_000)
        )
    )
    labels, fmax = rng.random((20_000, 2)) < 0.1, codes.maxima
    ids = [runs_of(labels[:, i]) for i in range(2)]
    for work in (lambda: auroc_all(codes, labels), lambda: domain_f1(codes, fmax, labels, ids)):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150 * len(codes.values) + 40_000 * 5 * 2 * 8 * 12, (
            "so many bytes per nonzero, and results by feature, threshold and label"
        )


def test_auroc_by_hand():
    codes = np.array([[0.0, 2.0], [1.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    labels = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    # feature 0, label 0: pairs (0,1) 0, (0,3) 0, (1,1) ½, (1,3) 0 of 4; label 1: (0,1) 0, (0,3) 0, (1,1) ½,
    # (1,3) 0. Feature 1, label 0: 0 0; ...
    np.testing.assert_allclose(auroc_all(codes, labels), [[0.125, 0.125], [0.5, 1.0]])


def test_auroc_where_it_is_undefined_and_what_is_refused():
    codes = np.eye(3, dtype=np.float32)
    assert np.isnan(auroc_all(codes, np.array([[True, False]] * 3))).all()
    assert (auroc_all(codes, np.ones((3, 1)), degenerate=0.5) == 0.5).all()
    with pytest.raises(InputError, match=r"the codes hold -1: .*nonlinearity"):
        auroc_all(-codes, np.ones((3, 1)))
    with pytest.raises(InputError, match="the codes hold nan"):
        auroc_all(codes * np.nan, np.ones((3, 1)))
    with pytest.raises(IncompatibleError, match="labels of 4 tokens and codes of 3"):
        auroc_all(codes, np.ones((4, 1)))
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        auroc_all(codes[0], np.ones((3, 1)))
    with pytest.raises(InputError, match="labels must be True or False"):
        auroc_all(codes, np.array([[0], [1], [2]]))


def test_explicit_zeros_and_entries_that_come_twice_change_nothing():
    rng = np.random.default_rng(1)
    codes = random_codes(rng, 50, 6, 0.3, 3)
    labels = rng.random((50, 2)) < 0.3
    expected = auroc_all(codes, labels)
    rows, columns = np.nonzero(np.ones_like(codes))
    full = sp.coo_matrix((codes.ravel(), (rows, columns)), shape=codes.shape)
    halves = sp.coo_matrix(
        (np.tile(codes.ravel() / 2, 2), (np.tile(rows, 2), np.tile(columns, 2))), shape=codes.shape
    )
    np.testing.assert_allclose(auroc_all(full, labels), expected)
    np.testing.assert_allclose(auroc_all(halves, labels), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 200))
def test_the_way_for_gpus_gives_the_same(seed: int, n: int):
    rng = np.random.default_rng(seed)
    codes, labels = random_codes(rng, n, 5, 0.3, 4), rng.random((n, 3)) < 0.4
    sums, positives = rank_sums(torch.from_numpy(codes), labels), labels.sum(0)
    assert sums is not None and rank_sums(-torch.from_numpy(codes + 1), labels) is None
    with np.errstate(invalid="ignore", divide="ignore"):
        np.testing.assert_allclose(
            sums / (positives * (n - positives)), by_scikit_learn(codes, labels), atol=1e-9
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=2, max_size=60))
def test_auroc_of_one_vector_of_any_sign(rows: list[tuple[float, bool]]):
    scores, labels = np.array([s for s, _ in rows]), np.array([y for _, y in rows])
    expected = roc_auc_score(labels, scores) if labels.any() and not labels.all() else NAN
    assert auroc_vec(scores, labels) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.1, 0.4, 0.9]))
def test_no_document_is_on_both_sides(n_documents: int, seed: int, fraction: float):
    rng = np.random.default_rng(seed)
    documents = rng.permutation(np.repeat(np.arange(n_documents) * 7, rng.integers(1, 30, n_documents)))
    if n_documents < 2:
        with pytest.raises(InputError, match="1 documents cannot be split"):
            split_indices(len(documents), fraction, seed, documents)
        return
    train, test = split_indices(len(documents), fraction, seed, documents)
    assert sorted([*train, *test]) == list(range(len(documents))) and len(train) and len(test)
    assert not set(documents[train]) & set(documents[test])
    again = split_indices(len(documents), fraction, seed, documents)
    assert (again[0] == train).all() and (again[1] == test).all()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=2, max_size=12), st.integers(0, 3)
)
def test_no_text_is_on_two_sides(documents: list[list[int]], seed: int):
    """Documents are lists of windows of two tokens each."""
    owners = np.repeat(np.arange(len(documents)), [2 * len(d) for d in documents])
    texts = np.repeat([t for d in documents for t in d], 2)
    try:
        train, test = split_indices(len(texts), 0.4, seed, owners, texts)
    except InputError:
        return
    assert not set(texts[train].tolist()) & set(texts[test].tolist()) and not set(
        owners[train].tolist()
    ) & set(owners[test].tolist())
    held_out = set(range(len(documents))) - set(owners[train].tolist())
    for i in held_out:
        assert all(j in held_out for j, d in enumerate(documents) if d == documents[i]), (
            "copies are on one side"
        )
    missing = np.setdiff1d(np.flatnonzero(~np.isin(owners, owners[train])), test)
    assert set(texts[missing].tolist()) <= set(texts[train].tolist()), "nothing else is left out"
    if len(np.unique(texts)) == sum(map(len, documents)):
        for mine, plain in zip((train, test), split_indices(len(texts), 0.4, seed, owners), strict=True):
            np.testing.assert_array_equal(mine, plain)


def test_a_split_of_tokens_has_the_share_that_was_asked_for():
    train, test = split_indices(1000, 0.4, 3)
    assert len(test) == 400 and len(train) == 600


def test_a_leak_between_documents_is_seen_only_where_documents_are_split():
    """Every document has a feature of its own and one label for all its tokens: a split of tokens lets a
    decoder learn the documents by heart.
    """
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(60), 20)
    codes = np.zeros((1200, 60), np.float32)
    codes[np.arange(1200), documents] = 1
    labels = (rng.random(60) < 0.5)[documents]
    found = {}
    for name, groups in (("tokens", None), ("documents", documents)):
        train, test = split_indices(1200, 0.4, 0, groups)
        decoder = fit_logreg(codes, labels, train, l2=0.01)
        found[name] = auroc_vec(decoder.predict(codes, test)[:, 0], labels[test])
    assert found["tokens"] > 0.99 and found["documents"] == pytest.approx(0.5, abs=0.02)


def test_the_best_of_ten_thousand_noise_features_is_worth_nothing_on_other_tokens():
    rng = np.random.default_rng(0)
    codes = sp.random(600, 10_000, density=0.1, format="csc", random_state=rng, dtype=np.float32)
    labels = rng.random((600, 40)) < 0.2
    best = best_single_train_test(codes, labels, seed=1)
    assert best.train.mean() > 0.57
    spread = 1.96 * best.test.std(ddof=1) / np.sqrt(40)
    assert abs(best.test.mean() - 0.5) < spread


def test_the_best_single_feature_is_the_planted_one_with_its_sign():
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.random((400, 2)) < 0.3, np.zeros((400, 1), bool)], axis=1)
    codes = random_codes(rng, 400, 30, 0.2, 10)
    codes[:, 7] = labels[:, 0] * rng.random(400)
    codes[:, 9] = ~labels[:, 1] * (0.5 + rng.random(400))
    split = split_indices(400, 0.4, 2)
    best = best_single_train_test(codes, labels, split=split)
    assert best.feature.tolist() == [7, 9, -1] and best.sign.tolist() == [1, -1, 0]
    for place, feature, sign in ((0, 7, 1), (1, 9, -1)):
        for rows, value in zip(split, (best.train, best.test), strict=True):
            assert value[place] == pytest.approx(
                roc_auc_score(labels[rows, place], sign * codes[rows, feature])
            )
    assert np.isnan(best.train[2]) and np.isnan(best.test[2])


def slow_f1(
    codes: np.ndarray, fmax: np.ndarray, mask: np.ndarray, ids: np.ndarray, thresholds: tuple[float, ...]
) -> list[tuple[float, float]]:
    """(best F1, its threshold) of every feature, token by token."""
    layers = ids[:, None] if ids.ndim == 1 else ids
    present = {int(i) for i in layers.ravel() if i >= 0}
    out = []
    for feature in range(codes.shape[1]):
        best, at = -1.0, NAN
        for t in thresholds:
            fires = [
                bool(fmax[feature] > 0 and float(codes[i, feature]) / float(fmax[feature]) > t)
                for i in range(len(codes))
            ]
            firing = sum(fires)
            hits = sum(f and bool(m) for f, m in zip(fires, mask, strict=True))
            met = {int(i) for f, row in zip(fires, layers, strict=True) if f for i in row if i >= 0}
            precision = hits / firing if firing else 0.0
            recall = len(met) / len(present) if present else NAN
            f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
            if f1 > best:
                best, at = f1, t
        out.append((best, at) if present else (NAN, NAN))
    return out


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_f1_is_that_of_a_plain_loop(data: st.DataObject):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, f, concepts = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    codes = random_codes(rng, n, f, 0.5, 10, data.draw(st.sampled_from([np.float16, np.float32])))
    fmax = rng.choice([0.0, 0.5, 0.77, 1.0, 3.0], f)
    depth = data.draw(st.sampled_from([None, 1, 2, 3]))
    shape = (n,) if depth is None else (n, depth)
    ids = [
        rng.choice(
            [-1, 0, 3, 17, 1000],
            shape,
            p=data.draw(st.sampled_from([[0.6, 0.1, 0.1, 0.1, 0.1], [1, 0, 0, 0, 0]])),
        )
        for _ in range(concepts)
    ]
    mask = np.stack([(i >= 0) if i.ndim == 1 else (i >= 0).any(1) for i in ids], axis=1) ^ (
        rng.random((n, concepts)) < 0.1
    )
    thresholds = data.draw(st.sampled_from([(0.15, 0.3, 0.5, 0.6, 0.8), (0.5,), (0.0, 0.1)]))
    found = domain_f1(codes, fmax, mask, ids, thresholds)
    for concept in range(concepts):
        expected = slow_f1(codes, fmax, mask[:, concept], ids[concept], thresholds)
        np.testing.assert_allclose(found.f1[:, concept], [e[0] for e in expected], atol=1e-12)
        np.testing.assert_array_equal(found.threshold[:, concept], [e[1] for e in expected])
    single = domain_f1(codes, fmax, mask[:, 0], ids[0], thresholds)
    np.testing.assert_array_equal(single.f1, found.f1[:, 0])
    np.testing.assert_array_equal(single.recall, found.recall[:, 0])


def test_f1_by_hand():
    codes = np.array([[1.0], [0.2], [0.0], [0.7], [0.0], [0.9]])
    ids = np.array([5, 5, 9, -1, 9, 9])
    found = domain_f1(codes, np.array([1.0]), ids >= 0, ids, thresholds=(0.15, 0.8))
    # above 0.15: tokens 0, 1, 3, 5 fire, three of them inside, both instances met: 2·.75/(1.75); above 0.8:
    # tokens 0 and 5, precision and recall 1
    assert (found.f1[0], found.threshold[0], found.precision[0], found.recall[0]) == (1.0, 0.8, 1.0, 1.0)
    assert found.curve[0].tolist() == [
        pytest.approx(2 * 0.75 / 1.75),
        1.0,
    ] and found.n_instances.tolist() == [2]
    with pytest.raises(IncompatibleError, match=r"maxima of shape \(2,\) for 1 features"):
        domain_f1(codes, np.ones(2), ids >= 0, ids)
    with pytest.raises(InputError, match="thresholds"):
        domain_f1(codes, np.ones(1), ids >= 0, ids, (0.5, 0.5))
    with pytest.raises(IncompatibleError, match="instance ids of shape"):
        domain_f1(codes, np.ones(1), ids >= 0, ids[:3])


def test_runs_become_instances_that_end_with_their_document():
    labelled = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
    assert runs_of(labelled).tolist() == [0, 0, -1, 1, 1, 1, -1, 2]
    assert runs_of(labelled, np.array([0, 0, 0, 0, 1, 1, 1, 2])).tolist() == [0, 0, -1, 1, 2, 2, -1, 3]


def test_shifts_turn_each_document_by_itself():
    rng = np.random.default_rng(0)
    documents = rng.permutation(np.repeat([4, 1, 9], [5, 1, 8]))
    seen = set()
    for _ in range(50):
        index = shift_rows(documents, 14, rng)
        assert (documents[index] == documents).all() and sorted(index) == list(range(14))
        for document in (4, 1, 9):
            rows = np.flatnonzero(documents == document)
            moved = np.searchsorted(rows, index[rows])
            assert ((np.diff(moved) % len(rows)) == 1 % len(rows)).all()
            seen.add((document, int(moved[0])))
    assert len(seen) == 14


def test_the_null_of_an_auroc_is_that_of_labels_shifted_by_hand():
    rng = np.random.default_rng(0)
    codes, labels, documents = (
        random_codes(rng, 80, 5, 0.4, 3),
        rng.random((80, 3)) < 0.3,
        np.repeat([0, 1], 40),
    )
    labels[:, 2] = False
    among = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]], bool)
    found = auroc_null(codes, labels, documents, among=among, n_shifts=7, seed=3)
    again = np.random.default_rng(3)
    for row in found:
        table = by_scikit_learn(codes, labels[shift_rows(documents, 80, again)])
        assert row[:2].tolist() == pytest.approx(
            [table[among[:, 0], 0].max(), table[among[:, 1], 1].max()]
        ) and np.isnan(row[2])
    assert p_values(np.array([0.0, 2.0, np.nan]), found[:, 0]).tolist() == pytest.approx(
        [1.0, 1 / 8, NAN], nan_ok=True
    )


def bursts(rng: np.random.Generator, n: int, f: int, length: int, share: float) -> np.ndarray:
    """Noise that comes in runs, as labels and features of text do."""
    starts = rng.random((n, f)) < share / length
    return np.asarray(np.stack([np.convolve(s, np.ones(length))[:n] > 0 for s in starts.T], axis=1))


@pytest.mark.parametrize("method", ["auroc", "domain_f1"])
def test_noise_gets_no_more_annotations_than_is_promised(method: str):
    """100 labels in all; each may be given by chance with probability alpha at most. The bound is the 99.9 %
    quantile of such a binomial: 13.
    """
    rng = np.random.default_rng(0)
    given_labels, beyond_threshold = 0, 0
    for trial in range(10):
        documents = np.repeat(np.arange(10), 60)
        labels = bursts(rng, 600, 10, 6, 0.05)
        codes = bursts(rng, 600, 150, 4, 0.3) * rng.random((600, 150))
        names = [str(i) for i in range(10)]
        found = annotate_features(
            codes,
            labels,
            names,
            0.5,
            min_f1=0.05,
            method=method,
            documents=documents,
            n_shifts=40,
            alpha=0.05,
            seed=trial,
        )
        given_labels += len({a.label for a in found})
        beyond_threshold += len(
            annotate_features(
                codes,
                labels,
                names,
                0.5,
                min_f1=0.05,
                method=method,
                documents=documents,
                alpha=None,
                seed=trial,
            )
        )
    assert given_labels <= 13 and beyond_threshold > 100


@pytest.mark.parametrize("method", ["auroc", "domain_f1"])
def test_planted_concepts_are_found_exactly(method: str):
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), 50)
    labels = bursts(rng, 2000, 6, 3, 0.06)
    codes = random_codes(rng, 2000, 120, 0.05, 1000)
    planted = {3: 0, 17: 1, 40: 2, 80: 3, 99: 4, 119: 5, 64: 2}
    for feature, label in planted.items():
        codes[:, feature] = (labels[:, label] & (rng.random(2000) < 0.95)) * (0.5 + rng.random(2000)) + (
            rng.random(2000) < 0.01
        )
    names = list("abcdef")
    found = annotate_features(codes, labels, names, method=method, documents=documents)
    assert {a.feature_id: names.index(a.label) for a in found} == planted
    _, test = split_indices(2000, seed=0, groups=documents)
    for a in found:
        label = names.index(a.label)
        assert a.n_positive == labels[test, label].sum() and a.p is not None and a.p <= 0.05
        if method == "auroc":
            assert (
                a.auroc == pytest.approx(roc_auc_score(labels[test, label], codes[test, a.feature_id]))
                and a.f1 is None
            )
        else:
            assert a.f1 is not None and a.f1 > 0.8 and a.threshold is not None and a.auroc is None


def test_annotations_refuse_what_cannot_be():
    codes, labels = np.eye(4), np.eye(4) > 0
    with pytest.raises(UnknownNameError, match="no method 'f2'"):
        annotate_features(codes, labels, list("abcd"), method="f2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a chance of 0\.05 cannot be seen in 10 shifts: use at least 19"):
        annotate_features(codes, labels, list("abcd"), n_shifts=10)
    with pytest.raises(IncompatibleError, match="3 names"):
        annotate_features(codes, labels, list("abc"))


def test_intervals_over_documents_are_wider_than_over_tokens():
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(30), 40)
    labels = np.repeat(rng.random(30) < 0.5, 40)
    scores = labels + np.repeat(rng.normal(0, 1, 30), 40) + rng.normal(0, 0.1, 1200)
    by_document, by_token = (
        auroc_interval(scores, labels, documents),
        auroc_interval(scores, labels, np.arange(1200)),
    )
    value = auroc_vec(scores, labels)
    assert (
        by_document
        and by_token
        and by_document.low < value < by_document.high
        and by_token.low < value < by_token.high
    )
    assert by_document.high - by_document.low > 3 * (by_token.high - by_token.low)
    assert auroc_interval(scores, labels) is None


def test_the_interval_of_f1_is_that_of_documents_drawn_by_hand():
    rng = np.random.default_rng(0)
    documents, fires = np.repeat(np.arange(12), 10), rng.random(120) < 0.3
    mask = bursts(rng, 120, 1, 3, 0.3)[:, 0]
    ids = runs_of(mask, documents)
    found = f1_interval(fires, mask, ids, documents, n_resamples=400, seed=5)
    draws = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=400)
    values = []
    for counts in draws:
        rows = np.concatenate(
            [np.tile(np.flatnonzero(documents == d), (k, 1)).reshape(-1) for d, k in enumerate(counts)]
        ).astype(int)
        again = np.concatenate([np.repeat(np.arange(k), 10) for k in counts])
        unique = {(int(i), int(c)) for i, c in zip(ids[rows], again, strict=True) if i >= 0}
        met = {
            (int(i), int(c)) for i, c, f in zip(ids[rows], again, fires[rows], strict=True) if f and i >= 0
        }
        precision, recall = (fires & mask)[rows].sum() / fires[rows].sum(), len(met) / len(unique)
        values.append(2 * precision * recall / (precision + recall) if recall else 0.0)
    assert found is not None and [found.low, found.high] == pytest.approx(
        np.percentile(values, [2.5, 97.5]).tolist()
    )


@pytest.mark.parametrize("form", ["dense", "csr", "torch", "torch sparse"])
def test_logistic_regression_is_that_of_scikit_learn(form: str):
    rng = np.random.default_rng(0)
    codes = random_codes(rng, 400, 12, 0.3, 50)
    labels = codes[:, :3] + 0.3 * rng.normal(size=(400, 3)) > 0.4
    train, test = split_indices(400, 0.4, 0)
    decoder = fit_logreg(FORMS[form](codes), labels, train, l2=0.05)
    mean, deviation = codes[train].mean(0), np.maximum(codes[train].std(0), 1e-6)
    for label in range(3):
        reference = LogisticRegression(C=1 / (0.05 * len(train)), tol=1e-10, max_iter=5000).fit(
            (codes[train] - mean) / deviation, labels[train, label]
        )
        expected = reference.decision_function((codes[test] - mean) / deviation)
        np.testing.assert_allclose(decoder.predict(FORMS[form](codes), test)[:, label], expected, atol=5e-3)


def test_softmax_regression_is_that_of_scikit_learn_and_the_bias_of_activations_does_no_harm():
    rng = np.random.default_rng(0)
    dense = (rng.normal(size=(500, 8)) * 3 + 5000 * (np.arange(8) == 2)).astype(
        np.float32
    )  # one input far from zero, as residual streams have
    classes = np.argmax(dense[:, :3] * [1, 1, 0] + rng.normal(size=(500, 3)), axis=1)
    decoder = fit_softmax(dense, classes, l2=0.1)
    x = (dense.astype(float) - dense.mean(0, dtype=float)) / dense.astype(float).std(0)
    reference = LogisticRegression(C=1 / (0.1 * 500), tol=1e-10, max_iter=5000).fit(x, classes)
    ours = decoder.predict(dense)
    expected = reference.decision_function(x)
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=5e-3
    )


def test_matrices_on_a_device_are_multiplied_as_on_the_cpu():
    rng = np.random.default_rng(0)
    codes, weights, slope = (
        random_codes(rng, 40, 7, 0.4, 9),
        rng.normal(size=(7, 2)),
        rng.normal(size=(40, 2)),
    )
    columns = as_columns(codes)
    sparse = SparseMatrix(columns.shape, columns.offsets, columns.rows, columns.values, torch.device("cpu"))
    np.testing.assert_allclose(sparse.apply(weights), codes @ weights, atol=1e-5)
    np.testing.assert_allclose(sparse.pull(slope), codes.T @ slope, atol=1e-5)
    dense = DenseMatrix(torch.from_numpy(codes), np.arange(5, 25))
    np.testing.assert_array_equal(DenseMatrix(codes, np.arange(5, 25)).matrix, dense.matrix)
    np.testing.assert_allclose(
        dense.apply(weights) + dense.offset @ weights, codes[5:25] @ weights, atol=1e-5
    )
    np.testing.assert_allclose(dense.deviation, codes[5:25].std(0), atol=1e-6)


def test_the_strength_of_the_penalty_is_chosen_on_held_out_documents():
    """Three true features among 300 of noise, and few documents: hardly any penalty learns the noise by
    heart.
    """
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(30), 10)
    labels = rng.random(300) < 0.4
    codes = random_codes(rng, 300, 300, 0.3, 100)
    for feature in range(3):
        codes[:, feature] = labels ^ (rng.random(300) < 0.3)
    train, test = split_indices(300, 0.4, 0, documents)
    chosen = fit_logreg(codes, labels, train, l2=(100.0, 1.0, 1e-6), groups=documents)
    weak = fit_logreg(codes, labels, train, l2=1e-6)
    assert chosen.l2 > 1e-6
    assert (
        auroc_vec(chosen.predict(codes, test)[:, 0], labels[test])
        > auroc_vec(weak.predict(codes, test)[:, 0], labels[test]) + 0.02
    )


def test_macro_auroc_counts_the_classes_that_are_there():
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.7, 0.6, 0.0], [0.1, 0.9, 0.0]])
    value, n = macro_auroc(scores, np.array([0, 1, 0, 1]))
    assert n == 2 and value == pytest.approx((1.0 + 1.0) / 2)
    value, n = macro_auroc(scores, np.array([0, 0, 0, 0]))
    assert np.isnan(value) and n == 0


def test_decoders_of_codes_and_their_dense_twin_side_by_side():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 100)
    dense = rng.normal(size=(300, 6)).astype(np.float16)
    dense[:, 0] += classes
    codes = np.maximum(rng.normal(size=(300, 20)), 0)
    codes[np.arange(300), classes] += 3
    found = decode_eval(codes, dense, classes, groups=np.tile(np.arange(20), 15), l2=0.01)
    assert (
        found["codes"]["accuracy"] > 0.95 > found["dense"]["accuracy"] > 0.4
        and found["codes"]["n_classes"] == 3
    )
    assert set(decode_eval(codes, None, classes, l2=0.01)) == {"codes"}
    with pytest.raises(IncompatibleError, match="classes of shape"):
        decode_eval(codes, dense, classes[:10])


def test_standardised_by_the_training_rows_alone():
    x = np.array([[1.0, 5.0], [3.0, 5.0], [100.0, 6.0]])
    assert standardize(x, [0, 1])[:2].tolist() == [[-1.0, 0.0], [1.0, 0.0]] and standardize(x, [0, 1])[
        2
    ].tolist() == [98.0, 1e6]


def test_columns_take_rows_and_select_features():
    rng = np.random.default_rng(0)
    codes = random_codes(rng, 30, 8, 0.4, 5)
    columns, rows = as_columns(codes), rng.permutation(30)[:11]
    np.testing.assert_array_equal(columns.take(rows).dense(np.arange(8)), codes[rows])
    np.testing.assert_array_equal(
        columns.select(np.array([3, 1, 3])).dense(np.arange(3)), codes[:, [3, 1, 3]]
    )
    np.testing.assert_array_equal(columns.maxima, codes.max(0))


def a_buffer() -> ActivationBuffer:
    rng = np.random.default_rng(0)
    codes, labels = random_codes(rng, 20, 5, 0.5, 4, np.float16), rng.random((20, 2)) < 0.4
    ids = {"näme": np.stack([runs_of(labels[:, 1]), np.full(20, -1)], axis=1)}
    return ActivationBuffer(
        codes,
        labels,
        ("years", "näme"),
        rng.normal(size=(20, 3)).astype(np.float16),
        ids,
        np.repeat([0, 3], 10),
    )  # type: ignore[arg-type]


def test_a_buffer_comes_back_as_it_was_saved(tmp_path: Path):
    buffer = a_buffer()
    buffer.save(tmp_path / "b.npz")
    again = ActivationBuffer.load(tmp_path / "b.npz")
    np.testing.assert_array_equal(again.codes.dense(np.arange(5)), buffer.codes.dense(np.arange(5)))
    for name in ("labels", "dense", "documents"):
        np.testing.assert_array_equal(getattr(again, name), getattr(buffer, name))
    assert (
        again.label_names == buffer.label_names
        and again.name_idx == {"years": 0, "näme": 1}
        and len(again) == 20
    )
    np.testing.assert_array_equal(again.instances_of("näme"), buffer.instances["näme"])
    np.testing.assert_array_equal(again.instances_of("years"), runs_of(buffer.labels[:, 0], buffer.documents))
    with np.load(tmp_path / "b.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_the_plain_files_of_others_are_read(tmp_path: Path):
    buffer = a_buffer()
    codes = buffer.codes.dense(np.arange(5)).astype(np.float32)
    np.savez(
        tmp_path / "o.npz",
        codes=codes,
        labels=buffer.labels.astype(np.uint8),
        label_names=np.array([b"a", b"b"]),
        dense=buffer.dense,
        inst_b=np.full(20, -1),
    )
    found = ActivationBuffer.load(tmp_path / "o.npz")
    assert (
        found.label_names == ("a", "b")
        and found.instances["b"].tolist() == [-1] * 20
        and found.documents is None
    )
    np.testing.assert_array_equal(found.codes.dense(np.arange(5)), codes)


class Danger:
    def __reduce__(self):
        return (Path("danger").touch, ())


def test_large_ids_of_documents_and_instances_stay_what_they_are():
    """Hashes, and other numbers that 32 bits cannot hold."""
    big = 2**31
    instances = np.array([big, big, -1, big + 7, -5, 2**62])
    documents = np.array([-(2**40), -(2**40), -3, 2**33, 2**33, 2**33 + 2**32])
    found = ActivationBuffer(
        np.eye(6), np.ones((6, 1)), ("a",), instances={"a": instances}, documents=documents
    )
    ids = found.instances["a"].tolist()
    assert ids[2] == ids[4] == -1 and ids[0] == ids[1] and len({ids[0], ids[3], ids[5]}) == 3
    assert min(ids[0], ids[3], ids[5]) >= 0
    assert found.documents is not None and len(set(found.documents.tolist())) == 4
    assert found.documents[0] == found.documents[1] and found.documents[3] == found.documents[4]


def test_a_buffer_never_unpickles_and_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    good = {"codes": np.eye(3), "labels": np.eye(3) > 0, "label_names": np.array(list("abc"))}
    np.savez("pickle.npz", **{**good, "label_names": np.array([Danger(), 1, 2], dtype=object)})
    np.savez("missing.npz", codes=good["codes"], labels=good["labels"])
    np.savez("twice.npz", **{**good, "label_names": np.array(list("aba"))})
    np.savez("names.npz", **{**good, "label_names": np.array(list("ab"))})
    np.savez("unknown.npz", **good, inst_z=np.zeros(3, int))
    np.savez("dense.npz", **good, dense=np.zeros((4, 2)))
    np.save("one.npy", good["codes"])
    a_buffer().save("own.npz")
    held = dict(np.load("own.npz"))
    np.savez("outside.npz", **{**held, "codes_rows": held["codes_rows"] + 15})
    np.savez("offsets.npz", **{**held, "codes_offsets": held["codes_offsets"][::-1]})
    np.savez("same.npz", **{**held, "codes_rows": np.zeros_like(held["codes_rows"])})
    Path("text.npz").write_text("not a zip")
    Path("cut.npz").write_bytes(Path("own.npz").read_bytes()[:500])
    for name, error, message in (
        ("pickle.npz", InputError, "'label_names' of pickle.npz holds Python objects"),
        ("missing.npz", InputError, r"no array 'label_names' \(it has: codes, labels\)"),
        ("twice.npz", InputError, "'a' is there twice"),
        ("names.npz", IncompatibleError, r"2 label names for labels of shape \(3, 3\)"),
        ("unknown.npz", UnknownNameError, "instances of 'z', which is no label"),
        ("dense.npz", IncompatibleError, r"dense activations of shape \(4, 2\)"),
        ("one.npy", InputError, "holds one array"),
        ("outside.npz", InputError, "tokens outside the 20"),
        ("offsets.npz", InputError, "their offsets do not fit"),
        ("same.npz", InputError, "a token is there twice"),
        ("text.npz", InputError, "not a readable .npz file"),
        ("cut.npz", InputError, "not a readable .npz file"),
        ("none.npz", UnknownNameError, "there is no file none.npz"),
    ):
        with pytest.raises(error, match=message):
            ActivationBuffer.load(name)
    assert not Path("danger").exists()
