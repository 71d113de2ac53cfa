"""What ``auto`` stands for. Capabilities are given; nothing is timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_sae, make_subject_folder

from featureinterp import machine as rooms
from featureinterp.api.local import subject_of
from featureinterp.api.planning import AIM_S, machine_lines, plan_demo, planned
from featureinterp.api.planning import machine as look
from featureinterp.codes.collect import collect
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.jobs.resolved import live_choice
from featureinterp.live.activator import RunActivator, live_settings
from featureinterp.machine import Machine, pick_device, pick_dtype, this_machine, x86_bfloat16
from featureinterp.sae.load import load_sae, save_sae
from featureinterp.stored.sums import read_marker
from featureinterp.subject.load import check_same_model, load_subject
from featureinterp.training.parts import fitted, resolved
from featureinterp.training.settings import make_recipe

HOOK = "blocks.1.hook_resid_post"
PLAIN = Machine("a laptop", "AVX2", 2, "emulated")
SERVER = replace(PLAIN, instructions="AVX512 with bfloat16", bfloat16="native")
GPU = replace(PLAIN, accelerator="cuda", accelerator_name="a GPU", accelerator_bfloat16=True)
OLD_GPU = replace(GPU, accelerator_bfloat16=False)
BF16, AMX = {"avx512_bf16": True}, {"amx_bf16": True}


@pytest.mark.parametrize(
    ("instructions", "flags", "environment", "expected"),
    [
        ("AVX2", {}, {}, "emulated"),
        ("AVX512", {"avx512_vnni": True}, {}, "emulated"),
        ("AVX512", BF16, {}, "native"),
        ("AVX512", AMX, {}, "native"),
        ("AVX2", BF16 | AMX, {}, "emulated"),  # torch was told to use no more than AVX2
        ("AVX512", BF16, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "emulated"),
        ("AVX512", BF16, {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "emulated"),
        ("AVX512", AMX, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "native"),
        ("DEFAULT", BF16, {}, "emulated"),
    ],
)
def test_which_processors_have_bfloat16(instructions: str, flags: dict, environment: dict, expected: str):
    assert x86_bfloat16(instructions, flags, environment) == expected


@pytest.mark.parametrize(
    ("machine", "device", "made_in", "expected"),
    [
        (PLAIN, None, None, ("cpu", "float32")),
        (PLAIN, "auto", "bfloat16", ("cpu", "float32")),
        (PLAIN, None, "float16", ("cpu", "float32")),
        (SERVER, None, None, ("cpu", "bfloat16")),
        (SERVER, None, "float32", ("cpu", "float32")),
        (SERVER, None, "float16", ("cpu", "float32")),
        (GPU, None, None, ("cuda", "bfloat16")),
        (GPU, "cuda:1", None, ("cuda:1", "bfloat16")),
        (GPU, "cpu", None, ("cpu", "float32")),
        (GPU, None, "float16", ("cuda", "float16")),
        (OLD_GPU, None, None, ("cuda", "float32")),
        (OLD_GPU, None, "float16", ("cuda", "float16")),
        (replace(OLD_GPU, accelerator="mps"), None, None, ("mps", "float32")),
        (replace(GPU, accelerator="mps"), None, None, ("mps", "bfloat16")),
    ],
)
def test_auto_is_what_the_device_computes_itself(
    machine: Machine, device: str, made_in: str, expected: tuple
):
    assert (machine.device(device), machine.dtype(None, device, made_in=made_in)) == expected
    assert machine.dtype("auto", device, made_in=made_in) == expected[1]


def test_a_dtype_that_is_named_is_taken_on_every_machine():
    for machine in (PLAIN, SERVER, GPU, OLD_GPU):
        assert [machine.dtype(name, made_in="float16") for name in rooms.DTYPES] == list(rooms.DTYPES)
        with pytest.raises(UnknownNameError, match="choose auto, bfloat16, float16 or float32"):
            machine.dtype("float8")
    assert pick_dtype("bfloat16") is torch.bfloat16 and pick_device("cpu").type == "cpu"
    with pytest.raises(UnknownNameError, match="give auto, cpu, cuda or mps"):
        pick_device("tpu9")


def test_what_is_said_of_a_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "this_machine", lambda: PLAIN)
    said = rooms.choice()
    assert said == {
        "machine": "a laptop (AVX2, 2 cores)",
        "device": "cpu",
        "dtype": "float32",
        "why": "the processor has no bfloat16 instructions",
    }
    assert rooms.choice("bfloat16")["why"] == "as asked for"
    monkeypatch.setattr(rooms, "this_machine", lambda: GPU)
    assert rooms.choice()["why"] == "cuda has bfloat16" and rooms.choice(device="cpu")["dtype"] == "float32"
    monkeypatch.setattr(rooms, "this_machine", lambda: replace(PLAIN, measured=4.24))
    assert rooms.choice()["why"] == "measured: float32 is 4.2 times as fast as bfloat16"


@pytest.mark.parametrize(("seconds", "expected"), [((4.0, 1.0), "emulated"), ((1.0, 2.0), "native")])
def test_a_processor_that_is_not_known_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], expected: str
):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(rooms.platform, "machine", lambda: "riscv64")
    asked = []

    def product_s(dtype: torch.dtype, *_: object) -> float:
        asked.append(dtype)
        return seconds[0] if dtype is torch.bfloat16 else seconds[1]

    monkeypatch.setattr(rooms, "_product_s", product_s)
    (tmp_path / "machine.json").write_text('{"another processor": 3.0}')
    for _ in range(2):
        this_machine.cache_clear()
        found = this_machine()
        assert found.bfloat16 == expected and found.measured == seconds[0] / seconds[1]
    this_machine.cache_clear()
    assert len(asked) == 2
    kept = read_marker(tmp_path / "machine.json", "").value
    assert len(kept) == 2 and kept["another processor"] == 3.0


@pytest.mark.parametrize(("collected", "lives"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_s_model_may_run_in_another_dtype_and_its_keys_say_so(
    tmp_path: Path, corpus_file: Path, collected: str, lives: str
):
    """The checkpoint holds bfloat16 numbers, as most do, so that both dtypes have the same weights."""
    folder = make_subject_folder(tmp_path / "m", "llama", dtype=torch.bfloat16)
    sae_folder = tmp_path / "sae"
    save_sae(sae_folder, make_sae("topk", 32, 64), hook=HOOK, model="tiny")
    made_by = load_subject(str(folder), device="cpu", dtype=collected)
    run = tmp_path / "run"
    collect(made_by, load_sae(str(sae_folder)), load_corpus(str(corpus_file)), run, WindowPolicy(16, 8))
    store = CodesStore.open(run)
    assert store.meta["model"]["dtype"] == collected
    live = load_subject(str(folder), device="cpu", dtype=lives)
    check_same_model(live, store.meta["model"], "the run's codes")
    activator = RunActivator(store, lambda: (live, load_sae(str(sae_folder))), dtype=lives)
    texts = [store.windows.text(row) for row in range(4)]
    windows = activator._read(3, texts)
    assert [len(w.activations) for w in windows] == [len(w.pieces) for w in windows] and len(windows) == 4
    assert activator.settings == {**live_settings(store), "dtype": lives} and "dtype" not in live_settings(
        store, collected
    )
    subject, _ = subject_of(live_choice(store, sae=str(sae_folder), device="cpu"))
    assert str(subject.dtype).removeprefix("torch.") == this_machine().dtype(None, "cpu", made_in=collected)


def test_weights_that_cannot_be_told_in_another_dtype_are_refused_in_one_sentence(tmp_path: Path):
    folder = make_subject_folder(tmp_path / "m", "llama")
    made_by, rounded = (load_subject(str(folder), device="cpu", dtype=d) for d in ("float32", "bfloat16"))
    recorded = {"name": "m", "fingerprint": made_by.fingerprint, "dtype": "float32"}
    check_same_model(made_by, recorded, "the codes")
    check_same_model(
        made_by, {"name": "m", "fingerprint": rounded.fingerprint, "dtype": "bfloat16"}, "the codes"
    )
    with pytest.raises(IncompatibleError, match="run it in float32 as they were, not in bfloat16"):
        check_same_model(rounded, recorded, "the codes")
    other = load_subject(
        str(make_subject_folder(tmp_path / "o", "llama", scale=0.2)), device="cpu", dtype="float32"
    )
    with pytest.raises(IncompatibleError, match="another model"):
        check_same_model(other, recorded, "the codes")


def test_a_recipe_leaves_with_what_was_chosen(monkeypatch: pytest.MonkeyPatch):
    source = {"hook": HOOK, "model": {"name": "m", "dtype": "bfloat16"}}
    recipe = make_recipe({"training": {"precision": "auto"}})
    assert recipe.subject.dtype == "auto"
    for machine, dtype in ((PLAIN, "float32"), (SERVER, "bfloat16"), (GPU, "bfloat16")):
        monkeypatch.setattr("featureinterp.training.parts.this_machine", lambda machine=machine: machine)
        chosen = resolved(recipe, None)
        assert (chosen.subject.dtype, chosen.training.precision) == (dtype, dtype)
        assert resolved(fitted(recipe, source), None, made_in="bfloat16").subject.dtype == dtype
    named = make_recipe({"subject": {"dtype": "float16"}})
    assert (
        resolved(named, None).subject.dtype == "float16"
        and resolved(named, None).training.precision == "float32"
    )
    with pytest.raises(IncompatibleError, match="dtype 'bfloat16'"):
        fitted(named, source)


def test_the_best_speed_so_far_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(rooms, "this_machine", lambda: PLAIN)
    seconds = iter([0.1, 0.4, 0.05])
    monkeypatch.setattr(rooms, "_product_s", lambda *_: next(seconds))
    flops = 2e-9 * 512 * 1536 * 4096
    assert [rooms.gflops("float32") for _ in range(3)] == pytest.approx(
        [flops / 0.1, flops / 0.1, flops / 0.05], abs=0.06
    )


PLAN = {"dtype": "float32", "device": "cpu"}


def test_the_demo_is_planned_to_the_machine():
    slow, middle, fast = (plan_demo(5, None, None, gflops=speed, **PLAN) for speed in (20, 150, 2000))
    assert (slow.n_test, slow.max_tokens) == (3, 20_000) and (fast.n_test, fast.max_tokens) == (8, 50_000)
    assert (
        slow.n_test <= middle.n_test <= fast.n_test
        and slow.max_tokens <= middle.max_tokens <= fast.max_tokens
    )
    assert middle.seconds <= AIM_S and fast.seconds < 120
    given = plan_demo(5, 12_345, 2, gflops=20, **PLAN)
    assert (given.max_tokens, given.n_test) == (12_345, 2) and given.seconds < slow.seconds
    twenty = plan_demo(20, None, None, gflops=150, **PLAN)
    assert twenty.n_test == middle.n_test and twenty.seconds > 3 * middle.seconds
    assert "features judged on" in slow.text and f"about {round(slow.seconds / 60)} minutes" in slow.text


def test_a_demo_goes_on_by_the_plan_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    speed = [20.0]
    monkeypatch.setattr(rooms, "gflops", lambda *_: speed[0])
    first = planned(tmp_path, 5, 0, None, None)
    speed[0] = 2000.0
    assert planned(tmp_path, 5, 0, None, None) == first
    more = planned(tmp_path, 20, 0, None, None)  # other features of the same codes
    assert more.max_tokens == first.max_tokens and more.n_test == 8
    assert planned(tmp_path, 5, 0, 1000, 2).max_tokens == 1000
    (tmp_path / "demo.json").write_text("not json")
    assert planned(tmp_path, 5, 0, None, None).max_tokens == 50_000
    with pytest.raises(InputError, match="n_test of 0"):
        planned(tmp_path / "other", 5, 0, None, 0)


def test_what_the_doctor_says_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(rooms, "this_machine", lambda: PLAIN)
    monkeypatch.setattr(rooms, "gflops", lambda *_: 150.0)
    found = look()
    assert found["chosen"]["dtype"] == "float32" and found["gflops"] == {
        "cpu float32": 150.0,
        "cpu bfloat16": 150.0,
    }
    lines = dict(machine_lines(found))
    assert lines["auto is"] == "float32 on cpu: the processor has no bfloat16 instructions"
    assert "a laptop (AVX2, 2 cores)" in lines["machine"] and "5 features" in lines["demo"]
