"""Records against brute force: what is on top, what is silent, what is similar, and that no split sees
another's documents.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from tiny import TINY_TEXTS

from featureinterp.codes.collect import collect
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.contents import hash_of, hashes_of
from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, check_documents
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import SPLITS, FeatureRecord, Window, levels
from featureinterp.errors import FeatureRangeError, InputError
from featureinterp.jobs.records import alive_features, parse_features, random_features
from featureinterp.sae.load import load_sae
from featureinterp.sae.neighbours import nearest_directions
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.files import write_records
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.projected import Learned, Whitening, projected_ranking
from featureinterp.sampling.quantile import quantile_order
from featureinterp.sampling.similar import SimilarWindows, window_embeddings
from featureinterp.sampling.splits import SplitAssigner
from featureinterp.sampling.top import top_order
from featureinterp.sampling.uniform import uniform_rows
from featureinterp.sampling.weighted import weighted_order
from featureinterp.subject.load import Subject


class HashEmbedder:
    """A deterministic embedder: normalised counts of hashed character trigrams."""

    fingerprint = "hash"
    calls = 0

    def embed(self, texts: list[str]) -> np.ndarray:
        self.calls += len(texts)
        out = np.full((len(texts), 24), 0.01, np.float32)
        for i, text in enumerate(texts):
            for k in range(len(text) - 2):
                out[i, sum(map(ord, text[k : k + 3])) % 24] += 1
        return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def embeddings(store: CodesStore, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    found = np.array(window_embeddings(store.windows, HashEmbedder(), tmp_path_factory.mktemp("e")))
    found += np.random.default_rng(0).normal(scale=1e-2, size=found.shape)  # equal texts would be ties
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def built(store: CodesStore, embeddings: np.ndarray) -> list[FeatureRecord]:
    policy = RecordPolicy(
        {
            "top": (3, 3, 3),
            "similar_negative": (2, 2, 2),
            "weighted": (2, 1, 1),
            "quantile": (1, 1, 1),
            "random_negative": (2, 2, 2),
            "random": (1, 1, 1),
        }
    )
    return list(RecordBuilder(store, policy, SimilarWindows(embeddings)).build(range(store.n_features)))


def test_activations_are_the_stores(built: list[FeatureRecord], store: CodesStore):
    for record in built:
        for split in SPLITS:
            for window in record.windows(split):
                whole = store.window_activations(record.feature.index, [window.row])[0]
                np.testing.assert_array_equal(
                    window.activations, whole[window.start : window.start + len(window.pieces)]
                )
                assert window.document == store.windows.documents[window.row]
                assert (
                    window.pieces
                    == store.windows.pieces(window.row)[window.start : window.start + len(window.pieces)]
                )


def test_splits_share_no_window_and_no_document(built: list[FeatureRecord]):
    for record in built:
        documents = [{w.document for w in record.windows(s)} for s in SPLITS]
        rows = [w.row for s in SPLITS for w in record.windows(s)]
        assert (
            not documents[0] & documents[1]
            and not documents[0] & documents[2]
            and not documents[1] & documents[2]
        )
        assert len(rows) == len(set(rows))


def test_a_record_that_leaks_cannot_be_made():
    def window(row: int, document: int, level: float = 0.0) -> Window:
        return Window(row, document, np.array([1]), ("a",), np.array([level], np.float32))

    with pytest.raises(AssertionError, match="document 7"):
        FeatureRecord(
            FeatureId("s", 0),
            1,
            1,
            1,
            {"train": {"top": (window(1, 7),)}, "test": {"random": (window(2, 7),)}},
        )
    with pytest.raises(AssertionError, match="fires"):
        FeatureRecord(FeatureId("s", 0), 1, 1, 1, {"test": {"random_negative": (window(1, 1, 0.5),)}})


def test_top_windows_fire_and_are_the_strongest(built: list[FeatureRecord], store: CodesStore):
    for record in built:
        maxima = store.window_activations(record.feature.index, range(len(store.windows))).max(1)
        top = [w for s in SPLITS for w in record.get(s, "top")]
        assert all(w.fires for w in top)
        firing = np.sort(maxima[maxima > 0])[::-1]
        if len(top) == 9 and len({w.document for w in top}) == 9:
            assert min(w.max_activation for w in top) >= firing[min(len(firing) - 1, 40)]
        if len(firing) == 0:
            assert not top and "train/top" in record.shortfalls
        strength = [
            np.mean([w.max_activation for w in record.get(s, "top")])
            for s in SPLITS
            if len(record.get(s, "top")) == 3
        ]
        if len(strength) == 3:
            assert max(strength) <= 2 * min(strength)
        assert record.scale == pytest.approx(maxima.max(), rel=1e-6)
        assert record.density == pytest.approx(record.count / store.n_scored)


def test_negatives_are_silent_and_similar_ones_are_the_most_similar(
    built: list[FeatureRecord], store: CodesStore, embeddings: np.ndarray
):
    for record in built:
        if not record.count:
            continue
        maxima = store.window_activations(record.feature.index, range(len(store.windows))).max(1)
        firing = np.flatnonzero(maxima > 0)
        query_rows = firing[np.argsort(-maxima[firing], kind="stable")][:400]
        mean_cosine = (embeddings @ embeddings[query_rows].T).mean(1)
        found = [w.row for s in SPLITS for w in record.get(s, "similar_negative")]
        assert all(maxima[row] == 0 for row in found)
        top_documents = {w.document: s for s in SPLITS for w in record.get(s, "top")}
        texts = {w.token_ids.tobytes() for s in SPLITS for w in record.get(s, "top")}
        # replay: by descending similarity, silent, of an unused text, in the split of its document with room
        # left
        room, split_of, expected = dict.fromkeys(SPLITS, 2), dict(top_documents), []
        for row in np.argsort(-mean_cosine, kind="stable").tolist():
            document = int(store.windows.documents[row])
            text = store.windows.ids(row).tobytes()
            if maxima[row] > 0 or not any(room.values()) or text in texts:
                continue
            split = split_of.setdefault(document, max(SPLITS, key=room.__getitem__))
            if room[split]:
                room[split] -= 1
                expected.append(row)
                texts.add(text)
        np.testing.assert_allclose(np.sort(mean_cosine[found]), np.sort(mean_cosine[expected]), atol=1e-6)


def test_faiss_ranks_exactly_like_brute_force(embeddings: np.ndarray):
    index = SimilarWindows(embeddings)
    query = index.query(np.array([5, 2, 9]))
    exact = np.sort((embeddings @ embeddings[[2, 5, 9]].T).mean(1))[::-1]
    rows = list(index.ranking(query, index.search(query[None], 4)[0]))
    assert sorted(rows) == list(range(len(embeddings)))
    np.testing.assert_allclose((embeddings @ query)[rows], exact, atol=1e-6)


def test_windows_are_embedded_once(store: CodesStore, tmp_path: Path):
    embedder = HashEmbedder()
    first = window_embeddings(store.windows, embedder, tmp_path, chunk=7)
    second = window_embeddings(store.windows, embedder, tmp_path)
    assert embedder.calls == len(store.windows)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, HashEmbedder().embed(list(store.windows.texts())), atol=1e-6)
    assert not list(tmp_path.glob("*.part"))


def test_weighted_windows_are_weaker_centred_and_do_not_overlap(
    built: list[FeatureRecord], store: CodesStore
):
    seen = 0
    for record in built:
        weakest = min((w.max_activation for s in SPLITS for w in record.get(s, "top")), default=0)
        for split in SPLITS:
            for window in record.get(split, "weighted"):
                seen += 1
                whole = store.window_activations(record.feature.index, [window.row])[0]
                centres = [
                    p for p in np.flatnonzero(whole) if max(0, p - 10) == window.start and whole[p] < weakest
                ]
                assert centres and len(window.pieces) <= 21
    assert seen > 20


def test_weighted_sampling_has_the_probabilities_that_it_claims():
    values = np.array([1.0, 2.0, 3.0, 0.5])
    rng = np.random.default_rng(0)
    firsts = np.bincount([weighted_order(values, rng)[0] for _ in range(4000)], minlength=4)
    assert stats.chisquare(firsts, 4000 * values**2 / (values**2).sum()).pvalue > 1e-4
    pairs = [tuple(weighted_order(values, rng)[:2]) for _ in range(4000)]
    p = values**2 / (values**2).sum()
    expected = p[2] * p[1] / (1 - p[2])
    assert abs(sum(pair == (2, 1) for pair in pairs) / 4000 - expected) < 0.04


def test_top_windows_are_drawn_from_the_top_quantile_and_offered_by_rank():
    assert top_order(5, 5, 3, 1000, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]
    wide = top_order(100, 10_000, 3, 500, np.random.default_rng(0)).tolist()
    assert set(wide[:20]) == set(range(20)) and wide[20:] == list(range(20, 100))
    assert wide[:3] == sorted(wide[:3]) != [0, 1, 2]


def test_quantile_order_takes_bins_in_turn():
    maxima = np.array([0.05, 0.1, 0.95, 0.9, 0.5, 1.0])
    order = quantile_order(maxima, 1.0, 3, np.random.default_rng(0)).tolist()
    assert sorted(order) == list(range(6))
    assert (
        order[0] in (2, 3, 5)
        and order[1] == 4
        and order[2] in (0, 1)
        and order[3] in (2, 3, 5)
        and order[4] in (0, 1)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=60, unique_by=lambda t: t[0]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_splits_never_share_a_document(rows: list[tuple[int, int]], a: int, b: int, c: int):
    documents = np.zeros(41, np.int64)
    for row, document in rows:
        documents[row] = document
    contents = [row % 13 for row in range(41)]
    assigner = SplitAssigner(documents.tolist(), contents)
    seen: dict[int, str] = {}
    texts: list[int] = []
    for offered in ([r for r, _ in rows], [r for r, _ in reversed(rows)]):
        taken = assigner.take(offered, {"train": a, "valid": b, "test": c})
        for split, chosen in taken.items():
            assert len(chosen) <= {"train": a, "valid": b, "test": c}[split]
            texts += [contents[row] for row in chosen]
            for row in chosen:
                assert seen.setdefault(int(documents[row]), split) == split
    assert len(texts) == len(set(texts))


HEADER = "The ports were opened. In 1849 the treaty of peace was signed"


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory, subject: Subject, sae_folder: Path) -> CodesStore:
    """Documents under a common header, half of which are there twice: most windows have the text of
    another.
    """
    folder = tmp_path_factory.mktemp("repeated")
    rng = np.random.default_rng(0)
    texts = [
        HEADER + " ".join(TINY_TEXTS[j] for j in rng.integers(len(TINY_TEXTS), size=3)) for _ in range(40)
    ]
    corpus = Corpus("repeated", lambda: (Document(str(i), texts[i % 30]) for i in range(60)), 60)
    return collect(subject, load_sae(str(sae_folder)), corpus, folder / "run", WindowPolicy(8, 4))


def test_windows_of_the_same_text_are_one(repeated: CodesStore):
    windows = repeated.windows
    texts = [windows.ids(row).tobytes() for row in range(len(windows))]
    assert [windows.contents[i] == windows.contents[0] for i in range(len(windows))] == [
        t == texts[0] for t in texts
    ]
    assert len(np.unique(windows.contents)) == len(set(texts)) < len(texts) / 2
    policy = RecordPolicy(
        {"top": (5, 5, 5), "weighted": (4, 4, 4), "random": (5, 5, 5), "random_negative": (5, 5, 5)},
        half_width=2,
    )
    short = 0
    for record in RecordBuilder(repeated, policy).build(range(repeated.n_features)):
        shown = [w.token_ids.tobytes() for split in SPLITS for w in record.windows(split)]
        assert len(shown) == len(set(shown))
        whole = [texts[w.row] for split in SPLITS for w in record.windows(split)]
        assert len(whole) == len(set(whole))
        for place, why in record.shortfalls.items():
            split, source = place.split("/")
            assert why.startswith(f"{len(record.get(split, source))} of ")
            short += "different texts" in why
    assert short


def test_equal_tokens_have_equal_hashes_and_others_do_not():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (4000, 6)).astype(np.int32)
    ends = rng.integers(1, 7, 4000)
    tokens[np.arange(6) >= ends[:, None]] = -1
    keys = [row.tobytes() for row in tokens]
    groups: dict[bytes, set[int]] = {}
    for key, value in zip(keys, hashes_of(tokens).tolist(), strict=True):
        groups.setdefault(key, set()).add(value)
    assert all(len(found) == 1 for found in groups.values())
    assert len({value for found in groups.values() for value in found}) == len(groups) > 700
    short = tokens[ends == 3][:1]
    assert hash_of(short)[0] == hash_of(short[:, :3])[0]


def test_a_text_in_two_splits_cannot_be_made_into_a_record():
    def window(row: int, ids: list[int]) -> Window:
        return Window(row, row, np.array(ids), tuple("ab"), np.zeros(2, np.float32))

    with pytest.raises(AssertionError, match="text .* is in both train and test"):
        FeatureRecord(
            FeatureId("s", 0),
            1,
            1,
            1,
            {"train": {"random": (window(1, [4, 5]),)}, "test": {"random": (window(2, [4, 5]),)}},
        )


def test_too_few_documents_for_the_splits_are_named_as_the_cause(
    tmp_path: Path, subject: Subject, sae_folder: Path
):
    corpus = Corpus("book.txt", lambda: iter([Document("0", " ".join(TINY_TEXTS * 3))]), 1)
    one = collect(subject, load_sae(str(sae_folder)), corpus, tmp_path, WindowPolicy(8, 4))
    with pytest.raises(
        InputError, match=r"of book.txt are read as 1 document, and 3 are needed .*--document-separator"
    ):
        RecordBuilder(one, RecordPolicy({"top": (1, 1, 1)}))
    assert next(RecordBuilder(one, RecordPolicy({"random": (2, 0, 0)})).build([0])).get("train", "random")
    with pytest.raises(InputError, match="are read as 1 document"):
        check_documents(one.windows, 3, at_least=one.windows.n_tokens)
    check_documents(one.windows, 3, at_least=one.windows.n_tokens + 1)


def test_uniform_rows_are_a_permutation():
    for n in (5, 5000):
        assert sorted(uniform_rows(n, np.random.default_rng(0))) == list(range(n))
    firsts = [next(iter(uniform_rows(4, np.random.default_rng(s)))) for s in range(2000)]
    assert stats.chisquare(np.bincount(firsts, minlength=4)).pvalue > 1e-4


def test_levels_at_the_edges():
    assert levels(np.array([0.0, 0.999, 1.0, 1.999, 4.999, 5.0, 9.0]), 5.0) == [0, 0, 1, 1, 4, 5, 5]
    assert levels(np.array([1.0]), 0.0) == [0]
    assert levels(np.float32([0.6, 0.2]), float(np.float32(1.0))) == [3, 1]


def test_the_same_seed_gives_the_same_record(store: CodesStore, embeddings: np.ndarray):
    def rows(seed: int) -> list[int]:
        record = next(RecordBuilder(store, RecordPolicy(seed=seed), SimilarWindows(embeddings)).build([3]))
        return [w.row for s in SPLITS for w in record.windows(s)]

    assert rows(1) == rows(1) != rows(2)


def test_choosing_features(store: CodesStore):
    assert parse_features("0:3, 7,7,5", store) == [0, 1, 2, 7, 5]
    assert parse_features("62:", store) == [62, 63]
    alive = alive_features(store)
    assert set(parse_features("random:5", store)) <= set(alive.tolist())
    assert len(set(random_features(store, 5, seed=1))) == 5
    for wrong in (
        "x",
        "3:2",
        "",
        "random:x",
        ",",
        "1_0",
        "٣",
        "+3",
        "3 4",
        "0:1_0",
        "٠:٣",
        "random:1_0",
        "random:",
        "9" * 5000,
        "3.0",
        "0x3",
    ):
        with pytest.raises(InputError):
            parse_features(wrong, store)
    for wrong in ("0:65", "64", "-1"):
        with pytest.raises(FeatureRangeError):
            parse_features(wrong, store)
    with pytest.raises(InputError, match="asked for"):
        random_features(store, 1000, seed=0)


def test_naming_all_features_again_and_again_takes_no_memory(store: CodesStore):
    import tracemalloc

    text = ",".join(["0:", "alive"] * 2000)
    parse_features("0:,alive", store)
    tracemalloc.start()
    assert len(parse_features(text, store)) == store.n_features
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, (
        peak
    )  # a list of all that is named would take 2.0 MB for the 64 features, and 2 GB for 64,000


def test_policies_that_need_embeddings_say_so(store: CodesStore):
    with pytest.raises(InputError, match="embeddings"):
        RecordBuilder(store, RecordPolicy())
    with pytest.raises(InputError, match="no kind of window .best."):
        RecordPolicy({"best": (1, 1, 1)})


def test_records_on_disk(built: list[FeatureRecord], tmp_path: Path):
    assert write_records(tmp_path / "r.jsonl", built[:3]) == 3
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [r["feature"] for r in rows] == [0, 1, 2]
    assert rows[0]["splits"]["test"]["top"] == [
        [w.row, w.start, len(w.pieces), round(w.max_activation, 6)] for w in built[0].get("test", "top")
    ]


def mean_cosine(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (unit @ unit[rows].T).mean(1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_whitening_is_the_inverse_root_of_the_shrunk_covariance(seed: int, n: int, k: int):
    rng = np.random.default_rng(seed)
    d, shrinkage = 10, 0.1
    x = rng.normal(size=(60, d)) * np.linspace(0.1, 2, d) + rng.normal(size=d)
    positives = np.sort(rng.permutation(60)[:n])
    inside = x[positives] - x[positives].mean(0)
    values, vectors = np.linalg.eigh(inside.T @ inside / max(n - 1, 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    told_apart = min(k, max(n - 1, 0), d)
    ridge = shrinkage * values.sum() / d
    flat = ridge + (values[told_apart:].sum() / max(d - told_apart, 1))
    variances = np.full(d, flat)
    variances[:told_apart] = np.maximum(values[:told_apart] + ridge, flat)
    covariance = vectors @ np.diag(variances) @ vectors.T if n > 1 else np.eye(d)
    expected = mean_cosine(x @ np.real(linalg.inv(linalg.sqrtm(covariance))), positives)
    found = Whitening.fit(x[positives], n_directions=k, shrinkage=shrinkage).similarity(
        x.astype(np.float32), positives
    )
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_projections_find_what_a_features_windows_agree_in():
    """The windows agree in one coordinate and differ widely in twenty; close misses agree in it, too, and
    others are near by chance.
    """
    rng = np.random.default_rng(0)
    x = np.concatenate([np.zeros((300, 1)), rng.normal(size=(300, 20)), rng.normal(size=(300, 3)) * 0.05], 1)
    x[:60, 0] = x[280:, 0] = 0.7
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    positives, misses = np.arange(60), set(range(280, 300))
    plain = np.argsort(-mean_cosine(x, positives))
    hits = {"plain": len(misses & set(plain[plain >= 60][:20].tolist()))}
    for kind in ("closed-form", "info-nce"):
        order = np.array(
            list(projected_ranking(x, positives, kind, np.random.default_rng(1), np.arange(60, 280)))
        )
        assert sorted(order.tolist()) == list(range(300))
        hits[kind] = len(misses & set(order[order >= 60][:20].tolist()))
    assert min(hits["closed-form"], hits["info-nce"]) >= 2 * hits["plain"], hits


def test_a_learned_projection_of_too_few_windows_changes_nothing():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    assert np.array_equal(Learned.fit(x[:1], x).matrix, np.eye(4)) and np.array_equal(
        Learned.fit(x, x[:0]).matrix, np.eye(4)
    )
    assert np.array_equal(Learned.fit(x, x, seed=3).matrix, Learned.fit(x, x, seed=3).matrix)


def test_nearest_directions_equal_a_plain_loop():
    decoder = torch.randn(30, 6) * torch.rand(30, 1) * 5
    indices, cosines = nearest_directions(decoder, [4, 0, 29], 5)
    for row, feature in enumerate([4, 0, 29]):
        all_cosines = [
            -9.0
            if i == feature
            else float(torch.nn.functional.cosine_similarity(decoder[feature], decoder[i], dim=0))
            for i in range(30)
        ]
        assert indices[row].tolist() == np.argsort(-np.array(all_cosines))[:5].tolist()
        np.testing.assert_allclose(cosines[row], np.sort(all_cosines)[::-1][:5], atol=1e-5)
    assert nearest_directions(decoder[:3], [1], 5)[0].shape == (1, 2) and nearest_directions(decoder, [], 5)[
        0
    ].shape == (0, 5)


def test_co_active_windows_are_silent_and_their_neighbours_fire(store: CodesStore):
    neighbours = {i: ([(i + 1) % 64, (i + 7) % 64, (i + 9) % 64], [0.9, 0.5, -0.4]) for i in range(64)}
    policy = RecordPolicy({"top": (2, 2, 2), "coactive_negative": (2, 2, 2)})
    n_found = 0
    everything = {i: store.window_activations(i, range(len(store.windows))).max(1) for i in range(64)}
    for record in RecordBuilder(store, policy, neighbours=neighbours.__getitem__).build(range(64)):
        feature = record.feature.index
        found = [w.row for s in SPLITS for w in record.get(s, "coactive_negative")]
        n_found += len(found)
        strength = np.zeros(len(store.windows))
        for other, cosine in zip(*neighbours[feature], strict=True):
            if cosine > 0 and everything[other].max() > 0:
                strength = np.maximum(strength, cosine * everything[other] / everything[other].max())
        assert all(everything[feature][row] == 0 and strength[row] > 0 for row in found)
        left_out = (everything[feature] == 0) & (strength > (max(strength[found]) if found else 0) + 1e-6)
        taken_documents = {
            int(store.windows.documents[w.row]) for s in SPLITS for w in record.get(s, "top")
        } | {int(store.windows.documents[r]) for r in found}
        assert all(int(store.windows.documents[row]) in taken_documents for row in np.flatnonzero(left_out))
        assert len(found) == 6 or any("neighbours" in why for why in record.shortfalls.values())
    assert n_found > 50
    with pytest.raises(InputError, match="decoder"):
        RecordBuilder(store, policy)


def test_projected_windows_in_a_record(store: CodesStore, embeddings: np.ndarray):
    alive = [i for i in range(64) if 60 < store.counts()[i] < 3000][:4]
    for projection in ("closed-form", "info-nce"):
        policy = RecordPolicy(
            {"top": (2, 2, 2), "projected_similar_negative": (2, 2, 2), "projected_similar": (0, 1, 1)},
            projection=projection,
        )
        for record in RecordBuilder(store, policy, SimilarWindows(embeddings)).build(alive):
            found = [w for s in SPLITS for w in record.get(s, "projected_similar_negative")]
            assert found and not any(w.fires for w in found) and record.get("test", "projected_similar")
    with pytest.raises(InputError, match="closed-form, info-nce"):
        RecordPolicy(projection="pca")  # type: ignore[arg-type]
