"""What a checkpoint says of itself: its site, its model, and what is done to its input. Obeyed, refused, or
said; never ignored.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import PYTHIA, checkpoint, configuration, saved

from featureinterp.errors import (
    FeatureInterpError,
    IncompatibleError,
    InputError,
    StorageError,
    UnknownNameError,
)
from featureinterp.sae.info import sae_info
from featureinterp.sae.layouts.checkpoint import ARCHITECTURES
from featureinterp.sae.load import load_sae, save_sae, save_saelens
from featureinterp.training.recipe import train
from featureinterp.training.settings import make_recipe

D_IN, D_SAE = 8, 16


def tensors(kind: str, seed: int = 0, *, unit: bool = False) -> dict[str, torch.Tensor]:
    """Random ones by SAELens's names, with decoder rows of norms between about 0.5 and 2."""
    rng = np.random.default_rng(seed)
    names = {
        "standard": ("b_enc",),
        "topk": ("b_enc",),
        "jumprelu": ("b_enc", "threshold"),
        "gated": ("b_gate", "b_mag", "r_mag"),
    }[kind]
    decoder = rng.normal(size=(D_SAE, D_IN))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True) / (
        1 if unit else rng.uniform(0.5, 2, (D_SAE, 1))
    )
    found = {"W_enc": rng.normal(size=(D_IN, D_SAE)), "W_dec": decoder, "b_dec": rng.normal(size=D_IN)}
    found |= {name: rng.normal(size=D_SAE) * 0.3 for name in names}
    if "threshold" in found:
        found["threshold"] = np.abs(found["threshold"])
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in found.items()}


def saelens(folder: Path, kind: str, t: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A folder of SAELens. ``changes``: of the configuration; None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(kind) if t is None else t, folder / "sae_weights.safetensors")
    metadata = {
        "hook_name": "blocks.1.hook_resid_post",
        "model_name": "gpt2-small",
        **changes.pop("metadata", {}),
    }
    metadata = {key: value for key, value in metadata.items() if value is not None}
    config = {
        "architecture": kind,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "metadata": metadata,
        **({"k": 3} if kind == "topk" else {}),
    }
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
    return folder


def inputs() -> torch.Tensor:
    return torch.randn(20, D_IN, generator=torch.Generator().manual_seed(2)) * 2


def encoded(kind: str, t: dict[str, torch.Tensor], x: torch.Tensor, k: int = 3) -> np.ndarray:
    """Codes as SAELens has them, in float64, with ``b_dec`` taken from the input."""
    n = {name: value.double().numpy() for name, value in t.items()}
    z = (x.double().numpy() - n["b_dec"]) @ n["W_enc"]
    if kind == "gated":
        return (z + n["b_gate"] > 0) * np.maximum(np.exp(n["r_mag"]) * z + n["b_mag"], 0)
    z = z + n["b_enc"]
    if kind == "jumprelu":
        return np.maximum(z, 0) * (z > n["threshold"])
    if kind == "topk":
        z = z * (z >= np.sort(z, 1)[:, -k][:, None])
    return np.maximum(z, 0)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_codes_are_in_units_of_the_residual_stream_whatever_the_decoder_s_norms(kind: str, tmp_path: Path):
    t, x = tensors(kind), inputs()
    sae = load_sae(str(saelens(tmp_path, kind))).sae
    found = sae.encode(x)
    theirs, norms = encoded(kind, t, x), t["W_dec"].double().norm(dim=1).numpy()
    np.testing.assert_allclose(found.to_dense().numpy(), theirs * norms, rtol=1e-4, atol=1e-4)
    decoded = theirs @ t["W_dec"].double().numpy() + t["b_dec"].double().numpy()
    np.testing.assert_allclose(sae.decode(found).numpy(), decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_the_same_sae_has_the_same_codes_in_two_layouts(tmp_path: Path):
    t = tensors("standard")
    place = tmp_path / "resid_post_layer_1" / "trainer_0"
    place.mkdir(parents=True)
    linear = {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "decoder.weight": t["W_dec"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "bias": t["b_dec"],
    }
    torch.save(linear, place / "ae.pt")
    (place / "config.json").write_bytes(configuration("relu", activation_dim=D_IN, dict_size=D_SAE, layer=1))
    one, other = load_sae(str(place)), load_sae(str(saelens(tmp_path / "other", "standard")))
    torch.testing.assert_close(one.sae.encode(inputs()).to_dense(), other.sae.encode(inputs()).to_dense())
    assert one.hook == other.hook == "blocks.1.hook_resid_post"


def test_codes_in_other_units_are_those_of_another_sae(tmp_path: Path):
    """A run that was collected before codes were in units of the residual stream is not mixed with new
    activations.
    """
    from featureinterp.sae.layouts.checkpoint import fingerprint

    def files(folder: Path) -> str:
        return fingerprint(folder / "cfg.json", folder / "sae_weights.safetensors")

    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for number, (kind, unit, said, same) in enumerate(
        (
            ("standard", True, {}, True),
            ("topk", False, {}, True),
            ("standard", False, {}, False),
            ("standard", True, {"metadata": centred}, False),
        )
    ):
        folder = saelens(tmp_path / str(number), kind, tensors(kind, unit=unit), **said)
        assert (load_sae(str(folder)).fingerprint == files(folder)) is same


def test_topk_s_own_units_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """They cannot be changed without changing which codes are the largest."""
    x = inputs()
    loaded = load_sae(str(saelens(tmp_path / "a", "topk")))
    np.testing.assert_allclose(
        loaded.sae.encode(x).to_dense().numpy(), encoded("topk", tensors("topk"), x), rtol=1e-4, atol=1e-4
    )
    assert "different units" in loaded.notes[0] and "different units" in caplog.text
    assert not load_sae(str(saelens(tmp_path / "b", "topk", tensors("topk", unit=True)))).notes


def test_factors_of_fine_tuning_are_part_of_the_reconstruction(tmp_path: Path):
    t, x = tensors("standard"), inputs()
    for number, name in enumerate(("scaling_factor", "finetuning_scaling_factor")):
        held = {**t, name: torch.linspace(2, 4, D_SAE)}
        sae = load_sae(
            str(saelens(tmp_path / str(number), "standard", held, finetuning_scaling_factor=True))
        ).sae
        theirs = encoded("standard", t, x) * np.linspace(2, 4, D_SAE)
        decoded = theirs @ t["W_dec"].double().numpy() + t["b_dec"].double().numpy()
        np.testing.assert_allclose(sae.decode(sae.encode(x)).numpy(), decoded, rtol=1e-4, atol=1e-3)
        plain = saelens(
            tmp_path / f"plain {number}",
            "standard",
            {**t, name: torch.ones(D_SAE)},
            finetuning_scaling_factor=False,
        )
        assert load_sae(str(plain)).n_features == D_SAE, "all ones is what older versions wrote"
        with pytest.raises(IncompatibleError, match="finetuning_scaling_factor = false"):
            load_sae(
                str(saelens(tmp_path / f"no {number}", "standard", held, finetuning_scaling_factor=False))
            )
    with pytest.raises(IncompatibleError, match="none of the factors"):
        load_sae(str(saelens(tmp_path / "missing", "standard", finetuning_scaling_factor=True)))
    with pytest.raises(IncompatibleError, match=r"'W_skip'.*does not encode as its configuration says"):
        load_sae(str(saelens(tmp_path / "skip", "standard", {**t, "W_skip": torch.zeros(D_IN, D_IN)})))


def test_a_model_whose_writing_was_centred_is_centred_here(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    t, x = tensors("standard"), inputs() + 5
    options = {
        "model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True, "n_devices": 2}
    }
    loaded = load_sae(str(saelens(tmp_path / "a", "standard", metadata=options)))
    centred = x - x.mean(1, keepdim=True)
    norms = t["W_dec"].double().norm(dim=1).numpy()
    found = loaded.sae.encode(x)
    np.testing.assert_allclose(
        found.to_dense().numpy(), encoded("standard", t, centred) * norms, rtol=1e-4, atol=1e-4
    )
    decoded = (
        encoded("standard", t, centred) @ t["W_dec"].double().numpy()
        + t["b_dec"].double().numpy()
        + x.mean(1, keepdim=True).numpy()
    )
    np.testing.assert_allclose(loaded.sae.decode(found).numpy(), decoded, rtol=1e-4, atol=1e-3)
    assert "without its mean" in caplog.text
    save_sae(tmp_path / "own", loaded.sae, hook=loaded.hook, model=loaded.model)
    save_saelens(tmp_path / "back", loaded.sae, hook=loaded.hook, model=loaded.model)
    for folder in ("own", "back"):
        torch.testing.assert_close(
            load_sae(str(tmp_path / folder)).sae.encode(x).to_dense(), found.to_dense()
        )
    gemma = load_sae(
        str(saelens(tmp_path / "b", "standard", metadata={**options, "model_name": "gemma-2-2b"}))
    )
    assert gemma.sae.normalize == "none", "a model with RMS norms is left as it is"
    for kwargs, message in (
        ({"checkpoint_index": 5}, "'checkpoint_index' = 5"),
        ({"revision": "step3000"}, "step3000"),
        ({"something_new": True}, "something_new"),
        ({"center_writing_weights": "yes"}, "center_writing_weights"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            load_sae(
                str(
                    saelens(tmp_path / message, "standard", metadata={"model_from_pretrained_kwargs": kwargs})
                )
            )
    with pytest.raises(IncompatibleError, match="only known for models with a layer norm"):
        load_sae(str(saelens(tmp_path / "c", "standard", metadata={**options, "model_name": "mine"})))


def test_the_activation_is_found_under_either_key(tmp_path: Path):
    t, x = tensors("topk", unit=True), inputs()
    expected = encoded("topk", t, x)
    for number, said in enumerate(
        (
            {
                "architecture": "standard",
                "activation_fn": "topk",
                "activation_fn_kwargs": {"k": 3},
                "k": None,
            },
            {
                "architecture": "standard",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 3},
                "k": None,
            },
            {"activation_fn": "topk"},
        )
    ):
        loaded = load_sae(str(saelens(tmp_path / str(number), "topk", t, **said)))
        np.testing.assert_allclose(loaded.sae.encode(x).to_dense().numpy(), expected, rtol=1e-4, atol=1e-4)
    for number, said in enumerate(
        (
            {"activation_fn": "tanh-relu"},
            {"activation_fn": "relu", "activation_fn_str": "topk"},
            {"activation_fn": {"name": "topk"}},
            {"architecture": "jumprelu", "activation_fn": "topk"},
            {"k": 3, "activation_fn_kwargs": {"k": 4}},
            {"k": 17},
            {"k": 3.0},
            {"k": None},
        )
    ):
        with pytest.raises(IncompatibleError):
            load_sae(str(saelens(tmp_path / f"no {number}", "topk", t, **said)))


def test_the_best_known_release_of_gpt_2_is_read(tmp_path: Path):
    """Its keys, as they were before version 3: the hook under hook_point, before block 8 and so after block
    7; factors of one.
    """
    save_file(
        {**tensors("standard"), "scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae_weights.safetensors"
    )
    old = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
    }
    old |= {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "expansion_factor": 32,
        "l1_coefficient": 8e-05,
        "context_size": 128,
    }
    for said in (
        {},
        {"normalize_activations": False},
        {"normalize_activations": None, "reshape_activations": None},
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**old, **said}))
        loaded = load_sae(str(tmp_path))
        assert (loaded.hook, loaded.model, loaded.sae.normalize) == (
            "blocks.7.hook_resid_post",
            "gpt2-small",
            "none",
        )
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "normalize_activations": True}))
    with pytest.raises(IncompatibleError, match="expected_average_only_in"):
        load_sae(str(tmp_path))


def test_an_sae_without_a_model_s_name_is_used_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    loaded = load_sae(str(saelens(tmp_path, "standard", metadata={"model_name": None})))
    assert loaded.model == "" and "does not say which model" in caplog.text
    about = sae_info(str(tmp_path))
    assert about["model"] is None and "does not say which model" in about["notes"]


@pytest.mark.parametrize(
    "said",
    [
        {"hook_name": "blocks.1.hook_mlp_out"},
        {"hook_name": "blocks.1.hook_attn_out"},
        {"hook_name": "blocks.1.attn.hook_z"},
        {"hook_name": "blocks.1.ln2.hook_normalized"},
        {"hook_name": "blocks.1.hook_resid_mid"},
        {"hook_name": "blocks.0.hook_resid_pre"},
        {"hook_name": "hook_embed"},
        {"hook_name": "blocks.99999.hook_resid_post"},
        {"hook_name": "blocks.１.hook_resid_post"},
        {"hook_name": "model.layers.1"},
        {"hook_name_out": "blocks.1.hook_mlp_out"},
        {"hook_head_index": 0},
        {"is_transcoder": True, "out_hook_point": "blocks.1.hook_mlp_out"},
    ],
)
def test_saelens_folders_of_other_sites_are_refused(tmp_path: Path, said: dict[str, Any]):
    with pytest.raises(IncompatibleError, match="only SAEs|SAEs of one attention head|transcoder"):
        load_sae(str(saelens(tmp_path, "standard", metadata=said)))


def learned(
    folder: Path,
    *,
    buffer: dict[str, Any] | None = None,
    arch: str = "topk",
    prefix: str = "",
    **trainer: Any,
) -> Path:
    """A folder of dictionary_learning, of layer 8 of a width of 768."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = checkpoint(arch, 768, 32)
    (folder / "ae.pt").write_bytes(saved({prefix + name: value for name, value in arrays.items()}))
    config = json.loads(configuration(arch, dict_size=32, **trainer))
    (folder / "config.json").write_text(json.dumps({**config, "buffer": buffer or {}}))
    return folder


def test_dictionary_learning_says_or_shows_what_it_reads(tmp_path: Path):
    for number, name in enumerate(
        ("resid_post_layer_8", "resid_out_layer8", "gpt_neox.layers.8", "model.layers.8", "transformer.h.8")
    ):
        folder = learned(
            tmp_path / str(number), submodule_name=name, buffer={"io": "out", "d_submodule": 768}
        )
        assert load_sae(str(folder)).hook == "blocks.8.hook_resid_post"
    assert (
        load_sae(str(learned(tmp_path / "resid_post_layer_8" / "trainer_0"))).hook
        == "blocks.8.hook_resid_post"
    )
    for number, (name, buffer) in enumerate(
        (
            ("mlp_out_layer_8", {}),
            ("attn_out_layer_8", {}),
            ("resid_post_layer_7", {}),
            ("gpt_neox.layers.8.mlp", {}),
            ("resid_post_layer_8", {"io": "in"}),
            ("resid_post_layer_8", {"io": "in_and_out"}),
            ("resid_post_layer_8", {"d_submodule": 2048}),
            (None, {}),
            (None, {"io": "out"}),
            (8, {}),
        )
    ):
        with pytest.raises(IncompatibleError, match="residual stream after a block|puts out"):
            load_sae(str(learned(tmp_path / f"no {number}", submodule_name=name, buffer=buffer)))


def test_compiled_checkpoints_and_those_of_several_processes_are_read(tmp_path: Path):
    plain = load_sae(str(learned(tmp_path / "a", submodule_name="resid_post_layer_8")))
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        loaded = load_sae(str(learned(tmp_path / prefix, submodule_name="resid_post_layer_8", prefix=prefix)))
        for name, value in plain.sae.tensors.items():
            torch.testing.assert_close(loaded.sae.tensors[name], value)


def test_a_batch_topk_without_a_threshold_is_called_that(tmp_path: Path):
    folder = learned(tmp_path, arch="btopk", submodule_name="resid_post_layer_8")
    (folder / "ae.pt").write_bytes(
        saved({k: v for k, v in checkpoint("btopk", 768, 32).items() if k != "threshold"})
    )
    with pytest.raises(
        IncompatibleError, match="has no threshold, which batch_topk needs outside of training"
    ) as error:
        load_sae(str(folder))
    assert "name" not in str(error.value)


def test_a_k_that_file_and_configuration_give_differently_is_refused(tmp_path: Path):
    with pytest.raises(IncompatibleError, match="says k = 21, and .* says 20"):
        load_sae(str(learned(tmp_path / "a", k=21, submodule_name="resid_post_layer_8")))
    loaded = load_sae(str(learned(tmp_path / "b", k=None, lm_name=None, submodule_name="resid_post_layer_8")))
    assert loaded.sae.options == {"k": 20} and loaded.model == ""


def scope(folder: Path, d_in: int = 2304) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **checkpoint("jumprelu", d_in, 8))
    return folder


def test_gemma_scope_folders_say_site_and_model_by_their_place(tmp_path: Path):
    place = "layer_7/width_16k/average_l0_9"
    cache = "models--google--gemma-scope-9b-it-res/snapshots/0123"
    for repository, d_in, model in (
        ("gemma-scope-2b-pt-res", 2304, "google/gemma-2-2b"),
        ("gemma-scope-9b-pt-res", 3584, "google/gemma-2-9b"),
        (cache, 3584, "google/gemma-2-9b-it"),
        ("google/gemma-scope-27b-pt-res", 4608, "google/gemma-2-27b"),
    ):
        loaded = load_sae(str(scope(tmp_path / repository / place, d_in)))
        assert (loaded.hook, loaded.model) == ("blocks.7.hook_resid_post", model)
    for repository in (
        "gemma-scope-2b-pt-mlp",
        "gemma-scope-2b-pt-att",
        "gemma-scope-2b-pt-transcoders",
        "models--google--gemma-scope-2b-pt-mlp/snapshots/0",
        "gemma-scope-2b-pt-res/copies/gemma-scope-2b-pt-mlp",
    ):
        with pytest.raises(IncompatibleError, match="only SAEs of the residual stream after a block"):
            load_sae(str(scope(tmp_path / repository / place)))
    for folder in (
        place,
        "some/layer_7/width_16k/average_l0_9",
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",
    ):
        with pytest.raises(IncompatibleError, match="does not say which layer"):
            load_sae(str(scope(tmp_path / folder)))
    with pytest.raises(IncompatibleError, match="Gemma 2 2b has"):
        load_sae(str(scope(tmp_path / "x" / "gemma-scope-2b-pt-res" / place, 2048)))


def test_an_sae_of_another_site_in_this_project_s_layout_is_shown_and_not_loaded(tmp_path: Path):
    for number, hook in enumerate(("h", "", "blocks.x.y", "blocks.1.hook_mlp_out", ".", "blocks")):
        folder = tmp_path / str(number)
        save_sae(folder, unit_sae("topk"), hook=hook, model="m")
        about = sae_info(str(folder))
        assert (
            about["layer"] == (1 if "1" in hook else None)
            and about["hook"] == hook
            and "can be used" in about["notes"]
        )
        with pytest.raises(IncompatibleError, match="only SAEs of the residual stream"):
            load_sae(str(folder))


def unit_sae(architecture: str, **settings: Any) -> Any:
    kind = ARCHITECTURES[architecture]
    found = {name: torch.ones(shape) for name, shape in kind.shapes(D_IN, D_SAE).items()}
    return kind(found, **{**dict.fromkeys(kind.settings, 4), **settings})


@pytest.mark.parametrize("k", [0, -1, 17, 4.7, 4.0, True, None, "4", 10**30, math.nan, math.inf])
def test_a_k_that_is_no_number_of_features_is_refused_everywhere(k: object, tmp_path: Path):
    with pytest.raises(IncompatibleError, match="positive integer 'k'"):
        unit_sae("topk", k=k)
    save_sae(tmp_path, unit_sae("topk"), hook="blocks.0.hook_resid_post", model="m")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "k": k}))
    with pytest.raises(IncompatibleError, match="positive integer 'k'"):
        load_sae(str(tmp_path))
    assert unit_sae("topk", k=16).encode(torch.ones(1, D_IN)).values.shape == (16,)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka_batch_topk", "jumprelu"])
def test_a_recipe_with_more_codes_than_features_is_refused(architecture: str):
    with pytest.raises(InputError, match=r"k \(17\) is above d_sae \(16\)"):
        make_recipe({"sae": {"architecture": architecture, "d_sae": 16, "k": 17}})
    assert make_recipe({"sae": {"architecture": architecture, "d_sae": 16, "k": 16}}).sae.width(8) == 16
    table = make_recipe({"sae": {"architecture": architecture, "expansion": 2, "k": 17}}).sae
    assert table.width(9) == 18
    with pytest.raises(InputError, match=r"sae.k = 17 is above the 16 features that sae.expansion = 2"):
        table.width(8)
    for odd in (True, 4.7, 4.0, "4"):
        with pytest.raises(InputError, match="sae.k"):
            make_recipe({"sae": {"architecture": architecture, "k": odd}})
    assert make_recipe({"sae": {"architecture": "relu", "d_sae": 16}}).sae.k == 32, "of no consequence there"


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_done(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, tracker, None)
    recipe = make_recipe({"tracking": {"to": tracker}, "subject": {"model": "no such model"}})
    with pytest.raises(InputError, match=rf"install featureinterp\[{tracker}\]"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_probe_without_any_result_is_drawn_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    from featureinterp.reports.probing import plot_study

    assert [p.exists() for p in plot_study(tmp_path, SimpleNamespace(concepts=[]))] == [True, True]
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]


def test_a_zero_decoder_is_refused(tmp_path: Path):
    sae = unit_sae("topk")
    save_sae(
        tmp_path / "own",
        type(sae)({**sae.tensors, "W_dec": torch.zeros(D_SAE, D_IN)}, k=4),
        hook="blocks.0.hook_resid_post",
        model="m",
    )
    with pytest.raises(IncompatibleError, match="decoder .* is zero"):
        load_sae(str(tmp_path / "own"))
    for kind in ("standard", "topk", "jumprelu", "gated"):
        with pytest.raises(IncompatibleError, match="is zero"):
            load_sae(
                str(saelens(tmp_path / kind, kind, {**tensors(kind), "W_dec": torch.zeros(D_SAE, D_IN)}))
            )


def spoiled(kind: str, **changes: tuple[float, float]) -> Any:
    """An SAE of ones, but for some tensors' first and other values."""
    sae = unit_sae(kind)
    found = dict(sae.tensors)
    for name, (first, rest) in changes.items():
        found[name] = torch.full_like(found[name], rest)
        found[name].view(-1)[0] = first
    return type(sae)(found, **sae.options)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gated", {"r_mag": (100.0, 0.0)}),
        ("relu", {"W_enc": (3e38, 1.0)}),
        ("topk", {"W_enc": (1e30, 1.0), "b_dec": (1e30, 1.0)}),
        ("jumprelu", {"W_enc": (-3e38, 3e38)}),
        ("batch_topk", {"b_dec": (3e38, 3e38)}),
        ("topk", {"W_enc": (3e38, -3e38)}),
    ],
)
def test_what_passes_tensor_by_tensor_and_encodes_to_infinity_is_refused(
    kind: str, changes: Any, tmp_path: Path
):
    sae = spoiled(kind, **changes)
    save_sae(tmp_path, sae, hook="blocks.0.hook_resid_post", model="m")
    with pytest.raises(IncompatibleError, match="not finite"):
        load_sae(str(tmp_path)).sae.encode(inputs() * 10)


def test_every_dtype_is_checked_after_the_cast(tmp_path: Path):
    save_sae(tmp_path, spoiled("relu", b_enc=(1e6, 1.0)), hook="blocks.0.hook_resid_post", model="m")
    assert (
        load_sae(str(tmp_path)).n_features
        == load_sae(str(tmp_path), dtype=torch.bfloat16).n_features
        == D_SAE
    )
    with pytest.raises(IncompatibleError, match=r"not finite in float16 \(b_enc\)"):
        load_sae(str(tmp_path), dtype=torch.float16)
    large = spoiled("relu", W_enc=(1000.0, 1000.0)).to("cpu", torch.float16)
    with pytest.raises(IncompatibleError, match="codes are not finite in float16"):
        large.encode(torch.full((1, D_IN), 100.0))
    assert float(large.encode(torch.full((1, D_IN), 4.0)).values.max()) == pytest.approx(24_000, rel=1e-2)


def test_activations_that_are_not_finite_give_no_codes():
    for kind in ARCHITECTURES:
        sae = unit_sae(kind)
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.ones(3, D_IN)
            x[1, 2] = bad
            with pytest.raises(IncompatibleError, match="not finite"):
                sae.encode(x)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_stored(dtype: str, bad: float):
    from featureinterp.codes.runs import narrow_values

    with pytest.raises((StorageError, FeatureInterpError), match="finite|float16"):
        narrow_values(np.array([1.0, bad, 2.0], np.float32), np.dtype(dtype))


def test_an_old_package_of_saelens_is_refused(monkeypatch: pytest.MonkeyPatch):
    for version in ("5.11.0", "6.0.0", "6.17.9"):
        monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(__version__=version))
        with pytest.raises(UnknownNameError, match=r"needs sae-lens 6\.18 or later"):
            load_sae("saelens:a/b")


def test_what_is_published_says_nothing_that_has_to_be_noted(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    with caplog.at_level(logging.WARNING):
        loaded = load_sae("demo")
    assert not caplog.records and not loaded.notes and PYTHIA
