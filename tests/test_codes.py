"""The codes store against a dense brute force, and everything that can go wrong while it is written."""

from __future__ import annotations

import builtins
import errno
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_sae, make_subject_folder

from featureinterp.codes import collect as collect_module
from featureinterp.codes.collect import SINK_FACTOR, collect, scored_tokens
from featureinterp.codes.runs import RunWriter, feature_blocks, narrow_values
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import (
    FeatureRangeError,
    IncompatibleError,
    IncompleteStoreError,
    InputError,
    StorageError,
    UnknownNameError,
)
from featureinterp.sae.load import load_sae, save_sae
from featureinterp.subject import reading
from featureinterp.subject.load import Subject, load_subject

POLICY = WindowPolicy(16, 8)


def dense_codes(subject: Subject, sae_folder: Path, store: CodesStore) -> np.ndarray:
    """All codes by the plain way: window by window, every block run, dense: ``[window, token, feature]``."""
    sae = load_sae(str(sae_folder)).sae
    windows = store.windows
    out = np.zeros((len(windows), windows.length, sae.d_sae), np.float32)
    blocks: list[torch.Tensor] = []
    handle = subject.model.layers[1].register_forward_hook(
        lambda _m, _i, o: blocks.append(o if torch.is_tensor(o) else o[0])
    )
    for row in range(len(windows)):
        ids = torch.tensor([[0, *windows.ids(row).tolist()]])
        blocks.clear()
        with torch.no_grad():
            subject.model(ids)
        x = blocks[0][0, 1:]
        norms = x.norm(dim=1)
        codes = sae.encode(x).to_dense().numpy()
        codes[(norms > SINK_FACTOR * norms.median()).numpy()] = 0
        out[row, : len(codes)] = codes
    handle.remove()
    return out


def test_the_store_equals_the_plain_way(subject: Subject, sae_folder: Path, store: CodesStore):
    dense = dense_codes(subject, sae_folder, store)
    length = store.windows.length
    for feature in range(store.n_features):
        codes = store.feature(feature)
        column = dense[:, :, feature].reshape(-1)
        np.testing.assert_array_equal(codes.positions, np.flatnonzero(column))
        np.testing.assert_allclose(codes.values, column[column > 0], rtol=2e-3, atol=1e-6)
        assert store.scales[feature] == codes.values.max(initial=0)
    rows = [3, 0, len(store.windows) - 1]
    np.testing.assert_allclose(store.window_activations(5, rows), dense[rows, :, 5], rtol=2e-3, atol=1e-6)
    assert store.n_scored == store.windows.n_tokens - int(
        (dense.sum(2) == 0).sum() - (length * len(store.windows) - store.windows.n_tokens)
    )
    assert store.counts().tolist() == (dense > 0).sum((0, 1)).tolist()


def test_short_windows_are_part_of_it(store: CodesStore):
    lengths = np.asarray(store.windows.lengths)
    assert (lengths < 16).any() and (lengths >= 8).all()
    short = int(np.flatnonzero(lengths < 16)[0])
    assert not store.window_activations(0, [short])[0, lengths[short] :].any()


def test_batch_size_changes_nothing(
    tmp_path: Path, subject: Subject, sae_folder: Path, corpus_file: Path, store: CodesStore
):
    again = collect(
        subject, load_sae(str(sae_folder)), load_corpus(str(corpus_file)), tmp_path, POLICY, batch_tokens=48
    )
    np.testing.assert_array_equal(again.positions, store.positions)
    np.testing.assert_allclose(again.values.astype(float), store.values.astype(float), rtol=2e-3)


class Killed(BaseException):
    """Ends a process without giving it a chance to clean up what it has written."""


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_killed_collection_is_gone_on_with(
    tmp_path: Path,
    subject: Subject,
    sae_folder: Path,
    corpus_file: Path,
    store: CodesStore,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
):
    monkeypatch.setattr(reading, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(RunWriter.__init__, "__kwdefaults__", {"flush_nonzeros": 100})
    real, calls = collect_module.encode_windows, []

    def dies(*args: object) -> object:
        calls.append(args)
        if len(calls) > after:
            raise Killed
        return real(*args)

    sae, corpus = load_sae(str(sae_folder)), load_corpus(str(corpus_file))
    monkeypatch.setattr(collect_module, "encode_windows", dies)
    with pytest.raises(Killed):
        collect(subject, sae, corpus, tmp_path, POLICY, batch_tokens=64)
    with pytest.raises(IncompleteStoreError, match="unfinished"):
        CodesStore.open(tmp_path)
    done_runs = sorted((tmp_path / "codes" / "runs").iterdir())
    first = json.loads((done_runs[-1] / "run.json").read_text())["end_window"] if done_runs else 0
    starts = []
    monkeypatch.setattr(
        collect_module, "encode_windows", lambda *a: starts.append(int(a[3].min())) or real(*a)
    )
    found = collect(subject, sae, corpus, tmp_path, POLICY, batch_tokens=64)
    assert min(starts) >= first
    np.testing.assert_array_equal(found.positions, store.positions)
    np.testing.assert_array_equal(found.offsets, store.offsets)
    assert found.n_scored == store.n_scored
    assert not (tmp_path / "codes" / "runs").exists()


def test_a_finished_store_is_reused_without_running_the_model(
    run: Path, subject: Subject, sae_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collect_module, "encode_windows", lambda *_: pytest.fail("the model ran again"))
    collect(subject, load_sae(str(sae_folder)), load_corpus(str(corpus_file)), run, POLICY)


def test_codes_of_another_sae_or_model_are_not_replaced(
    tmp_path: Path, run: Path, subject: Subject, corpus_file: Path, sae_folder: Path
):
    shutil.copytree(run, tmp_path / "run")
    other = tmp_path / "other"
    save_sae(other, make_sae("relu", D_MODEL, 64), hook=HOOK, model="tiny")
    before = (tmp_path / "run" / "codes" / "codes.json").read_bytes()
    with pytest.raises(IncompatibleError, match="another SAE"):
        collect(subject, load_sae(str(other)), load_corpus(str(corpus_file)), tmp_path / "run", POLICY)
    changed = load_subject(str(make_subject_folder(tmp_path / "m", "llama")), dtype="bfloat16")
    with pytest.raises(IncompatibleError, match="go on there with --dtype float32"):
        collect(changed, load_sae(str(sae_folder)), load_corpus(str(corpus_file)), tmp_path / "run", POLICY)
    assert (tmp_path / "run" / "codes" / "codes.json").read_bytes() == before


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, subject: Subject, corpus_file: Path
):
    wide, far = tmp_path / "wide", tmp_path / "far"
    save_sae(wide, make_sae("topk", 48, 64), hook=HOOK, model="other")
    save_sae(far, make_sae("topk", D_MODEL, 64), hook="blocks.9.hook_resid_post", model="tiny")
    for folder, error in ((wide, IncompatibleError), (far, UnknownNameError)):
        with pytest.raises(error):
            collect(subject, load_sae(str(folder)), load_corpus(str(corpus_file)), tmp_path / "run", POLICY)
    with pytest.raises(InputError, match="float8"):
        collect(
            subject,
            load_sae(str(far)),
            load_corpus(str(corpus_file)),
            tmp_path / "run",
            POLICY,
            value_dtype="float8",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["positions.bin", "offsets.bin", "tokens.bin", "codes.json"])
def test_a_full_disk_leaves_nothing_that_passes_for_complete(
    tmp_path: Path,
    subject: Subject,
    sae_folder: Path,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
):
    real_open, real_write = Path.open, Path.write_bytes

    class Full:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    def opens(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        inner = real_open(self, mode, *args, **kwargs)
        return Full(inner) if "w" in mode and self.name == file else inner

    def writes(self: Path, data: bytes) -> int:
        if self.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(self, data)

    monkeypatch.setattr(Path, "open", opens)
    monkeypatch.setattr(Path, "write_bytes", writes)
    if file == "codes.json":
        monkeypatch.setattr(
            "featureinterp.files.os.replace",
            lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
        )
    sae, corpus = load_sae(str(sae_folder)), load_corpus(str(corpus_file))
    with pytest.raises(StorageError, match="disk is full"):
        collect(subject, sae, corpus, tmp_path / "run", POLICY)
    assert not (tmp_path / "run" / "codes" / "codes.json").exists()
    monkeypatch.undo()
    assert collect(subject, sae, corpus, tmp_path / "run", POLICY).meta["n_nonzeros"] > 0
    assert builtins.open is not None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n_features=st.integers(1, 9), flush=st.integers(1, 30))
def test_any_sequence_of_runs_merges_to_the_sorted_codes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n_features: int, flush: int
):
    folder = tmp_path_factory.mktemp("codes")
    n_windows, length = 12, 3
    writer = RunWriter(
        folder,
        n_features=n_features,
        n_positions=n_windows * length,
        value_dtype="float32",
        flush_nonzeros=flush,
    )
    dense, unscored = np.zeros((n_features, n_windows * length), np.float32), []
    window = 0
    while window < n_windows:
        end = min(n_windows, window + data.draw(st.integers(1, 4)))
        cells = [(p, f) for p in range(window * length, end * length) for f in range(n_features)]
        chosen = data.draw(st.lists(st.sampled_from(cells), unique=True))
        values = np.array([1 + 0.5 * i for i in range(len(chosen))], np.float32)
        positions, features = (
            np.array(c, np.int64) for c in (zip(*chosen, strict=True) if chosen else ((), ()))
        )
        dense[features, positions] = values
        left_out = np.arange(window * length, end * length, 2)[::-1]
        writer.add(
            positions, features, values, n_scored=(end - window) * length, end_window=end, unscored=left_out
        )
        unscored += sorted(left_out.tolist())
        window = end
        if data.draw(
            st.booleans()
        ):  # the process ends and another goes on; what was not flushed is done again
            writer.flush()
            writer = RunWriter(
                folder,
                n_features=n_features,
                n_positions=n_windows * length,
                value_dtype="float32",
                flush_nonzeros=flush,
            )
            assert writer.next_window == window
    writer.finish({})
    offsets = np.fromfile(folder / "offsets.bin", np.int64)
    positions, values = (
        np.fromfile(folder / "positions.bin", np.uint32),
        np.fromfile(folder / "values.bin", np.float32),
    )
    for f in range(n_features):
        mine = slice(offsets[f], offsets[f + 1])
        np.testing.assert_array_equal(positions[mine], np.flatnonzero(dense[f]))
        np.testing.assert_array_equal(values[mine], dense[f][dense[f] > 0])
    assert json.loads((folder / "codes.json").read_text())["n_scored"] == n_windows * length
    assert np.fromfile(folder / "unscored.bin", np.uint32).tolist() == unscored


def test_values_that_float16_cannot_hold():
    with pytest.raises(StorageError, match="float32"):
        narrow_values(np.array([1.0, 70000.0]), np.dtype("float16"))
    with pytest.raises(StorageError):
        narrow_values(np.array([np.nan]), np.dtype("float16"))
    assert (narrow_values(np.array([1e-12, 1.0]), np.dtype("float16")) > 0).all()
    assert narrow_values(np.array([70000.0]), np.dtype("float32"))[0] == 70000


def test_feature_blocks_cover_everything_within_the_budget():
    offsets = np.array([0, 3, 3, 10, 11, 12, 30])
    blocks = feature_blocks(offsets, 5)
    assert [b for _, b in blocks][-1] == 6 and blocks[0][0] == 0
    assert all(a2 == b1 for (_, b1), (a2, _) in itertools.pairwise(blocks))
    assert all(offsets[b] - offsets[a] <= 5 or b == a + 1 for a, b in blocks)


def test_a_feature_out_of_range(store: CodesStore):
    for index in (-1, 64):
        with pytest.raises(FeatureRangeError, match="0 to 63"):
            store.feature(index)


def test_sinks_are_not_scored(subject: Subject):
    x = torch.randn(2, 9, 32)
    x[1, 4] *= 40
    scored = scored_tokens(x, subject)
    assert not scored[1, 4] and int((~scored).sum()) == 1


def test_activations_that_are_not_finite_stop_the_run(subject: Subject):
    x = torch.randn(1, 4, 32)
    x[0, 1, 2] = torch.nan
    with pytest.raises(Exception, match="not finite"):
        scored_tokens(x, subject)


def test_models_without_bos_skip_their_first_token(tmp_path: Path, sae_folder: Path, corpus_file: Path):
    plain = load_subject(str(make_subject_folder(tmp_path / "m", "gpt2", bos=False)), dtype="float32")
    found = collect(
        plain,
        load_sae(str(sae_folder)),
        load_corpus(str(corpus_file)),
        tmp_path / "run",
        WindowPolicy(16, 8, max_tokens=320),
    )
    assert not (np.asarray(found.positions) % 16 == 0).any()
    assert found.n_scored == found.windows.n_tokens - len(found.unscored)
    assert set(range(0, 16 * len(found.windows), 16)) <= set(found.unscored.tolist())
    assert found.meta["mask"]["first"] == "skipped"
