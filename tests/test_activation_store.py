"""Activation stores: rows are the model's, every row knows its token, what is cut off goes on, what is
incomplete is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markers import change_marker, unseal
from tiny import tokenizer

from featureinterp.codes.collect import SINK_FACTOR
from featureinterp.corpus.text import Corpus, Document, load_corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.errors import (
    DamagedStoreError,
    FeatureInterpError,
    IncompatibleError,
    IncompleteStoreError,
    InputError,
    StorageError,
    UnknownNameError,
)
from featureinterp.probing.splits import split_indices
from featureinterp.subject import reading
from featureinterp.subject.load import HubTokenizer, SkipFirst, Subject, load_subject
from featureinterp.training.batches import OnlineBatches, Share, StoreBatches
from featureinterp.training.extract import Extracted, ExtractSettings, extract, merge, window_splits
from featureinterp.training.merging import merge_stores
from featureinterp.training.store import ActivationStore, StoreWriter, shard_path

HOOK = "blocks.1.hook_resid_post"
POLICY = WindowPolicy(16, 4)


def filled(
    folder: Path, n: int, *, dtype: str = "float32", shard_rows: int = 7, d: int = 3
) -> ActivationStore:
    """A store of rows that say their own number."""
    writer = StoreWriter(folder, d, dtype, shard_rows=shard_rows)
    for a in range(0, n, 5):
        numbers = np.arange(a, min(n, a + 5))
        side = dict.fromkeys(("documents", "windows", "offsets", "tokens"), numbers)
        writer.append(numbers[:, None] + np.arange(d) / 10, **side)
    counts = {"n_tokens": n, "n_first": 0, "n_sinks": 0}
    return writer.finish(
        {
            "key": "k",
            "source": {},
            "part": {"number": 0, "of": 1},
            "counts": counts,
            "hook": HOOK,
            "model": {},
            "split": {},
        }
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, n: int, shard_rows: int, data: st.DataObject
):
    store = filled(tmp_path_factory.mktemp("s"), n, shard_rows=shard_rows)
    assert len(store) == n and len(store.shards) == -(-n // shard_rows)
    wanted = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    np.testing.assert_allclose(store.read(wanted), wanted[:, None] + np.arange(3) / 10, rtol=1e-6)
    assert store.tokens.tolist() == list(range(n))
    np.testing.assert_allclose(np.concatenate(list(store.blocks(4)))[:, 0], np.arange(n))
    assert not shard_path(store.folder, len(store.shards)).exists()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 50), st.integers(1, 11), st.integers(1, 4), st.integers(1, 10), st.sampled_from([1, 2]))
def test_an_epoch_has_every_row_once_and_any_place_can_be_gone_to(
    tmp_path_factory: pytest.TempPathFactory, n: int, shard_rows: int, mix: int, batch: int, world: int
):
    store = filled(tmp_path_factory.mktemp("s"), n, shard_rows=shard_rows)
    batch = min(n, batch) // world * world or world
    if batch > n:
        return
    whole = StoreBatches(store, batch, mix=mix, seed=3)
    stream = np.concatenate([whole.next() for _ in range(-(-2 * n // batch))])[:, 0]
    for epoch in range(2):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    shares = [StoreBatches(store, batch, mix=mix, seed=3, share=Share(r, world)) for r in range(world)]
    joint = np.concatenate([s.next() for s in shares])
    np.testing.assert_array_equal(joint[:, 0], stream[:batch])
    again = StoreBatches(store, batch, mix=mix, seed=3)
    again.next()
    cursor = json.loads(json.dumps(again.cursor))
    later = StoreBatches(store, batch, mix=mix, seed=3)
    later.seek(cursor)
    np.testing.assert_array_equal(later.next(), again.next())


def test_shards_are_mixed_and_epochs_differ(tmp_path: Path):
    store = filled(tmp_path, 4000, shard_rows=400)
    stream = StoreBatches(store, 400, mix=5, seed=0)
    first = stream.next()[:, 0]
    assert len(np.unique(first.astype(int) // 400)) == 5  # rows of all the shards that are mixed
    epoch = np.concatenate([first, *(stream.next()[:, 0] for _ in range(9))])
    assert not np.array_equal(epoch, np.concatenate([stream.next()[:, 0] for _ in range(10)]))
    alone = StoreBatches(store, 400, mix=1, seed=0).next()[:, 0]
    assert len(np.unique(alone.astype(int) // 400)) == 1


def test_a_batch_larger_than_the_store_or_not_divisible_is_refused(tmp_path: Path):
    store = filled(tmp_path, 20)
    with pytest.raises(InputError, match="larger than the store, which has 20"):
        StoreBatches(store, 21)
    with pytest.raises(InputError, match="cannot be divided among 2"):
        StoreBatches(store, 5, share=Share(0, 2))


def by_hand(subject: Subject, windows: WindowTable, row: int) -> tuple[np.ndarray, np.ndarray]:
    """A window's activations and which are scored, by a plain forward pass of the library."""
    ids = torch.from_numpy(windows.ids(row).astype(np.int64))[None]
    bos = [] if isinstance(subject.sink, SkipFirst) else [subject.sink.token_id]
    with torch.no_grad():
        full = subject.model(
            torch.cat([torch.tensor([bos], dtype=torch.int64), ids], 1), output_hidden_states=True
        ).hidden_states[2][0, len(bos) :]
    norms = full.float().norm(dim=-1)
    scored = norms <= SINK_FACTOR * norms.median()
    if not bos:
        scored[0] = False
    return full.float().numpy(), scored.numpy()


@pytest.mark.parametrize("bos", [True, False])
def test_rows_are_those_of_a_plain_forward_pass(
    tmp_path: Path, bos: bool, subject: Subject, corpus_file: Path
):
    if not bos:
        from tiny import make_subject_folder

        subject = load_subject(str(make_subject_folder(tmp_path / "m", "llama", bos=False)), dtype="float32")
    found = extract(
        subject,
        HOOK,
        load_corpus(str(corpus_file)),
        tmp_path / "a",
        POLICY,
        ExtractSettings(0.2, "float32", shard_rows=500),
    )
    assert found.test is not None and found.train is not None
    seen = set()
    for store in (found.train, found.test):
        for row in np.random.default_rng(0).choice(np.unique(store.windows), 12, replace=False):
            mine = np.flatnonzero(np.asarray(store.windows) == row)
            values, scored = by_hand(subject, found.windows, int(row))
            np.testing.assert_allclose(store.read(mine), values[scored], rtol=1e-4, atol=1e-5)
            assert store.offsets[mine].tolist() == np.flatnonzero(scored).tolist()
            assert store.tokens[mine].tolist() == found.windows.ids(int(row))[scored].tolist()
            assert set(store.documents[mine].tolist()) == {int(found.windows.documents[row])}
        documents = set(np.unique(store.documents).tolist())
        assert not documents & seen
        seen |= documents
    splits, lengths = window_splits(found.windows, ExtractSettings(0.2)), np.asarray(found.windows.lengths)
    n_tokens = int(lengths[splits >= 0].sum())  # what is held out and in training, too, is in neither
    counts = [s.meta["counts"] for s in (found.train, found.test)]
    assert sum(c["n_tokens"] for c in counts) == n_tokens
    assert len(found.train) + len(found.test) + sum(c["n_first"] + c["n_sinks"] for c in counts) == n_tokens
    assert (
        counts[1]["n_tokens"] == lengths[splits == 1].sum()
        and abs(lengths[splits != 0].sum() / lengths.sum() - 0.2) < 0.05
    )


def test_an_extraction_that_was_cut_off_goes_on(
    tmp_path: Path, subject: Subject, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus, wanted = load_corpus(str(corpus_file)), ExtractSettings(0.2, "float32", shard_rows=300)
    monkeypatch.setattr(reading, "CHUNK_TOKENS", 640)
    steps: list[int] = []
    whole = extract(
        subject,
        HOOK,
        corpus,
        tmp_path / "whole",
        POLICY,
        wanted,
        batch_tokens=128,
        progress=lambda done, total: steps.append(done),
    )
    calls = 0

    def cut(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls in (13, 29):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            extract(subject, HOOK, corpus, tmp_path / "cut", POLICY, wanted, batch_tokens=128, progress=cut)
        with pytest.raises(IncompleteStoreError, match="never finished"):
            ActivationStore.open(tmp_path / "cut" / "train")
    before = calls
    cut_again = extract(
        subject, HOOK, corpus, tmp_path / "cut", POLICY, wanted, batch_tokens=128, progress=cut
    )
    assert calls - before < len(steps) - 10  # what was done is not done again
    for a, b in ((whole.train, cut_again.train), (whole.test, cut_again.test)):
        assert a is not None and b is not None and a.meta == b.meta
        np.testing.assert_array_equal(np.concatenate(list(a.blocks())), np.concatenate(list(b.blocks())))
        for side in ("documents", "windows", "offsets", "tokens"):
            np.testing.assert_array_equal(getattr(a, side), getattr(b, side))
    calls = 100
    assert (
        extract(subject, HOOK, corpus, tmp_path / "cut", POLICY, wanted, progress=cut).folder
        == cut_again.folder
        and calls == 100
    )


def test_another_request_for_the_same_folder_is_refused(tmp_path: Path, subject: Subject, corpus_file: Path):
    corpus = load_corpus(str(corpus_file))
    extract(subject, HOOK, corpus, tmp_path, POLICY)
    with pytest.raises(
        IncompatibleError, match='hook "blocks.1.hook_resid_post" there, "blocks.0.hook_resid_post" asked for'
    ):
        extract(subject, "blocks.0.hook_resid_post", corpus, tmp_path, POLICY)
    with pytest.raises(IncompatibleError, match="settings seed 0 there, 1 asked for"):
        extract(subject, HOOK, corpus, tmp_path, POLICY, ExtractSettings(seed=1))


def test_parts_of_several_workers_are_merged_and_a_missing_one_is_not_overlooked(
    tmp_path: Path, subject: Subject, corpus_file: Path
):
    corpus = load_corpus(str(corpus_file))
    whole = extract(subject, HOOK, corpus, tmp_path / "whole", POLICY, ExtractSettings(0.2, shard_rows=400))
    folders = [tmp_path / f"part{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        extract(subject, HOOK, corpus, folder, POLICY, ExtractSettings(0.2, shard_rows=400, part=i, parts=3))
    with pytest.raises(IncompleteStoreError, match="part 1 of 3 is missing"):
        merge([folders[0], folders[2]], tmp_path / "no")
    with pytest.raises(InputError, match="named twice"):
        merge_stores([f / "train" for f in (*folders, folders[0])], tmp_path / "no")
    with pytest.raises(IncompatibleError, match="different extractions"):
        extract(
            subject,
            "blocks.0.hook_resid_post",
            corpus,
            tmp_path / "other",
            POLICY,
            ExtractSettings(0.2, part=1, parts=3),
        )
        merge([folders[0], tmp_path / "other", folders[2]], tmp_path / "no")
    with pytest.raises(
        IncompatibleError, match="different extractions"
    ):  # another split would put a document on both sides
        extract(
            subject, HOOK, corpus, tmp_path / "split", POLICY, ExtractSettings(0.2, part=1, parts=3, seed=1)
        )
        merge([folders[0], tmp_path / "split", folders[2]], tmp_path / "no")
    found = merge([folders[2], folders[0], folders[1]], tmp_path / "merged")
    for a, b in ((whole.train, found.train), (whole.test, found.test)):
        assert a is not None and b is not None and len(a) == len(b) and a.meta["counts"] == b.meta["counts"]
        order = [np.lexsort((s.offsets, s.windows)) for s in (a, b)]
        np.testing.assert_array_equal(np.asarray(a.tokens)[order[0]], np.asarray(b.tokens)[order[1]])
        np.testing.assert_allclose(a.read(order[0]), b.read(order[1]), rtol=2e-3, atol=2e-3)
    (shard_path(folders[1] / "train", 0)).unlink()
    with pytest.raises(IncompleteStoreError, match="is missing"):
        merge(folders, tmp_path / "again")


def test_what_is_damaged_is_refused(tmp_path: Path):
    store = filled(tmp_path / "s", 20)
    path = shard_path(store.folder, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(IncompleteStoreError, match="80 bytes instead of the 84"):
        ActivationStore.open(store.folder)
    path.unlink()
    with pytest.raises(IncompleteStoreError, match="shard-00001.bin is missing"):
        ActivationStore.open(store.folder)
    path.write_bytes(data)
    metadata = store.folder / "metadata.json"
    for change, error, message in (
        ({"dtype": "bfloat16"}, IncompatibleError, "dtype 'bfloat16'"),
        ({"n_rows": 21}, IncompleteStoreError, "contradicts itself"),
        ({"format": 9}, IncompleteStoreError, "another version"),
    ):
        written = metadata.read_bytes()
        change_marker(metadata, **change)
        with pytest.raises(error, match=message):
            ActivationStore.open(store.folder)
        metadata.write_bytes(written)
    metadata.write_text("{")
    with pytest.raises(IncompleteStoreError, match="no JSON"):
        ActivationStore.open(store.folder)
    with pytest.raises(UnknownNameError, match="no activation store"):
        ActivationStore.open(tmp_path / "nowhere")
    path.write_bytes(np.full(21, np.nan, np.float32).tobytes())
    metadata.write_bytes(written)
    with pytest.raises(DamagedStoreError, match=r"shard-00001.bin is damaged at byte 0: delete .* extract"):
        ActivationStore.open(store.folder).read(np.arange(20))
    unseal(metadata)
    with pytest.raises(FeatureInterpError, match="not finite"):
        ActivationStore.open(store.folder).read(np.arange(20))
    with pytest.raises(FeatureInterpError, match="not finite"):
        StoreBatches(ActivationStore.open(store.folder), 20).next()


def test_values_that_float16_cannot_hold_are_an_error_and_not_infinity(tmp_path: Path):
    writer = StoreWriter(tmp_path, 2, "float16", shard_rows=4)
    side = dict.fromkeys(("documents", "windows", "offsets", "tokens"), np.zeros(1, int))
    with pytest.raises(FeatureInterpError, match="float32"):
        writer.append(np.array([[1.0, 70_000.0]]), **side)
    assert writer.n_rows == 0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_shows_when_a_shard_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    writer = StoreWriter(tmp_path, 2, "float16", shard_rows=4)
    with pytest.raises(StorageError, match="disk is full"):
        writer.append(
            np.zeros((1, 2)), **dict.fromkeys(("documents", "windows", "offsets", "tokens"), np.zeros(1, int))
        )


def test_one_document_cannot_be_held_out(tmp_path: Path, subject: Subject):
    corpus = Corpus("one", lambda: iter([Document("a", "many words of one text, again and again " * 20)]), 1)
    with pytest.raises(InputError, match="--held-out 0"):
        extract(subject, HOOK, corpus, tmp_path / "a", POLICY)
    found = extract(subject, HOOK, corpus, tmp_path / "b", POLICY, ExtractSettings(0.0))
    assert found.test is None and found.train is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1.0}, "held-out share"),
        ({"dtype": "bfloat16"}, "no bfloat16"),
        ({"part": 2, "parts": 2}, "no part 2 of 2"),
        ({"shard_rows": 0}, "shards of 0"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        ExtractSettings(**change)


def test_online_batches_are_the_rows_of_a_store_in_bounded_memory(
    tmp_path: Path, subject: Subject, corpus_file: Path
):
    found = extract(
        subject, HOOK, load_corpus(str(corpus_file)), tmp_path, POLICY, ExtractSettings(0.2, "float32")
    )
    assert found.train is not None
    rows = np.unique(found.train.windows)
    stream = OnlineBatches(subject, HOOK, found.windows, rows, 64, buffer=512, batch_tokens=256)
    n = len(found.train)
    seen = [stream.next() for _ in range(n // 64)]
    assert stream._held is None or len(stream._held) < 512 + reading.CHUNK_TOKENS
    epoch, stored = np.concatenate(seen), found.train.read(np.arange(n))
    assert len(epoch) == n // 64 * 64
    known = {r.tobytes() for r in np.round(stored, 2)}
    assert np.mean([r.tobytes() in known for r in np.round(epoch, 2)]) > 0.95  # rounding differs by batch
    assert abs(epoch.mean() - stored.mean()) < 0.02 * stored.std()
    assert not np.array_equal(np.sort(epoch[:64, 0]), epoch[:64, 0])


def test_online_batches_go_on_from_any_place(
    subject: Subject, tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, "CHUNK_TOKENS", 256)
    found = extract(
        subject, HOOK, load_corpus(str(corpus_file)), tmp_path, POLICY, ExtractSettings(0.9, "float32")
    )
    assert found.train is not None
    rows = np.unique(found.train.windows)

    def fresh() -> OnlineBatches:
        return OnlineBatches(subject, HOOK, found.windows, rows, 48, buffer=200, batch_tokens=128, seed=4)

    stream = fresh()
    for _ in range(30):  # over the end of the epoch
        cursor = json.loads(json.dumps(stream.cursor))
        batch = stream.next()
        other = fresh()
        other.seek(cursor)
        np.testing.assert_array_equal(other.next(), batch)
    assert stream.cursor["epoch"] > 0
    with pytest.raises(InputError, match="smaller than a batch"):
        OnlineBatches(subject, HOOK, found.windows, rows, 64, buffer=32)


def test_only_what_is_held_out(tmp_path: Path, subject: Subject, corpus_file: Path):
    corpus = load_corpus(str(corpus_file))
    both = extract(subject, HOOK, corpus, tmp_path / "both", POLICY, ExtractSettings(0.2))
    found = extract(
        subject, HOOK, corpus, tmp_path / "test", POLICY, ExtractSettings(0.2, only_held_out=True)
    )
    assert found.train is None and found.test is not None and both.test is not None
    assert set(np.unique(found.test.windows)) == set(np.unique(both.test.windows))
    with pytest.raises(UnknownNameError, match="no extraction"):
        Extracted.open(tmp_path / "nowhere")


def words(seed: int, n: int = 60) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list("abcdefgh"), 4)) for _ in range(n))


def test_no_text_is_on_both_sides_of_the_split(tmp_path: Path, subject: Subject):
    header = words(0, 20)
    bodies = [words(i + 1) for i in range(30)]
    texts = [header + " " + body for body in [*bodies, *bodies[:20]]]
    corpus = Corpus("repeated", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts))
    found = extract(subject, HOOK, corpus, tmp_path, POLICY, ExtractSettings(0.2))
    assert found.train is not None and found.test is not None
    sides = [
        {found.windows.ids(int(row)).tobytes() for row in np.unique(store.windows)}
        for store in (found.train, found.test)
    ]
    assert sides[1] and not sides[0] & sides[1]
    twins = [{i, i + 30} for i in range(20)]
    for store in (found.train, found.test):
        documents = set(np.unique(store.documents).tolist())
        assert all(not twin & documents or twin <= documents for twin in twins)
    splits = window_splits(found.windows, ExtractSettings(0.2))
    n = int((splits == -1).sum())
    assert n and found.test.meta["split"]["n_repeated"] == n
    assert found.notes == [
        f"{n} windows of held-out documents have the text of training windows and are left out"
    ]
    kept = np.unique(np.concatenate([found.train.windows, found.test.windows]))
    np.testing.assert_array_equal(kept, np.flatnonzero(splits >= 0))


def test_splits_of_texts_that_differ_are_those_of_their_documents(tmp_path: Path):
    texts = [words(i) for i in range(20)]
    corpus = Corpus("different", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts))
    windows = build_windows(corpus, HubTokenizer(tokenizer()), POLICY, tmp_path / "w")
    expected = np.zeros(len(windows), np.int8)
    expected[split_indices(len(windows), 0.3, 5, np.asarray(windows.documents))[1]] = 1
    np.testing.assert_array_equal(window_splits(windows, ExtractSettings(0.3, seed=5)), expected)
    same = Corpus("same", lambda: (Document(str(i), texts[0]) for i in range(4)), 4)
    with pytest.raises(InputError, match="no document can be held out"):
        window_splits(
            build_windows(same, HubTokenizer(tokenizer()), POLICY, tmp_path / "s"), ExtractSettings(0.3)
        )
