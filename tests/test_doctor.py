"""The doctor on a test bench: silent on a healthy run, and each planted defect is found by the check that is
meant for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markers import change_marker
from safetensors.torch import save_file
from test_cli import cli

from featureinterp.api import training as verbs
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.errors import IncompatibleError
from featureinterp.subject.load import load_subject, load_tokenizer
from featureinterp.training.doctor.activations import look_at_windows
from featureinterp.training.doctor.bench import speeds
from featureinterp.training.doctor.check import Check, Sheet
from featureinterp.training.doctor.model import look_at_environment, offsets
from featureinterp.training.doctor.run import claimed
from featureinterp.training.extract import ExtractSettings, extract
from featureinterp.training.settings import TrackingTable, make_recipe
from featureinterp.training.store import SIDES, ActivationStore, shard_path

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of words that no two share in order; each has a topic of its own, so that the order of
    documents can be seen in the activations.
    """
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for i in range(40):
        letters = list("abcdefghijklmnopqrstuvwxyz"[2 * (i // 4) : 2 * (i // 4) + 8])
        words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(300)]
        (folder / f"{i:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, subject_folder: Path, texts: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "topk-k6-d96-lr3e-3-mix4-auxk"
    tables = {
        "subject": {"model": str(subject_folder), "hook": HOOK, "dtype": "float32"},
        "corpus": {"name": str(texts), "window": 16, "held_out": 0.2},
        "store": {"shard_rows": 2000},
        "sae": {"d_sae": 96, "k": 6, "dead_after": 20_000},
        "training": {"samples": 200_000, "batch": 256, "lr": 3e-3, "mix": 4, "log_every": 20},
        "evaluation": {"ce_windows": 0, "pca": 4},
    }
    verbs.train(folder, make_recipe(tables))
    return folder


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    """A copy of the healthy run, to plant a defect in."""
    folder = tmp_path / healthy.name
    shutil.copytree(healthy, folder)
    change(folder / "run.json", activations=str(folder / "activations"))
    return folder


def change(path: Path, **values: Any) -> None:
    change_marker(path, **values)


def checks(run: Path, **options: Any) -> list[Check]:
    return list(verbs.doctor(run, **options))


def wrong(found: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in found if c.status in ("warn", "fail")}


def test_the_doctor_is_silent_on_a_healthy_run(healthy: Path, texts: Path):
    found = checks(healthy, corpus=str(texts))
    assert not wrong(found), wrong(found)
    names = {(c.subject, c.name) for c in found if c.status == "pass"}
    assert {s for s, _ in names} == {
        "model",
        "corpus",
        "windows",
        "activations",
        "held-out activations",
        "split",
        "training",
        "result",
        "environment",
    }
    assert len(names) >= 35
    assert next(c for c in found if c.name == "its name says what it is").figure == "6 settings named"
    assert "mixing is not needed" in next(c for c in found if c.name == "shards are mixed").figure


def rewrite(
    folder: Path,
    rows: Callable[[np.ndarray, dict[str, np.ndarray]], tuple[np.ndarray, dict[str, np.ndarray]]],
    **meta: Any,
) -> None:
    """Writes the rows of a store again, changed, as if it had been made so."""
    store = ActivationStore.open(folder)
    values, sides = rows(
        store.read(np.arange(len(store))), {name: np.array(getattr(store, name)) for name in SIDES}
    )
    size = store.meta["shards"][0]
    dtype = store.shards[0].dtype
    shards = [values[i : i + size] for i in range(0, len(values), size)]
    for path in folder.glob("shard-*.bin"):
        path.unlink()
    for number, shard in enumerate(shards):
        shard_path(folder, number).write_bytes(shard.astype(dtype).tobytes())
    for name, side in sides.items():
        (folder / f"{name}.bin").write_bytes(side.astype(np.int32).tobytes())
    change(folder / "metadata.json", n_rows=len(values), shards=[len(s) for s in shards], **meta)


def shifted_layer(run: Path) -> None:
    """Rows of the block before, as if index 0 of the hidden states were the first block."""
    acts = run / "activations"
    other = verbs.extract(
        run.parent / "other", run / "recipe.toml", changes={"subject.hook": "blocks.0.hook_resid_post"}
    )
    assert other.train is not None
    values = other.train.read(np.arange(len(other.train)))
    rewrite(acts / "train", lambda x, sides: (values, sides))


def loss_mask(run: Path) -> None:
    """The first half of every window is not learned, and so was not stored."""
    rewrite(
        run / "activations" / "train",
        lambda x, sides: (x[sides["offsets"] >= 8], {n: s[sides["offsets"] >= 8] for n, s in sides.items()}),
    )


def padding(run: Path) -> None:
    def add(x: np.ndarray, sides: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        extra = {"documents": 0, "windows": 0, "offsets": 40, "tokens": -1}
        return np.concatenate([x, x[:50]]), {
            n: np.concatenate([s, np.full(50, extra[n])]) for n, s in sides.items()
        }

    rewrite(run / "activations" / "train", add)


def bfloat16_store(run: Path) -> None:
    change(run / "activations" / "train" / "metadata.json", dtype="bfloat16")


def bfloat16_bits(run: Path) -> None:
    """bfloat16 written as it is, and called float16."""
    folder = run / "activations" / "train"
    for path in folder.glob("shard-*.bin"):
        values = torch.from_numpy(np.fromfile(path, np.float16).astype(np.float32)).bfloat16()
        path.write_bytes(values.view(torch.int16).numpy().tobytes())
    change(folder / "metadata.json")


def truncated_merge(run: Path) -> None:
    """The last shard of a worker never arrived, and nobody counted."""
    folder = run / "activations" / "train"
    meta = json.loads((folder / "metadata.json").read_text())
    kept = sum(meta["shards"][:-1])
    for name in SIDES:
        data = np.fromfile(folder / f"{name}.bin", np.int32)[:kept]
        (folder / f"{name}.bin").write_bytes(data.tobytes())
    change(
        folder / "metadata.json",
        n_rows=kept,
        shards=meta["shards"][:-1],
        part={"number": 0, "of": 1, "merged": 4},
    )


def lost_shard(run: Path) -> None:
    shard_path(run / "activations" / "train", 1).unlink()


def corpus_ordered(run: Path) -> None:
    """Rows in the order of the documents."""
    rewrite(
        run / "activations" / "train",
        lambda x, sides: (
            x[np.argsort(sides["windows"], kind="stable")],
            {n: s[np.argsort(sides["windows"], kind="stable")] for n, s in sides.items()},
        ),
    )


def log_with(run: Path, alter: Callable[[int, int, dict[str, Any]], dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k != "checksum"} for line in lines]
    (run / "log.jsonl").write_text(
        "".join(json.dumps({**line, **alter(i, len(lines), line)}) + "\n" for i, line in enumerate(lines))
    )


def wrong_horizon(run: Path) -> None:
    """A cosine planned for ten times as many steps."""
    change(run / "run.json", decay_steps=7810)


def rate_left_high(run: Path) -> None:
    log_with(run, lambda i, n, line: {"lr": 3e-3 * (1 - 0.1 * i / n)})


def flag_off(run: Path) -> None:
    """The name says that the auxiliary loss is on."""
    change(run / "run.json", aux_k=0)


def dead_stuck(run: Path) -> None:
    log_with(run, lambda i, n, line: {"dead": min(0.8, 0.2 * i)})


def too_many_codes(run: Path) -> None:
    log_with(run, lambda i, n, line: {"l0": 300 - 280 * i / n})


def loss_rises(run: Path) -> None:
    log_with(run, lambda i, n, line: {"loss": 0.3 + i / n, "fvu": 1.2})


def diverged(run: Path) -> None:
    log_with(run, lambda i, n, line: {"loss": float("nan") if i == n - 1 else line["loss"]})


def zero_codes(run: Path) -> None:
    """Undoing a per-token normalisation explains the raw variance without any code."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["sae"]["raw"], metrics["zero"]["raw"], metrics["l0"] = 0.72, 0.70, 0.1
    change(run / "metrics.json", **metrics)


def too_good(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["sae"]["raw"] = 0.993
    change(run / "metrics.json", **metrics)


def sinks(run: Path) -> None:
    def stretch(x: np.ndarray, sides: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x[sides["offsets"] == 0] *= 100
        return x, sides

    rewrite(run / "activations" / "train", stretch)


def one_token_late(run: Path) -> None:
    """Every row is that of the token before: the BOS was counted."""

    def shift(x: np.ndarray, sides: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return np.roll(x, 1, 0), sides

    rewrite(run / "activations" / "train", shift)


def other_provenance(run: Path) -> None:
    folder = run / "activations" / "train"
    source = json.loads((folder / "metadata.json").read_text())["source"]
    source["model"]["fingerprint"] = "0" * 64
    change(folder / "metadata.json", source=source)


def trained_on_other_rows(run: Path) -> None:
    change(run / "run.json", data="0" * 32)


def leak(run: Path) -> None:
    """Rows of training documents in the held-out store."""
    train = ActivationStore.open(run / "activations" / "train")
    n = 200
    extra = {name: np.array(getattr(train, name)[:n]) for name in SIDES}
    rows = train.read(np.arange(n))
    rewrite(
        run / "activations" / "test",
        lambda x, sides: (
            np.concatenate([x, rows]),
            {k: np.concatenate([s, extra[k]]) for k, s in sides.items()},
        ),
    )


def not_finite(run: Path) -> None:
    path = shard_path(run / "activations" / "train", 1)
    data = np.fromfile(path, np.float16)
    data[321] = np.nan
    path.write_bytes(data.tobytes())
    change(path.parent / "metadata.json")


def flipped_bit(run: Path) -> None:
    path = shard_path(run / "activations" / "train", 1)
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def damaged_metrics(run: Path) -> None:
    path = run / "metrics.json"
    path.write_text(path.read_text().replace("1", "2", 1))


def damaged_windows(run: Path) -> None:
    path = run / "activations" / "windows" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])


def layouts_differ(run: Path) -> None:
    cfg = json.loads((run / "saelens" / "cfg.json").read_text())
    (run / "saelens" / "cfg.json").write_text(json.dumps({**cfg, "apply_b_dec_to_input": False}))


def massive_channel(run: Path) -> None:
    def widen(x: np.ndarray, sides: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x[:, 7] *= 8
        return x, sides

    rewrite(run / "activations" / "train", widen)


DEFECTS: list[tuple[Callable[[Path], None], str, str]] = [
    (shifted_layer, "rows are the model's own", "hidden state 1 instead of 2"),
    (loss_mask, "every valid token is there", "loss mask"),
    (padding, "no padding is stored", "padding is no text"),
    (bfloat16_store, "the store is whole", "bfloat16"),
    (bfloat16_bits, "rows are the model's own", "damaged"),
    (truncated_merge, "every valid token is there", "a worker"),
    (lost_shard, "the store is whole", "shard-00001.bin is missing"),
    (corpus_ordered, "shards are mixed", "order of the corpus"),
    (wrong_horizon, "the learning rate ends with the run", "same number of steps"),
    (rate_left_high, "the learning rate ends with the run", "same number of steps"),
    (flag_off, "its name says what it is", "never passed on"),
    (dead_stuck, "dead features come back", "aux_k"),
    (loss_rises, "the loss falls", "training.lr"),
    (diverged, "the loss is finite", "diverged"),
    (zero_codes, "its codes do the explaining", "without a single code"),
    (too_good, "it is not too good", "suspect"),
    (sinks, "no attention sinks are in it", "mask"),
    (one_token_late, "rows are the model's own", "misaligned by one token"),
    (other_provenance, "it is of this model and corpus", "proves nothing"),
    (trained_on_other_rows, "it was trained on these activations", "trained on"),
    (leak, "held-out documents are held out", "split by documents"),
    (not_finite, "all rows are finite", "float32"),
    (damaged_windows, "they are whole", "instead of"),
    (flipped_bit, "the store is whole", "damaged at byte"),
    (damaged_metrics, "it was evaluated", "metrics.json is damaged"),
    (too_many_codes, "its codes are as few as asked for", "sae.penalty"),
    (layouts_differ, "the exported SAE loads", "encode the same input differently"),
    (massive_channel, "no channel dominates", "channel 7"),
]


@pytest.mark.parametrize(("plant", "name", "hint"), DEFECTS, ids=[d[0].__name__ for d in DEFECTS])
def test_a_planted_defect_is_found(run: Path, plant: Callable[[Path], None], name: str, hint: str):
    plant(run)
    found = wrong(checks(run))
    assert name in found, found
    assert hint in found[name].advice, found[name]


def test_a_loss_of_which_nothing_can_be_recovered_is_left_out():
    from featureinterp.training.doctor.check import Sheet
    from featureinterp.training.doctor.run import _readable

    sheet = Sheet("result")
    for loss in (
        {"recovered": None, "undefined": "zeros are better"},
        {"recovered": None},
        {"recovered": 0.5},
        {"recovered": -0.5},
    ):
        _readable(sheet, loss)
    assert [(c.status, c.figure) for c in sheet][:2] == [
        ("skip", "zeros are better"),
        ("skip", "zeros cost the model nothing"),
    ]
    assert [c.status for c in sheet][2:] == ["pass", "fail"]


def test_defects_of_the_environment_and_of_the_tokenizer():
    table = TrackingTable(to="wandb", project="mine", entity="me")
    for environment, status in (
        ({}, "pass"),
        ({"WANDB_PROJECT": "mine"}, "pass"),
        ({"WANDB_ENTITY": "other"}, "warn"),
    ):
        sheet = Sheet("environment")
        look_at_environment(sheet, table, environment)
        assert sheet.found[0].status == status, environment


class Shifted:
    """A tokenizer's encodings whose offsets are those of the token before."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, texts: list[str]) -> list[Any]:
        from types import SimpleNamespace

        return [
            SimpleNamespace(ids=e.ids, offsets=[(0, 0), *e.offsets[:-1]]) for e in self.encoder.encode(texts)
        ]


def test_offsets_that_are_misaligned_by_one(subject):
    texts = ["The army marched in March and the fleet sailed in May.", "café 日本 end"]
    for encoder, status in ((subject.encoder, "pass"), (Shifted(subject.encoder), "fail")):
        sheet = Sheet("corpus")
        offsets(sheet, encoder, subject.tokenizer, texts)
        assert sheet.found[0].status == status, sheet.found
    assert "by one" in sheet.found[0].advice


class Cutting:
    """A tokenizer that leaves the rest of a text to its last token."""

    fingerprint = "cutting"

    def __init__(self, encoder: Any, n: int) -> None:
        self.encoder, self.n = encoder, n

    def encode(self, texts: list[str]) -> list[Any]:
        from types import SimpleNamespace

        return [
            SimpleNamespace(ids=e.ids[: self.n], offsets=e.offsets[: self.n])
            for e in self.encoder.encode(texts)
        ]


def test_tokens_that_do_not_cover_the_text(subject, texts: Path, tmp_path: Path):
    found = {}
    for name, encoder in (("whole", subject.encoder), ("cut", Cutting(subject.encoder, 64))):
        sheet = Sheet("corpus")
        offsets(sheet, encoder, subject.tokenizer, [d.text for d in load_corpus(str(texts))][:3])
        windows = build_windows(load_corpus(str(texts)), encoder, WindowPolicy(16), tmp_path / name)
        look_at_windows(sheet, windows)
        found[name] = [c for c in sheet.found if c.name == "tokens cover the text"]
    assert [c.status for c in found["whole"]] == ["pass", "pass"] and " 0 are in no token" in found["whole"][
        0
    ].figure
    assert [c.status for c in found["cut"]] == ["fail", "fail"]
    assert (
        found["cut"][0].figure.startswith("192 tokens for ") and "one token with 1," in found["cut"][1].figure
    )


def test_the_share_of_windows_that_repeat_others_is_said(
    tmp_path: Path, subject, subject_folder: Path, texts: Path
):
    header = "It was resolved by both houses that the following be printed. " * 8
    for path in texts.iterdir():
        (tmp_path / path.name).write_text(header + path.read_text()[:400])
    check = wrong(list(verbs.doctor(model=str(subject_folder), hook=HOOK, corpus=str(tmp_path), window=16)))[
        "windows differ"
    ]
    assert check.status == "warn" and "of one" in check.advice
    share = float(check.figure.split("%")[0]) / 100
    rows = [
        tuple(e.ids[i : i + 16])
        for p in sorted(tmp_path.iterdir())[:20]
        for e in subject.encoder.encode([p.read_text()])
        for i in range(0, len(e.ids) - 15, 16)
    ]
    assert share == pytest.approx(1 - len(set(rows)) / len(rows), abs=1e-3) and share > 0.3


def test_a_tokenizer_of_another_model_is_a_finding(tmp_path: Path, subject_folder: Path):
    folder = tmp_path / "m"
    shutil.copytree(subject_folder, folder)
    big = load_tokenizer(str(subject_folder))
    big.add_tokens([f"token{i}" for i in range(600)])
    big.save_pretrained(folder)
    found = wrong(list(verbs.doctor(model=str(folder), hook=HOOK)))
    assert found["its tokens are in its embedding"].status == "warn"
    (corpus := tmp_path / "c.txt").write_text("token500 is no token of the model")
    subject = load_subject(str(folder), dtype="float32", device="cpu")
    with pytest.raises(IncompatibleError, match="its embedding has 512 rows"):
        extract(
            subject, HOOK, load_corpus(str(corpus)), tmp_path / "x", WindowPolicy(4, 2), ExtractSettings(0.0)
        )


def test_a_converted_checkpoint_that_is_empty(tmp_path: Path, subject_folder: Path):
    folder = tmp_path / "converted"
    shutil.copytree(subject_folder, folder)
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors", metadata={"format": "pt"})
    found = wrong(list(verbs.doctor(model=str(folder), hook=HOOK)))
    assert (
        "weights are not in the checkpoint" in found["its checkpoint is whole"].figure
        and found["its checkpoint is whole"].status == "fail"
    )
    (folder / "model.safetensors").unlink()
    found = wrong(list(verbs.doctor(model=str(folder), hook=HOOK)))
    assert found["the model loads"].status == "fail"


def test_before_anything_is_made(subject_folder: Path, texts: Path, tmp_path: Path):
    found = list(
        verbs.doctor(model=str(subject_folder), hook=HOOK, corpus=str(texts), window=16, dtype="float32")
    )
    assert not wrong(found)
    assert (
        wrong(list(verbs.doctor(model=str(subject_folder), hook="blocks.9.hook_resid_post")))[
            "the hook exists"
        ].status
        == "fail"
    )
    assert (
        wrong(list(verbs.doctor(model=str(subject_folder), hook=HOOK, window=2048)))[
            "windows fit its context"
        ].advice
        == "choose a window of at most 2047 tokens"
    )
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert wrong(list(verbs.doctor(corpus=str(empty))))["it is not empty"].status == "fail"
    binary = tmp_path / "b.txt"
    binary.write_bytes(bytes(range(256)) * 40)
    assert wrong(list(verbs.doctor(corpus=str(binary))))["it can be read"].status == "fail"


@pytest.mark.parametrize(
    ("name", "claims"),
    [
        ("topk-k32-d4608", [("sae.architecture", "topk"), ("sae.k", 32.0), ("sae.d_sae", 4608.0)]),
        (
            "matryoshka_x8_bf16_lr1e-4",
            [
                ("sae.architecture", "matryoshka_batch_topk"),
                ("sae.expansion", 8.0),
                ("training.precision", "bfloat16"),
                ("training.lr", 1e-4),
            ],
        ),
        ("my-run", []),
        ("2026-11-22-mix10.presample8", [("training.mix", 10.0), ("training.presample", 8.0)]),
    ],
)
def test_what_a_name_claims(name: str, claims: list[tuple[str, Any]]):
    assert claimed(name) == claims


def test_the_command(run: Path, healthy: Path):
    done = cli("doctor", str(healthy))
    assert done.returncode == 0 and "0 warnings, 0 failed" in done.stdout, done.stdout + done.stderr
    leak(run)
    done = cli("doctor", str(run), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["counts"]["fail"] >= 1
    assert {c["status"] for c in found["checks"]} <= {"pass", "warn", "fail", "skip"}
    shown = cli("doctor", str(run / "activations"), "--no-model")
    assert "FAIL  held-out documents are held out" in shown.stderr


def test_a_single_store_and_one_that_was_never_finished(run: Path):
    assert not wrong(checks(run / "activations" / "train", load_model=False))
    (run / "activations" / "train" / "metadata.json").unlink()
    found = wrong(checks(run / "activations" / "train", load_model=False))
    assert "never finished" in found["the store is whole"].advice


def test_speeds(subject):
    found = list(speeds(subject, HOOK, batches=(1, 2), lengths=(16, 4096), least_s=0.0))
    assert [(s.batch, s.length) for s in found] == [(1, 16), (2, 16)]  # 4,096 are beyond its context
    assert all(s.tokens_per_s and s.peak_bytes for s in found)
