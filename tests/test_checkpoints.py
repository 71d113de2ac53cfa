"""Published checkpoints: what names stand for, and every layout from a local model hub to codes, against
formulas in plain numpy.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub import COMMIT, Hub, serving
from tiny import make_sae

from featureinterp.errors import ChecksumError, DownloadError, IncompatibleError, InputError, UnknownNameError
from featureinterp.sae import names as names_module
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.hub import cached, measured_l0
from featureinterp.sae.load import load_sae, save_saelens
from featureinterp.sae.names import all_names, gemma_scope_names, resolve, saebench_names

SAELENS = Path(__file__).parent / "data" / "saelens"
PYTHIA, GEMMA = "EleutherAI/pythia-160m-deduped", "google/gemma-2-2b"
REPOSITORIES = {
    ("py", "4k"): "adamkarvonen/saebench_pythia-160m-deduped_width-2pow12_date-0108",
    ("py", "16k"): "adamkarvonen/saebench_pythia-160m-deduped_width-2pow14_date-0108",
    ("py", "65k"): "adamkarvonen/saebench_pythia-160m-deduped_width-2pow16_date-0108",
    ("gem", "4k"): "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108",
    ("gem", "16k"): "canrager/saebench_gemma-2-2b_width-2pow14_date-0107",
    ("gem", "65k"): "canrager/saebench_gemma-2-2b_width-2pow16_date-0107",
}
FOLDERS = {  # architecture: folders of the one and the other owner, and how it is called here
    "btopk": ("BatchTopK", "batch_top_k", "batch_topk"),
    "matbtopk": ("MatryoshkaBatchTopK", "matryoshka_batch_top_k", "matryoshka_batch_topk"),
    "gated": ("GatedSAE", "gated", "gated"),
    "jumprelu": ("JumpRelu", "jump_relu", "jumprelu"),
    "topk": ("TopK", "top_k", "topk"),
    "relu": ("Standard", "standard_new", "relu"),
    "pan": ("PAnneal", "p_anneal", "p_anneal"),
}
WIDTHS = {"4k": 4096, "16k": 16384, "65k": 65536}
L0 = [20, 40, 80, 160, 320, 640]
TRAINERS = {
    "btopk": "BatchTopKTrainer",
    "matbtopk": "MatroyshkaBatchTopKTrainer",
    "gated": "GatedSAETrainer",
    "jumprelu": "JumpReluTrainer",
    "topk": "TopKTrainer",
    "relu": "StandardTrainerAprilUpdate",
    "pan": "PAnnealTrainer",
}


def test_every_saebench_name_is_what_the_publication_says():
    seen = []
    for (model, width), repository in REPOSITORIES.items():
        for arch, (camel, snake, kind) in FOLDERS.items():
            for n in range(6):
                name = f"{model}_{width}_{arch}_s{n}"
                seen.append(name)
                spec = resolve(name)
                if repository.startswith("canrager"):
                    power = {"16k": 14, "65k": 16}[width]
                    folder = f"gemma-2-2b_{snake}_width-2pow{power}_date-0107/resid_post_layer_12"
                else:
                    folder = (
                        f"{camel}_pythia-160m-deduped__0108/resid_post_layer_8"
                        if model == "py"
                        else f"{camel}_gemma-2-2b__0108/resid_post_layer_12"
                    )
                assert (spec.repository, spec.file, spec.config_file) == (
                    repository,
                    f"{folder}/trainer_{n}/ae.pt",
                    f"{folder}/trainer_{n}/config.json",
                ), name
                assert (spec.model, spec.layer, spec.hook, spec.d_in) == (
                    (PYTHIA, 8, "blocks.8.hook_resid_post", 768)
                    if model == "py"
                    else (GEMMA, 12, "blocks.12.hook_resid_post", 2304)
                )
                assert (spec.d_sae, spec.architecture, spec.trainer, spec.revision) == (
                    WIDTHS[width],
                    kind,
                    n,
                    "main",
                )
                assert spec.l0 == (L0[n] if arch in ("btopk", "matbtopk", "topk", "jumprelu") else None)
    assert sorted(seen) == sorted(saebench_names()) and len(set(seen)) == 252


def test_gemma_scope_names():
    spec = resolve("gscope_16k_l0_82")
    assert (spec.repository, spec.file, spec.config_file) == (
        "google/gemma-scope-2b-pt-res",
        "layer_12/width_16k/average_l0_82/params.npz",
        None,
    )
    assert (spec.d_in, spec.d_sae, spec.layer, spec.l0, spec.architecture, spec.model) == (
        2304,
        16384,
        12,
        82,
        "jumprelu",
        GEMMA,
    )
    assert resolve("gscope_layer20_65k_l0_114").file == "layer_20/width_65k/average_l0_114/params.npz"
    assert (
        resolve("gscope_128k_l0_67").file
        == resolve("gscope_131k_l0_67").file
        == "layer_12/width_131k/average_l0_67/params.npz"
    )
    assert resolve("gscope_1m_l0_107").d_sae == 1_048_576 and resolve("gscope_layer5_1m_l0_21").layer == 5
    assert len(gemma_scope_names()) == 5 + 6 + 5 + 6 + 6 + 6 + 6 and all(
        resolve(n).name == n for n in all_names()
    )
    assert (
        resolve("py_4k_topk_s0@v1.2").revision == "v1.2"
        and resolve(f"gscope_16k_l0_82@{COMMIT}").revision == COMMIT
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pyt_4k_btopk_s0", ("there is no SAE 'pyt_4k_btopk_s0'", "py_4k_btopk_s0")),
        ("py_8k_btopk_s0", ("'8k' is no width", "4k, 16k and 65k", "py_4k_btopk_s0")),
        ("py_4k_batchtopk_s0", ("'batchtopk' is no architecture", "matbtopk", "py_4k_btopk_s0")),
        ("py_4k_btopk_s6", ("'s6' is no number", "s5", "py_4k_btopk_s")),
        ("py_4k_btopk_s0_extra", ("'extra' after the number", "py_4k_btopk_s0")),
        ("py_4k_btopk", ("the number is missing", "py_4k_btopk_s")),
        ("py", ("the width is missing",)),
        ("gscope_16k_l0_83", ("22, 41, 82, 176 and 445", "gscope_16k_l0_82")),
        ("gscope_17k_l0_82", ("'17k' is no width", "gscope_16k_l0_82")),
        ("gscope_layer3_32k_l0_22", ("the width 32k exists on layer 12",)),
        ("gscope_layer26_16k_l0_22", ("layers 0 to 25",)),
        ("gscope_16k", ("gscope_WIDTH_l0_N", "gscope_16k_l0_22")),
        ("py_4k_btopk_s0@../x", ("no revision",)),
    ],
)
def test_wrong_names_are_told_what_is_wrong_and_what_is_near(name: str, parts: tuple[str, ...]):
    with pytest.raises(UnknownNameError) as error:
        load_sae(name)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process asks, with an empty cache."""
    from huggingface_hub import constants

    with serving(Hub()) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for module in ("huggingface_hub.utils._http.time", "huggingface_hub.file_download.time"):
            monkeypatch.setattr(module, SimpleNamespace(sleep=lambda _: None, time=time.time))
        yield running


def unit(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    found = rng.normal(size=(rows, columns))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def vector(rng: np.random.Generator, n: int, scale: float = 0.1) -> np.ndarray:
    return (scale * rng.normal(size=n)).astype(np.float32)


def checkpoint(arch: str, d_in: int, d_sae: int, seed: int = 0, k: int = 20) -> dict[str, np.ndarray]:
    """The arrays of a random SAE by the names of ``ae.pt``."""
    rng = np.random.default_rng(seed)
    encoder, decoder = (rng.normal(size=(d_sae, d_in)) / d_in**0.5).astype(np.float32), unit(rng, d_sae, d_in)
    linear = {"encoder.weight": encoder, "decoder.weight": np.ascontiguousarray(decoder.T)}
    top = {"b_dec": vector(rng, d_in), "k": np.array(k), "threshold": np.array(0.8, np.float32)}
    if arch in ("relu", "pan"):
        sizes = rng.uniform(0.5, 2, d_sae).astype(np.float32)
        return {
            **linear,
            "decoder.weight": (decoder * sizes[:, None]).T.copy(),
            "encoder.bias": vector(rng, d_sae),
            "bias": vector(rng, d_in),
        }
    if arch in ("topk", "btopk"):
        return {**linear, "encoder.bias": vector(rng, d_sae), **top}
    if arch == "matbtopk":
        return {
            "W_enc": encoder.T.copy(),
            "W_dec": decoder,
            "b_enc": vector(rng, d_sae),
            "group_sizes": np.array([d_sae // 2, d_sae // 2]),
            **top,
        }
    if arch == "gated":
        return {
            **linear,
            "decoder_bias": vector(rng, d_in),
            **{n: vector(rng, d_sae) for n in ("r_mag", "gate_bias", "mag_bias")},
        }
    return {
        "W_enc": encoder.T.copy(),
        "W_dec": decoder,
        "b_enc": vector(rng, d_sae),
        "b_dec": vector(rng, d_in),
        "threshold": np.abs(vector(rng, d_sae, 0.5)),
    }


def by_hand(arch: str, t: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstruction in float64, from the published formulas."""
    t = {k: v.astype(np.float64) for k, v in t.items()}
    if arch in ("relu", "pan"):
        sizes = np.linalg.norm(t["decoder.weight"], axis=0)
        codes = np.maximum((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"], 0)
        return codes * sizes, codes @ t["decoder.weight"].T + t["bias"]
    if arch in ("topk", "btopk"):
        z = np.maximum((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 0)
        kept = z >= np.sort(z, 1)[:, -int(t["k"])][:, None] if arch == "topk" else z > t["threshold"]
        return z * kept, (z * kept) @ t["decoder.weight"].T + t["b_dec"]
    if arch == "matbtopk":
        z = np.maximum((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0)
        z = z * (z > t["threshold"])
    elif arch == "gated":
        u = (x - t["decoder_bias"]) @ t["encoder.weight"].T
        z = (u + t["gate_bias"] > 0) * np.maximum(np.exp(t["r_mag"]) * u + t["mag_bias"], 0)
        return z, z @ t["decoder.weight"].T + t["decoder_bias"]
    else:
        z = x @ t["W_enc"] + t["b_enc"]
        z = np.maximum(z, 0) * (z > t["threshold"])
    return z, z @ t["W_dec"] + t["b_dec"]


def saved(arrays: dict[str, np.ndarray]) -> bytes:
    body = io.BytesIO()
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}, body)
    return body.getvalue()


def configuration(arch: str, **changes: object) -> bytes:
    trainer = {
        "trainer_class": TRAINERS[arch],
        "activation_dim": 768,
        "dict_size": 4096,
        "layer": 8,
        "lm_name": PYTHIA,
        "k": 20,
        **changes,
    }
    return json.dumps({"trainer": trainer, "buffer": {"ctx_len": 1024}}).encode()


def publish(hub: Hub, name: str, body: bytes, config: bytes) -> None:
    spec = resolve(name)
    hub.add(spec.repository, spec.file, body)
    assert spec.config_file
    hub.add(spec.repository, spec.config_file, config)


@pytest.mark.parametrize("arch", FOLDERS)
def test_every_architecture_from_the_hub_to_codes(arch: str, hub: Hub):
    name = f"py_4k_{arch}_s2"
    arrays = checkpoint(arch, 768, 4096)
    publish(hub, name, saved(arrays), configuration(arch))
    x = np.random.default_rng(1).normal(size=(5, 768)).astype(np.float32)
    loaded = load_sae(name)
    codes, decoded = by_hand(arch, arrays, x.astype(np.float64))
    found = loaded.sae.encode(torch.from_numpy(x))
    np.testing.assert_allclose(found.to_dense().numpy(), codes, atol=1e-5)
    np.testing.assert_allclose(loaded.sae.decode(found).numpy(), decoded, atol=1e-4)
    assert 0 < (codes > 0).mean() < 0.9 and (loaded.hook, loaded.model, loaded.n_features) == (
        "blocks.8.hook_resid_post",
        PYTHIA,
        4096,
    )
    assert float((loaded.sae.W_dec.norm(dim=1) - 1).abs().max()) < 1e-5


def test_a_second_load_asks_for_no_file_again_and_offline_none_at_all(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    name = "py_4k_btopk_s0"
    steps: list[tuple[str, int, int]] = []
    publish(hub, name, saved(checkpoint("btopk", 768, 4096)), configuration("btopk"))
    hub.add(
        resolve(name).repository, resolve(name).file.replace("ae.pt", "eval_results.json"), b'{"l0": 19.5}'
    )
    assert cached(resolve(name)) is None
    first = load_sae(name, steps=lambda *step: steps.append(step))
    assert steps[-1][0] == f"fetch {name}" and steps[-1][1] == steps[-1][2] > 1_000_000
    assert measured_l0(resolve(name)) == 19.5 and cached(resolve(name)) is not None
    asked = len(hub.requests)
    assert load_sae(name).fingerprint == first.fingerprint
    assert {method for method, _ in hub.requests[asked:]} == {"HEAD"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert load_sae(name).fingerprint == first.fingerprint and len(hub.requests) == asked
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        load_sae("py_4k_btopk_s1")


def test_revisions_are_asked_for(hub: Hub):
    publish(hub, "py_4k_topk_s0", saved(checkpoint("topk", 768, 4096)), configuration("topk"))
    assert load_sae(f"py_4k_topk_s0@{COMMIT}").n_features == 4096
    with pytest.raises(UnknownNameError, match="at v9"):
        load_sae("py_4k_topk_s0@v9")


def test_gemma_scope_from_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(names_module._SCOPE_WIDTHS, "16k", 48)
    monkeypatch.setattr(names_module, "_SCOPE_MODEL", names_module._Model(GEMMA, 12, 16))
    arrays = checkpoint("jumprelu", 16, 48)
    body = io.BytesIO()
    np.savez(body, **arrays)
    spec = resolve("gscope_16k_l0_82")
    hub.add(spec.repository, spec.file, body.getvalue())
    x = np.random.default_rng(1).normal(size=(7, 16)).astype(np.float32)
    loaded = load_sae("gscope_16k_l0_82")
    codes, decoded = by_hand("jumprelu", arrays, x.astype(np.float64))
    np.testing.assert_allclose(loaded.sae.encode(torch.from_numpy(x)).to_dense().numpy(), codes, atol=1e-5)
    np.testing.assert_allclose(
        loaded.sae.decode(loaded.sae.encode(torch.from_numpy(x))).numpy(), decoded, atol=1e-5
    )
    with pytest.raises(UnknownNameError, match="average_l0_82"):
        load_sae("gscope_layer12_16k_l0_41")
    for bad, message in (
        ({**arrays, "threshold": arrays["threshold"][:9]}, r"'threshold' of .* is \[9\] instead of \[48\]"),
        ({k: v for k, v in arrays.items() if k != "b_enc"}, "no tensor 'b_enc'"),
        ({**arrays, "b_dec": np.array([{}] * 16, object)}, "Python objects"),
        ({**arrays, "b_enc": np.zeros(48, np.int64)}, "int64 instead of a float"),
    ):
        body = io.BytesIO()
        np.savez(body, **bad)  # type: ignore[arg-type]
        folder = tmp_path / message[:9].strip("'") / "layer_12" / "width_16k" / "average_l0_82"
        folder.mkdir(parents=True)
        (folder / "params.npz").write_bytes(body.getvalue())
        with pytest.raises(IncompatibleError, match=message):
            from featureinterp.sae.layouts.gemma_scope import read_gemma_scope

            read_gemma_scope(folder / "params.npz", model=GEMMA, layer=12, d_in=16, d_sae=48)


def test_a_trainer_that_is_numbered_otherwise_is_found_by_its_k(hub: Hub, caplog: pytest.LogCaptureFixture):
    spec = resolve("py_4k_btopk_s1")
    folder = str(Path(spec.file).parent.parent)
    for number, k in ((6, 80), (7, 20), (8, 40)):
        hub.add(spec.repository, f"{folder}/trainer_{number}/config.json", configuration("btopk", k=k))
        hub.add(
            spec.repository,
            f"{folder}/trainer_{number}/ae.pt",
            saved(checkpoint("btopk", 768, 4096, seed=number, k=k)),
        )
    with caplog.at_level(logging.WARNING, "featureinterp"):
        loaded = load_sae("py_4k_btopk_s1")
    assert loaded.config["trainer"]["k"] == 40 and "trainer_8" in caplog.text and "k = 40" in caplog.text
    with pytest.raises(UnknownNameError, match="trainer_3/config.json"):
        load_sae("py_4k_btopk_s3")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path(self.path),))


def test_what_is_not_what_it_should_be_is_refused(hub: Hub, tmp_path: Path):
    arrays = checkpoint("topk", 768, 4096)
    mark = tmp_path / "run"
    bomb = io.BytesIO()
    torch.save({"encoder.weight": Bomb(str(mark))}, bomb)
    long = arrays["decoder.weight"].copy()
    long[:, 77] *= 1.5
    nan = {**arrays, "b_dec": np.full(768, np.nan, np.float32)}
    cases: list[tuple[bytes, bytes, str]] = [
        (bomb.getvalue(), configuration("topk"), "would run code"),
        (pickle.dumps(Bomb(str(mark))), configuration("topk"), "would run code|cut or damaged"),
        (saved(arrays)[:-2000], configuration("topk"), "cut or damaged"),
        (b"not a file of tensors", configuration("topk"), "cut or damaged"),
        (
            saved({**arrays, "b_dec": arrays["b_dec"][:5]}),
            configuration("topk"),
            r"'b_dec' of .* is \[5\] instead of \[768\]",
        ),
        (saved({k: v for k, v in arrays.items() if k != "k"}), configuration("topk"), "no tensor 'k'"),
        (saved({**arrays, "decoder.weight": long}), configuration("topk"), "decoder row 77 .* norm 1.5"),
        (saved(nan), configuration("topk"), "not finite"),
        (
            saved({**arrays, "b_dec": np.zeros(768, np.int64)}),
            configuration("topk"),
            "int64 instead of a float",
        ),
        (
            saved(arrays),
            configuration("topk", lm_name=GEMMA),
            "lm_name = 'google/gemma-2-2b' where the name promises",
        ),
        (saved(arrays), configuration("topk", layer=9), "layer = 9 where the name promises 8"),
        (saved(arrays), configuration("topk", dict_size=8192), "dict_size = 8192"),
        (saved(arrays), configuration("topk", activation_dim=2304), "activation_dim = 2304"),
        (saved(arrays), configuration("btopk"), "architecture = 'batch_topk' where the name promises 'topk'"),
        (saved(arrays), configuration("topk", trainer_class="MagicTrainer"), "MagicTrainer"),
        (saved(arrays), b"{", "is not JSON"),
        (saved(arrays), b'{"trainer": 3}', "no table 'trainer'"),
    ]
    for number, (body, config, message) in enumerate(cases):
        name = f"py_4k_topk_s{number % 6}@{COMMIT}"
        repository = resolve(name).repository
        hub.files = {key: value for key, value in hub.files.items() if key[0] != repository}
        publish(hub, name, body, config)
        import shutil

        from huggingface_hub import constants

        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        with pytest.raises(IncompatibleError, match=message) as error:
            load_sae(name)
        assert "\n" not in str(error.value), message
    assert not mark.exists(), "no code of a file was run"


def test_an_untrained_threshold_and_code_in_a_threshold_are_refused(hub: Hub):
    publish(
        hub,
        "py_4k_btopk_s0",
        saved({**checkpoint("btopk", 768, 4096), "threshold": np.array(-1, np.float32)}),
        configuration("btopk"),
    )
    with pytest.raises(IncompatibleError, match="never learned"):
        load_sae("py_4k_btopk_s0")


def test_bodies_that_are_cut_or_other_than_declared_are_not_kept(hub: Hub):
    name = "py_4k_topk_s0"
    spec = resolve(name)
    publish(hub, name, saved(checkpoint("topk", 768, 4096)), configuration("topk"))
    for fault, error in ((hub.short, DownloadError), (hub.broken, DownloadError), (hub.lies, ChecksumError)):
        fault.add(spec.file)
        with pytest.raises(error) as raised:
            load_sae(name)
        assert "\n" not in str(raised.value) and cached(spec) is None
        fault.clear()
    hub.cut.add(spec.file)
    assert load_sae(name).n_features == 4096 and not hub.cut, "a connection that breaks is gone on with"
    assert hub.requests.count(("GET", f"/{spec.repository}/resolve/main/{spec.file}")) >= 4


def test_a_hub_that_is_not_there_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(DownloadError, match="the hub cannot be reached"):
        load_sae("py_4k_topk_s0")


def norms_of(folder: Path) -> np.ndarray:
    """The lengths of the decoder's rows: SAELens gives codes in units of them, this project in units of the
    residual stream.
    """
    from safetensors.numpy import load_file

    return np.linalg.norm(load_file(folder / "sae_weights.safetensors")["W_dec"], axis=1)


@pytest.mark.parametrize("form", sorted(p.name for p in SAELENS.iterdir()))
def test_saelens_folders_encode_as_saelens_does(form: str):
    expected = json.loads((SAELENS / form / "expected.json").read_text())
    loaded = load_sae(str(SAELENS / form))
    found = loaded.sae.encode(torch.tensor(expected["x"]))
    codes = np.array(expected["codes"]) * (1 if form.startswith("topk") else norms_of(SAELENS / form))
    np.testing.assert_allclose(found.to_dense().numpy(), codes, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        loaded.sae.decode(found).numpy(), np.array(expected["decoded"]), rtol=1e-5, atol=1e-5
    )
    assert (loaded.hook, loaded.model) == ("blocks.8.hook_resid_post", "pythia-160m-deduped")


EXPORTED = SAELENS.with_name("saelens-exported")


def exported_sae(form: str) -> SparseAutoencoder:
    architecture, _, normalize = form.partition("-")
    sae = make_sae(architecture, 6, 10)
    return type(sae)(sae.tensors, normalize="layer_norm" if normalize else "none", **sae.options)


@pytest.mark.parametrize("form", sorted(p.name for p in EXPORTED.iterdir()))
def test_what_is_exported_for_saelens_encodes_there_as_here(form: str, tmp_path: Path):
    """The folders that SAELens loaded are those that are exported now, to the byte; its codes and
    reconstructions are ours.
    """
    sae = exported_sae(form)
    save_saelens(tmp_path, sae, hook="blocks.8.hook_resid_post", model="pythia-160m-deduped")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (EXPORTED / form / name).read_bytes(), name
    expected = json.loads((EXPORTED / form / "expected.json").read_text())
    found = sae.encode(torch.tensor(expected["x"]))
    assert len(found.values) > 10
    np.testing.assert_allclose(found.to_dense().numpy(), np.array(expected["codes"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found).numpy(), np.array(expected["decoded"]), rtol=1e-4, atol=1e-4)


def test_saelens_folders_that_mean_something_else_are_refused(tmp_path: Path):
    for change, message in (
        (
            {"normalize_activations": "constant_norm_rescale"},
            "normalize_activations = 'constant_norm_rescale'",
        ),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"architecture": "temporal"}, "temporal"),
        ({"d_sae": 11}, "instead of"),
        ({"metadata": {}}, "does not say which hook"),
    ):
        folder = tmp_path / message[:8]
        folder.mkdir()
        source = SAELENS / "standard"
        (folder / "sae_weights.safetensors").write_bytes((source / "sae_weights.safetensors").read_bytes())
        (folder / "cfg.json").write_text(
            json.dumps({**json.loads((source / "cfg.json").read_text()), **change})
        )
        with pytest.raises(IncompatibleError, match=message):
            load_sae(str(folder))


def test_older_saelens_configurations_are_read(tmp_path: Path):
    """Before version 6, hook and model stood beside the sizes, and a TopK SAE was a standard one with another
    activation.
    """
    for name in ("sae_weights.safetensors", "expected.json"):
        (tmp_path / name).write_bytes((SAELENS / "topk" / name).read_bytes())
    old = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "d_in": 6,
        "d_sae": 10,
        "apply_b_dec_to_input": True,
    }
    (tmp_path / "cfg.json").write_text(
        json.dumps({**old, "hook_name": "blocks.3.hook_resid_pre", "model_name": "gpt2"})
    )
    loaded = load_sae(str(tmp_path))
    expected = json.loads((tmp_path / "expected.json").read_text())
    np.testing.assert_allclose(
        loaded.sae.encode(torch.tensor(expected["x"])).to_dense().numpy(),
        np.array(expected["codes"]),
        rtol=1e-5,
        atol=1e-5,
    )
    assert loaded.hook == "blocks.2.hook_resid_post"


def test_a_release_of_saelens_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UnknownNameError, match=r"featureinterp\[saelens\]"):
        load_sae("saelens:gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical")
    with pytest.raises(UnknownNameError, match="RELEASE/ID"):
        load_sae("saelens:only")


def test_a_release_of_saelens_is_what_its_package_loads(monkeypatch: pytest.MonkeyPatch):
    """The package played: it knows one release, which holds what the real one saved."""
    from safetensors.torch import load_file

    form = SAELENS / "jumprelu-centred"
    expected = json.loads((form / "expected.json").read_text())

    class SAE:
        @staticmethod
        def from_pretrained(release: str, sae_id: str, device: str) -> SimpleNamespace:
            if release == "broken":
                raise RuntimeError("no route to host")
            if (release, sae_id) != ("my-release", "layer_8/canonical"):
                raise ValueError(f"ID {sae_id} not found in release {release}.")
            config = json.loads((form / "cfg.json").read_text())
            return SimpleNamespace(
                state_dict=lambda: load_file(form / "sae_weights.safetensors"),
                cfg=SimpleNamespace(to_dict=lambda: config),
            )

    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=SAE))
    loaded = load_sae("saelens:my-release/layer_8/canonical")
    codes = np.array(expected["codes"]) * norms_of(form)
    np.testing.assert_allclose(
        loaded.sae.encode(torch.tensor(expected["x"])).to_dense().numpy(), codes, rtol=1e-5, atol=1e-5
    )
    assert load_sae("saelens:my-release/layer_8/canonical").fingerprint == loaded.fingerprint
    with pytest.raises(UnknownNameError, match="not found in release"):
        load_sae("saelens:my-release/other")
    with pytest.raises(DownloadError, match="no route to host"):
        load_sae("saelens:broken/x")


def test_local_folders_of_the_neighbours(tmp_path: Path):
    arrays = checkpoint("gated", 768, 64)
    (tmp_path / "ae.pt").write_bytes(saved(arrays))
    (tmp_path / "config.json").write_bytes(
        configuration("gated", dict_size=64, submodule_name="resid_post_layer_8")
    )
    loaded = load_sae(str(tmp_path))
    assert loaded.sae.architecture == "gated" and loaded.n_features == 64
    scope = tmp_path / "gemma-scope-2b-pt-res" / "layer_7" / "width_16k" / "average_l0_9"
    scope.mkdir(parents=True)
    np.savez(scope / "params.npz", **checkpoint("jumprelu", 2304, 8))
    assert (load_sae(str(scope)).hook, load_sae(str(scope)).model) == ("blocks.7.hook_resid_post", GEMMA)
    (tmp_path / "elsewhere").mkdir()
    (scope / "params.npz").rename(tmp_path / "elsewhere" / "params.npz")
    with pytest.raises(IncompatibleError, match="does not say which layer"):
        load_sae(str(tmp_path / "elsewhere"))
    with pytest.raises(UnknownNameError, match="holds no SAE"):
        load_sae(str(scope))


def featureinterp(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "featureinterp", *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_the_command_lists_shows_and_fetches(tmp_path: Path):
    with serving(Hub()) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        shown = featureinterp("saes", "show", "gem_16k_btopk_s3", "--json", **environment)
        found = json.loads(shown.stdout)
        assert shown.returncode == 0 and not hub.requests, "nothing is asked of the network"
        assert (
            found["repository"] == "canrager/saebench_gemma-2-2b_width-2pow14_date-0107"
            and found["cached"] is False
            and found["d_sae"] == 16384
        )
        assert {"file", "revision", "model", "layer", "hook", "architecture", "l0"} <= set(found)
        publish(hub, "py_4k_topk_s0", saved(checkpoint("topk", 768, 4096)), configuration("topk"))
        fetched = featureinterp("saes", "fetch", "py_4k_topk_s0", **environment)
        assert fetched.returncode == 0, fetched.stderr
        assert (
            json.loads(featureinterp("saes", "show", "py_4k_topk_s0", "--json", **environment).stdout)[
                "cached"
            ]
            is True
        )
        assert json.loads(
            featureinterp(
                "saes", "fetch", "py_4k_topk_s0", "--json", **{**environment, "HF_HUB_OFFLINE": "1"}
            ).stdout
        )["fetched"]
        listed = featureinterp("saes", "list", "--json", **environment)
        rows = json.loads(listed.stdout)["saes"]
        assert len(rows) == 1 + 252 + len(gemma_scope_names()) and sum(r["cached"] for r in rows) == 2, (
            "the demo's and the one that was fetched"
        )
        narrow = featureinterp("saes", "list", "py_4k", **environment).stdout
        assert "py_4k_topk_s0" in narrow and "gem_" not in narrow
        wrong = featureinterp("saes", "show", "py_4k_topk_s9", **environment)
        assert (
            wrong.returncode == 2 and "'s9' is no number" in wrong.stderr and "Traceback" not in wrong.stderr
        )


def test_an_sae_of_another_model_is_refused_with_those_that_fit(subject: object):
    from dataclasses import replace

    from featureinterp.codes.fit import check_fit
    from featureinterp.sae.load import LoadedSae

    mine = LoadedSae(
        "py_4k_topk_s0", make_sae("topk", subject.d_model, 8), "blocks.0.hook_resid_post", PYTHIA, {}, "x"
    )
    check_fit(replace(subject, name="pythia-160m-deduped"), mine)
    check_fit(replace(subject, name="someone/pythia-160m-deduped-chat"), mine)
    check_fit(
        replace(subject, name="openai-community/gpt2"),
        replace(mine, name="saelens:gpt2-small-res-jb/x", model="gpt2-small"),
    )
    check_fit(
        replace(subject, name="unsloth/Llama-3.1-8B"), replace(mine, model="meta-llama/Meta-Llama-3.1-8B")
    )
    with pytest.raises(InputError, match=r"made for EleutherAI/pythia-160m-deduped.*gem_4k_btopk_s0"):
        check_fit(replace(subject, name="google/gemma-2-2b"), mine)
    folder = replace(mine, name="/saes/one")
    for model, other in (
        ("gpt2-small", "Qwen/Qwen2.5-0.5B"),
        ("pythia-160m", PYTHIA),
        ("tiny", "tiny-2/other"),
        ("gpt2", "gpt-neo-125m"),
    ):
        with pytest.raises(InputError, match=f"was made for {model}, and not for {other}"):
            check_fit(replace(subject, name=other), replace(folder, model=model))


def test_the_family_of_a_model_in_a_folder_is_compared(subject: object, subject_folder: Path):
    """A folder may have any name; the model in it is a Llama, and so are those of the names that it may
    be.
    """
    from dataclasses import replace

    from featureinterp.codes.fit import check_fit
    from featureinterp.sae.load import LoadedSae

    mine = LoadedSae(
        "/saes/one", make_sae("topk", subject.d_model, 8), "blocks.0.hook_resid_post", "tiny", {}, "x"
    )
    assert subject.name == str(subject_folder) and subject.model.config.model_type == "llama"
    for model in ("tiny", "", "/somewhere/else", "meta-llama/Llama-3.1-8B", "smollm2-135m-instruct"):
        check_fit(subject, replace(mine, model=model))
    for model in (PYTHIA, "gpt2-small", GEMMA, "Qwen/Qwen2.5-0.5B"):
        with pytest.raises(InputError, match="was made for"):
            check_fit(subject, replace(mine, model=model))


def test_an_sae_that_saw_no_bos_is_refused_where_one_is_read(
    subject: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from dataclasses import replace

    from tiny import make_subject_folder

    from featureinterp.codes.fit import check_fit
    from featureinterp.sae.load import LoadedSae
    from featureinterp.subject.load import load_subject

    mine = LoadedSae(
        "/saes/one", make_sae("topk", subject.d_model, 8), "blocks.0.hook_resid_post", "tiny", {}, "x"
    )
    check_fit(subject, replace(mine, prepend_bos=True))
    with pytest.raises(InputError, match="without a BOS in front"):
        check_fit(subject, replace(mine, prepend_bos=False))
    plain = load_subject(
        str(make_subject_folder(tmp_path, "llama", bos=False)), device="cpu", dtype="float32"
    )
    check_fit(plain, replace(mine, prepend_bos=False))
    assert not caplog.records
    check_fit(plain, replace(mine, prepend_bos=True))
    assert "was trained with a BOS" in caplog.text
