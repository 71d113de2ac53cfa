"""Evaluation against formulas in plain numpy, and on SAEs whose figures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from test_activation_store import filled
from tiny import make_sae

from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import IncompatibleError, InputError
from featureinterp.sae.relu import ReLU
from featureinterp.subject.load import Subject, load_causal_lm
from featureinterp.training.evaluate import Loss, check_apart, evaluate, held_out_windows, loss_recovered
from featureinterp.training.extract import Extracted, ExtractSettings, extract

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, subject: Subject, corpus_file: Path) -> Extracted:
    settings = ExtractSettings(0.3, "float32", shard_rows=700)
    return extract(
        subject,
        HOOK,
        load_corpus(str(corpus_file)),
        tmp_path_factory.mktemp("acts"),
        WindowPolicy(16, 4),
        settings,
    )


def by_hand(x: np.ndarray, guess: np.ndarray) -> tuple[float, float]:
    """Variance explained, raw and normalised, in float64."""
    x, guess = x.astype(np.float64), guess.astype(np.float64)
    raw = 1 - ((x - guess) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    mean, deviation = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    a, b = (x - mean) / deviation, (guess - mean) / deviation
    return raw, 1 - ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated", "batch_topk"])
def test_figures_are_those_of_the_formulas(extracted: Extracted, architecture: str):
    assert extracted.test is not None and extracted.train is not None
    sae = make_sae(architecture, 32, 48)
    sample = extracted.train.sample(2000)
    found = evaluate(sae, extracted.test, sample, pca=5)
    x = extracted.test.read(np.arange(len(extracted.test)))
    codes = sae.encode(torch.from_numpy(x))
    dense = codes.to_dense().numpy()
    guess = dense @ sae.W_dec.numpy() + sae.b_dec.numpy()
    for way, of in (("sae", guess), ("zero", np.broadcast_to(sae.b_dec.numpy(), x.shape))):
        raw, normalised = by_hand(x, of)
        assert getattr(found, way).raw == pytest.approx(raw, rel=1e-4, abs=1e-5)
        assert getattr(found, way).normalised == pytest.approx(normalised, rel=1e-4, abs=1e-3)
    model = PCA(5, svd_solver="full").fit(sample)
    assert found.pca is not None and found.pca.raw == pytest.approx(
        by_hand(x, model.inverse_transform(model.transform(x)))[0], rel=1e-4
    )
    assert found.l0 == pytest.approx((dense > 0).sum(1).mean())
    assert found.dead == pytest.approx((~(dense > 0).any(0)).mean())
    assert sum(found.frequency) == int((dense > 0).any(0).sum()) and found.n_rows == len(x)
    norms = np.linalg.norm(x, axis=1)
    edges = np.quantile(norms, np.linspace(0, 1, 11))
    for i in range(10):
        inside = (norms >= edges[i]) & ((norms < edges[i + 1]) if i < 9 else (norms <= edges[i + 1]))
        wanted = 1 - ((x - guess)[inside] ** 2).sum() / ((x - x.mean(0))[inside] ** 2).sum()
        assert found.sae.by_norm[i] == pytest.approx(wanted, rel=1e-3)
    assert found.interval is not None and found.interval.low <= found.sae.raw <= found.interval.high
    assert found.n_documents == len(np.unique(extracted.test.documents))


def test_per_token_normalisation_is_undone_and_free(extracted: Extracted):
    """All codes zero still explain raw variance, because undoing the normalisation costs nothing; the
    normalised figure shows it.
    """
    assert extracted.test is not None
    plain = make_sae("topk", 32, 48)
    sae = type(plain)({**plain.tensors, "b_dec": torch.zeros(32)}, normalize="layer_norm", k=4)
    found = evaluate(sae, extracted.test)
    x = extracted.test.read(np.arange(len(extracted.test)))
    guess = np.broadcast_to(x.mean(1, keepdims=True), x.shape)
    assert found.zero.raw == pytest.approx(by_hand(x, guess)[0], abs=1e-4)
    assert found.pca is None


def perfect(d: int) -> ReLU:
    """Reconstructs everything: a feature for each direction of each axis."""
    eye = torch.eye(d)
    return ReLU(
        {
            "W_enc": torch.cat([eye, -eye], 1),
            "W_dec": torch.cat([eye, -eye]),
            "b_enc": torch.zeros(2 * d),
            "b_dec": torch.zeros(d),
        }
    )


def test_loss_recovered_of_the_perfect_and_of_the_empty_sae(extracted: Extracted, subject_folder: Path):
    assert extracted.test is not None
    model, tokenizer = load_causal_lm(str(subject_folder), dtype="float32")
    windows = held_out_windows(extracted.test, 20)
    best = loss_recovered(model, tokenizer, HOOK, perfect(32), extracted.windows, windows)
    assert best.sae == pytest.approx(best.clean, abs=1e-5)
    assert best.zero > best.clean and best.recovered == pytest.approx(1, abs=1e-3)
    empty = perfect(32)
    empty = ReLU({**empty.tensors, "b_enc": torch.full((64,), -1e9)})
    worst = loss_recovered(model, tokenizer, HOOK, empty, extracted.windows, windows)
    assert worst.sae == pytest.approx(worst.zero) and worst.recovered == pytest.approx(0, abs=1e-3)
    assert worst.clean == pytest.approx(best.clean)
    # the clean loss against the library's own, window by window
    total = n = 0.0
    for row in windows:
        ids = torch.cat(
            [
                torch.tensor([tokenizer.bos_token_id]),
                torch.from_numpy(extracted.windows.ids(int(row)).astype(np.int64)),
            ]
        )
        logits = model(ids[None]).logits[0, 1:-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[2:], reduction="sum"))
        n += len(ids) - 2
    assert best.clean == pytest.approx(total / n, rel=1e-5) and best.n_tokens == n


def test_loss_recovered_is_undefined_where_zeros_cost_nothing():
    assert (
        Loss(3.0, 3.5, 8.0, 10).recovered == pytest.approx(0.9) and Loss(3.0, 3.5, 8.0, 10).undefined is None
    )
    assert Loss(3.0, 9.0, 8.0, 10).recovered == pytest.approx(-0.2), "worse than zeros is said as it is"
    for loss in (Loss(3.0, 3.5, 2.9, 10), Loss(3.0, 2.0, 2.5, 10), Loss(3.0, 3.5, 3.0, 10)):
        assert loss.recovered is None and "no worse when it reads zeros" in (loss.undefined or "")
    broken = Loss(3.0, float("nan"), 8.0, 10)
    assert broken.recovered is None and broken.undefined == "a cross-entropy is not finite"


def test_the_right_part_of_the_model_reads_the_reconstruction(extracted: Extracted, subject_folder: Path):
    """An SAE that gives a constant must change the loss as a model whose hooked block gives that constant."""
    model, tokenizer = load_causal_lm(str(subject_folder), dtype="float32")
    assert extracted.test is not None
    row = held_out_windows(extracted.test, 1)
    constant = ReLU(
        {**perfect(32).tensors, "b_enc": torch.full((64,), -1e9), "b_dec": torch.linspace(-1, 1, 32)}
    )
    found = loss_recovered(model, tokenizer, HOOK, constant, extracted.windows, row)
    ids = torch.cat(
        [
            torch.tensor([tokenizer.bos_token_id]),
            torch.from_numpy(extracted.windows.ids(int(row[0])).astype(np.int64)),
        ]
    )

    def replace(module, args, output):
        out = (output[0] if isinstance(output, tuple) else output).clone()
        out[:, 1:] = torch.linspace(-1, 1, 32)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    handle = model.model.layers[1].register_forward_hook(replace)
    logits = model(ids[None]).logits[0, 1:-1]
    handle.remove()
    assert found.sae == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[2:])), rel=1e-5)


def test_a_subset_of_rows_and_more_components_than_there_are(extracted: Extracted):
    assert extracted.test is not None and extracted.train is not None
    found = evaluate(
        make_sae("topk", 32, 48), extracted.test, extracted.train.sample(500), max_rows=200, pca=99
    )
    assert found.n_rows == 200 and found.pca_k == 32
    assert found.pca is not None and found.pca.raw == pytest.approx(1)


def test_what_does_not_fit(extracted: Extracted, tmp_path: Path):
    assert extracted.test is not None and extracted.train is not None
    with pytest.raises(IncompatibleError, match="width 16"):
        evaluate(make_sae("topk", 16, 48), extracted.test)
    with pytest.raises(InputError, match="share .* documents"):
        check_apart(extracted.train, extracted.train)
    other = filled(tmp_path, 20)
    with pytest.raises(IncompatibleError, match="different extractions"):
        check_apart(extracted.train, other)
    with pytest.raises(InputError, match="at least 2"):
        evaluate(make_sae("topk", 3, 8), filled(tmp_path / "one", 1))
    for wrong in ({"max_rows": 1}, {"pca": 0}):
        with pytest.raises(InputError, match="not possible"):
            evaluate(make_sae("topk", 32, 48), extracted.test, **wrong)
