"""Layer selection: spectra of known covariances, sinks that dominate and are found out, a recommendation that
follows its rule.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import cli
from tiny import TINY_TEXTS

from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.domain.score import Interval
from featureinterp.errors import InputError, UnknownNameError
from featureinterp.probing.labels import load_labels
from featureinterp.training import layers as layers_module
from featureinterp.training.layers import Layer, Spectrum, choose_layer, parse_blocks, recommend, spectra


def cloud(scales: list[float], n: int = 20_000, seed: int = 0) -> np.ndarray:
    """Gaussian points with these variances along the axes, exactly."""
    x = np.random.default_rng(seed).normal(size=(n, len(scales)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T
    return (x * np.sqrt(scales)).astype(np.float32)


def test_spectra_by_hand():
    (found,) = spectra(cloud([8.0, 1.0, 0.5, 0.5]) + 30, [0.0])
    assert found.participation_ratio == pytest.approx(10**2 / (64 + 1 + 0.25 + 0.25), rel=1e-4)
    assert found.stable_rank == pytest.approx(10 / 8, rel=1e-4)
    assert (found.k50, found.k90, found.k99) == (1, 2, 4)
    assert found.gap == pytest.approx(8, rel=1e-4)
    assert found.channel == 0 and found.channel_share == pytest.approx(1, abs=1e-3)
    assert found.token_share < 0.01


def test_sinks_make_a_layer_look_as_if_it_had_one_direction():
    x = cloud([1.0] * 16)
    x[::250] += 300 * np.eye(16, dtype=np.float32)[5]
    whole, without_1, without_5 = spectra(x)
    assert whole.participation_ratio < 1.1 and whole.channel == 5
    assert without_1.participation_ratio == pytest.approx(16, rel=0.01) and without_5.participation_ratio > 15
    x = cloud([1.0] * 16)
    x[7] += 1000
    whole = spectra(x)[0]
    assert whole.token_share > 0.95


def test_a_healthy_layer_is_the_same_without_its_outliers():
    whole, without_1, _ = spectra(cloud([2.0, *[1.0] * 15]))
    assert without_1.participation_ratio == pytest.approx(whole.participation_ratio, rel=0.1)


def layer(block: int, auroc: float, ratio: float, *, with_sinks: float | None = None) -> Layer:
    def one(r: float) -> Spectrum:
        return Spectrum(r, 2.0, 1, 2, 3, 2.0, 0, 0.1, 0.01)

    return Layer(
        block,
        f"blocks.{block}.hook_resid_post",
        {"a": auroc},
        auroc,
        Interval(auroc, auroc),
        (one(with_sinks or ratio), one(ratio), one(ratio)),
        1.0,
        0.0,
    )


def test_the_recommendation_follows_its_rule():
    rng = np.random.default_rng(0)
    layers = [layer(0, 0.80, 50), layer(5, 0.95, 20), layer(9, 0.949, 30, with_sinks=2)]
    common = rng.normal(0, 0.05, 200)  # documents move all layers alike
    resampled = np.stack([x.auroc + common + rng.normal(0, 0.002, 200) for x in layers])
    best, reasons = recommend(layers, resampled)
    assert best == 9  # level with block 5, and with more directions in use
    assert any("one standard error" in r for r in reasons) and any("attention sinks" in r for r in reasons)
    exact = np.stack([x.auroc + common for x in layers])
    assert recommend(layers, exact)[0] == 5


def test_blocks():
    assert (
        parse_blocks("all") is None
        and parse_blocks("0:10:3") == [0, 3, 6, 9]
        and parse_blocks("4,2") == [4, 2]
    )
    with pytest.raises(InputError, match="names no blocks"):
        parse_blocks("first")


def test_the_command(tmp_path: Path, subject_folder: Path, corpus_file: Path):
    args = [
        "layers",
        "--model",
        str(subject_folder),
        "--corpus",
        str(corpus_file),
        "--window",
        "16",
        "--max-tokens",
        "6000",
        "--dtype",
        "float32",
    ]
    done = cli(*args, "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        [x["block"] for x in found["layers"]] == [0, 1, 2] and found["best"] in (0, 1, 2) and found["reasons"]
    )
    assert (
        all(0.4 < v <= 1 for x in found["layers"] for v in x["aurocs"].values())
        and len(found["concepts"]) >= 3
    )
    assert {p.name for p in tmp_path.glob("[!.]*")} == {
        "layers.csv",
        "layers.json",
        "layers.png",
        "layers.svg",
        "request.json",
    }
    shown = cli(*args, "--blocks", "1")
    assert "Recommended" in shown.stdout and " 1 *" in shown.stdout.replace("1 *", " 1 *")
    for change, message in (
        (["--blocks", "7"], "no hook 'blocks.7"),
        (["--max-tokens", "64"], "take more tokens"),
        (["--corpus", "/nowhere"], "no corpus"),
    ):
        done = cli(*args, *change)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_block_that_does_not_exist(subject, corpus_file: Path):
    with pytest.raises(UnknownNameError, match=r"no hook 'blocks\.3"):
        choose_layer(subject, load_corpus(str(corpus_file)), load_labels(None), blocks=[1, 3])


def test_no_text_is_on_both_sides_of_a_probe(subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Documents that are there twice are one, and a header that all share is tested nowhere."""
    header = TINY_TEXTS[0] * 3
    for i in range(24):
        body = " ".join(TINY_TEXTS[(i * 5 + j * (1 + i % 3)) % len(TINY_TEXTS)] + f" {i}" for j in range(8))
        for copy in range(1 + (i % 4 == 0)):
            (tmp_path / f"{i:02d}-{copy}.txt").write_text(header + body, encoding="utf-8")
    seen: list[tuple[np.ndarray, ...]] = []
    real = layers_module._measure

    def look(block: int, x: np.ndarray, scored: np.ndarray, *rest: Any) -> Any:
        seen.append((x, *rest[2:5]))
        return real(block, x, scored, *rest)

    monkeypatch.setattr(layers_module, "_measure", look)
    corpus, policy = load_corpus(str(tmp_path)), WindowPolicy(16, 8)
    choose_layer(subject, corpus, load_labels(None), policy, blocks=[0, 1])
    table = build_windows(corpus, subject.encoder, policy, tmp_path / "again")
    window = np.repeat(np.arange(len(table)), np.asarray(table.lengths))
    ids = [tuple(table.ids(row).tolist()) for row in range(len(table))]
    document = np.asarray(table.documents)[window]
    assert len(seen) == 2
    for _, train, test, groups in seen:
        one, other = ({ids[w] for w in window[rows]} for rows in (train, test))
        assert one and other and not one & other
        assert not set(document[train]) & set(document[test])
        twice = [n for n, name in enumerate(table.document_ids()) if name.endswith("-1.txt")]
        assert len(twice) == 6
        for number in twice:  # a resample of documents takes both or none
            assert set(groups[document == number]) == set(groups[document == number - 1]), number
    header_ids = ids[0]
    assert sum(text == header_ids for text in ids) == 30
    assert header_ids not in {ids[w] for w in window[seen[0][2]]}
