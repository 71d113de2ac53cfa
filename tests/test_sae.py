"""SAEs: each architecture against its formula in plain numpy, and files that contradict themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_sae

from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.sae.codes import SparseCodes
from featureinterp.sae.load import ARCHITECTURES, load_sae, save_sae
from featureinterp.training.settings import load_recipe, make_recipe

D_IN, D_SAE, K = 6, 11, 4


def by_hand(architecture: str, t: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Dense codes ``[token, feature]``, feature by feature."""
    out = np.zeros((len(x), D_SAE))
    for row, v in enumerate(x):
        centred = [sum((v[i] - t["b_dec"][i]) * t["W_enc"][i, j] for i in range(D_IN)) for j in range(D_SAE)]
        raw = [sum(v[i] * t["W_enc"][i, j] for i in range(D_IN)) for j in range(D_SAE)]
        if architecture == "gated":
            for j in range(D_SAE):
                if centred[j] + t["gate_bias"][j] > 0:
                    out[row, j] = max(0.0, np.exp(t["r_mag"][j]) * centred[j] + t["mag_bias"][j])
            continue
        if architecture == "jumprelu":
            for j in range(D_SAE):
                z = raw[j] + t["b_enc"][j]
                out[row, j] = z if z > t["threshold"][j] and z > 0 else 0.0
            continue
        z = np.maximum(0.0, np.array(centred) + t["b_enc"])
        if architecture == "topk":
            keep = np.argsort(-z)[:K]
            out[row, keep] = z[keep]
        elif architecture == "batch_topk":
            out[row] = np.where(z > t["threshold"], z, 0)
        else:
            out[row] = z
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codes_and_reconstruction_equal_the_formula(architecture: str):
    sae = make_sae(architecture, D_IN, D_SAE)
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(3))
    tensors = {k: v.double().numpy() for k, v in sae.tensors.items()}
    expected = by_hand(architecture, tensors, x.double().numpy())
    codes = sae.encode(x)
    np.testing.assert_allclose(codes.to_dense().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (codes.values > 0).all() and (expected > 0).sum() == len(codes.values)
    assert (torch.diff(codes.rows) >= 0).all()
    decoded = expected @ tensors["W_dec"] + tensors["b_dec"]
    np.testing.assert_allclose(sae.decode(codes).numpy(), decoded, rtol=1e-4, atol=1e-5)


def test_a_token_without_codes_decodes_to_the_bias():
    sae = make_sae("topk", D_IN, D_SAE)
    empty = torch.zeros(0, dtype=torch.long)
    codes = SparseCodes(torch.tensor([2]), torch.tensor([5]), torch.tensor([1.5]), 4, D_SAE)
    decoded = sae.decode(codes)
    torch.testing.assert_close(decoded[0], sae.b_dec)
    torch.testing.assert_close(decoded[2], sae.b_dec + 1.5 * sae.W_dec[5])
    assert sae.decode(SparseCodes(empty, empty, torch.zeros(0), 2, D_SAE)).shape == (2, D_IN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_files_round_trip(architecture: str, tmp_path: Path):
    sae = make_sae(architecture, D_IN, D_SAE)
    save_sae(tmp_path, sae, hook="blocks.0.hook_resid_post", model="m", provenance={"by": "test"})
    loaded = load_sae(str(tmp_path))
    x = torch.randn(8, D_IN)
    torch.testing.assert_close(loaded.sae.encode(x).to_dense(), sae.encode(x).to_dense())
    assert loaded.config["provenance"] == {"by": "test"} and loaded.n_features == D_SAE
    assert load_sae(str(tmp_path)).fingerprint == loaded.fingerprint


def broken(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 7}, "instead of a float"),
        ({"d_sae": -1}, "d_sae"),
        ({"architecture": "magic"}, "magic"),
        ({"k": 0}, "positive integer 'k'"),
        ({"hook": 3}, "hook"),
        ({"format": 9}, "format"),
    ],
)
def test_contradictory_configurations_are_refused(tmp_path: Path, change: dict[str, object], message: str):
    save_sae(tmp_path, make_sae("topk", D_IN, D_SAE), hook="blocks.0.hook_resid_post", model="m")
    broken(tmp_path, **change)
    with pytest.raises(IncompatibleError, match=message):
        load_sae(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path):
    save_sae(tmp_path, make_sae("topk", D_IN, D_SAE), hook="h", model="m")
    weights = tmp_path / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(IncompatibleError, match="cut or extended"):
        load_sae(str(tmp_path))
    weights.write_bytes(b"\x80\x04pickle" * 20)
    with pytest.raises(IncompatibleError, match="not a safetensors"):
        load_sae(str(tmp_path))
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["b_enc"][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(IncompatibleError, match="finite"):
        load_sae(str(tmp_path))
    tensors.pop("b_enc")
    save_file(tensors, weights)
    with pytest.raises(IncompatibleError, match="instead of"):
        load_sae(str(tmp_path))
    with pytest.raises(UnknownNameError):
        load_sae(str(tmp_path / "none"))


def test_saving_what_the_dtype_cannot_hold_is_an_error(tmp_path: Path):
    sae = make_sae("topk", D_IN, D_SAE)
    sae.tensors["W_enc"][0, 0] = 1e6
    with pytest.raises(IncompatibleError, match="W_enc"):
        save_sae(tmp_path / "s", sae, hook="h", model="m", dtype=torch.float16)
    assert not (tmp_path / "s").exists()


def test_an_untrained_batch_topk_threshold_and_a_wrong_width_are_refused():
    sae = make_sae("batch_topk", D_IN, D_SAE)
    with pytest.raises(IncompatibleError, match="never learned"):
        type(sae)({**sae.tensors, "threshold": torch.tensor(-1.0)})
    with pytest.raises(IncompatibleError, match="another width"):
        sae.encode(torch.zeros(2, D_IN + 1))


def test_the_demo_sae_is_what_it_says():
    demo = load_sae("demo")
    metrics, provenance = demo.config["metrics"], demo.config["provenance"]
    assert demo.hook == "blocks.14.hook_resid_post" and demo.sae.d_in == 576
    assert metrics["explained_variance"] >= 0.8 and metrics["dead_share"] <= 0.02
    assert provenance["recipe"]["subject"]["dtype"] == "bfloat16"  # what the machine that trained it chose
    assert (
        make_recipe(provenance["recipe"]).changed({"subject.dtype": "auto"}) == load_recipe("demo")
        and provenance["source"]["hook"] == demo.hook
    )
    norms = demo.sae.W_dec.norm(dim=1)
    assert float((norms - 1).abs().max()) < 2e-3  # float16 rows of unit norm
