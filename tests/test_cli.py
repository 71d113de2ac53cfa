"""The command line: exit codes, one-sentence errors, JSON, and nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import D_MODEL, HOOK
from endpoint import KEY, completion, endpoint
from tiny import make_sae

from featureinterp.cli.main import main
from featureinterp.cli.screen import Screen
from featureinterp.errors import InputError
from featureinterp.quiet import quiet_transformers
from featureinterp.sae.load import save_sae
from featureinterp.sampling.similar import SentenceEmbedder


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in this process, as its entry point does."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["featureinterp", *args])
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if line.startswith("featureinterp: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture
def collect_args(subject_folder: Path, sae_folder: Path, corpus_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("collect", "--model", str(subject_folder), "--sae", str(sae_folder), "--corpus", str(corpus_file)),
        *("--out", str(tmp_path / "run"), "--dtype", "float32", "--window", "16"),
    ]


def swap(args: list[str], option: str, value: str) -> list[str]:
    out = list(args)
    out[out.index(option) + 1] = value
    return out


def test_collect_prints_a_summary_and_reuses_what_is_there(collect_args: list[str], tmp_path: Path):
    done = cli(*collect_args, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["n_features"] == 64 and summary["codes_per_token"] <= 4 and summary["n_nonzeros"] > 0
    stamp = (tmp_path / "run" / "codes" / "codes.json").stat().st_mtime_ns
    assert json.loads(cli(*collect_args, "--json").stdout) == summary
    assert (tmp_path / "run" / "codes" / "codes.json").stat().st_mtime_ns == stamp


def test_bad_input_is_one_sentence_and_writes_nothing(collect_args: list[str], tmp_path: Path):
    wide, far = tmp_path / "wide", tmp_path / "far"
    save_sae(wide, make_sae("topk", 48, 64), hook=HOOK, model="other")
    save_sae(far, make_sae("topk", D_MODEL, 64), hook="blocks.9.hook_resid_post", model="tiny")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 30)
    for option, value, words in (
        ("--model", str(tmp_path / "nothing"), ("no model folder",)),
        ("--model", "no-such-model", ("no-such-model", "cannot be loaded")),
        ("--sae", "no-such-sae", ("no-such-sae", "'demo'")),
        ("--sae", str(wide), ("width 48", "width 32")),
        ("--sae", str(far), ("blocks.9.hook_resid_post", "blocks.2.hook_resid_post")),
        ("--corpus", str(tmp_path / "empty.txt"), ("no window", "empty")),
        ("--corpus", str(tmp_path / "binary.txt"), ("binary",)),
        ("--corpus", str(tmp_path / "latin.txt"), ("not UTF-8", "iconv")),
        ("--corpus", "no-such-corpus", ("no-such-corpus", "'sotu'")),
        ("--window", "1", ("window of 1",)),
    ):
        refused(cli(*swap(collect_args, option, value)), *words)
        assert not (tmp_path / "run" / "windows").exists() and not (tmp_path / "run" / "codes").exists(), (
            option,
            value,
        )


def test_codes_of_another_sae_are_refused(collect_args: list[str], run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    save_sae(tmp_path / "other", make_sae("relu", D_MODEL, 64), hook=HOOK, model="tiny")
    refused(cli(*swap(collect_args, "--sae", str(tmp_path / "other"))), "another SAE", "another folder")


def embed(_: SentenceEmbedder, texts: list[str]) -> np.ndarray:
    vectors = np.array([[len(t), t.count("e") + 1.0, t.count(" ")] for t in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_explain_end_to_end_against_an_endpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SentenceEmbedder, "embed", embed)

    def answer(body: dict) -> object:
        return (
            '{"explanation": "words about the sea"}'
            if "response_format" in body
            else completion("No", logprobs={"No": -0.1, "Yes": -2.5, "3": -1.0})
        )

    shutil.copytree(run, tmp_path / "run")
    with endpoint(answer) as server:
        args = [
            *(
                "explain",
                str(tmp_path / "run"),
                "--features",
                "3,5,9",
                "--simulator",
                "lexical",
                "--base-url",
                server.url,
            ),
            *("--llm-model", "m", "--api-key-env", "TEST_KEY", "--out", str(tmp_path / "out"), "--json"),
        ]
        env = {"TEST_KEY": KEY}
        done = cli(*args, **env)
        assert done.returncode == 0, done.stderr
        out = json.loads(done.stdout)
        assert [f["feature"] for f in out["features"]] == [3, 5, 9] and out["n_failures"] == 0
        paid = len(server.ledger)
        assert paid > 10 and {call["key"] for call in server.ledger} == {f"Bearer {KEY}"}
        again = cli(*args, **env)
        assert json.loads(again.stdout) == out and len(server.ledger) == paid
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir())
    assert KEY.encode() not in written and KEY not in done.stdout + done.stderr
    report = cli("report", str(tmp_path / "out"), "--out", str(tmp_path / "r.html"), "--json")
    assert json.loads(report.stdout)["report"] == str(tmp_path / "r.html")
    assert "words about the sea" in (tmp_path / "r.html").read_text(encoding="utf-8")
    refused(cli("report", str(tmp_path)), "results.jsonl")


def test_explain_refuses_what_cannot_work_before_it_writes(run: Path, tmp_path: Path):
    with endpoint(lambda _: (401, {}, {"error": {"message": KEY}})) as server:
        args = [
            "explain",
            str(run),
            "--features",
            "3",
            "--simulator",
            "lexical",
            "--llm-model",
            "m",
            "--api-key-env",
            "TEST_KEY",
            "--out",
            str(tmp_path / "out"),
        ]
        env = {"TEST_KEY": KEY}
        refused(cli(*args, "--base-url", server.url, "--features", "64", **env), "0 to 63")
        refused(cli(*args, "--base-url", server.url, "--features", "a:b", **env), "names no features")
        refused(
            cli(*args, "--base-url", server.url, "--simulator", "best", **env),
            "simulator",
            "'best'",
            "choose from token-wise, all-at-once, prompt-logprobs, rated, lexical",
        )
        refused(cli(*args, "--base-url", "host", **env), "not the address")
        refused(cli(*args, "--base-url", server.url, TEST_KEY=""), "TEST_KEY", "is not set")
        refused(cli("explain", str(run), "--base-url", server.url), "--llm-model")
        assert not server.ledger
        done = cli(*args, "--base-url", server.url, **env)
        refused(done, "refused the key", "environment variable TEST_KEY")
        assert KEY not in done.stderr and len(server.ledger) == 1
    refused(cli(*args, "--base-url", server.url, **env), "cannot be reached")
    refused(cli("explain", str(tmp_path / "none")), "no run folder")
    (tmp_path / "bare").mkdir()
    refused(cli("explain", str(tmp_path / "bare")), "featureinterp collect")
    assert not (tmp_path / "out").exists()


def test_models_and_records(run: Path, tmp_path: Path):
    listed = json.loads(cli("models", "list", "--json", FEATUREINTERP_CACHE=str(tmp_path)).stdout)
    assert {p["name"] for p in listed["parts"]} >= {"sotu", "smollm2-135m-instruct"} and not any(
        p["cached"] for p in listed["parts"]
    )
    refused(cli("models", "fetch", "nothing"), "nothing", "sotu")
    refused(cli("models", "verify", "sotu", FEATUREINTERP_CACHE=str(tmp_path)), "models fetch sotu")
    refused(cli("records", str(run), "--features", "99:100"), "0 to 63")
    table = cli("models", "list", FEATUREINTERP_CACHE=str(tmp_path))
    assert table.returncode == 0 and "Apache-2.0" in table.stdout


def test_records_of_chosen_kinds_with_causes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sae_folder: Path
):
    monkeypatch.setattr(SentenceEmbedder, "embed", embed)
    shutil.copytree(run, tmp_path / "run")
    args = ("records", str(tmp_path / "run"), "--features", "3,5")
    done = cli(
        *args,
        "--count",
        "coactive_negative=2,1,1",
        "--count",
        "projected_similar=0,1,1",
        "--holistic",
        "gradient",
        "--sae",
        str(sae_folder),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [row["feature"] for row in rows] == [3, 5]
    for row in rows:
        assert (
            len(row["splits"]["train"]["coactive_negative"]) == 2
            and row["splits"]["test"]["projected_similar"]
        )
        assert row["holistic"]["method"] == "gradient" and set(row["holistic"]["windows"]) == {
            "train/top",
            "train/weighted",
        }
        assert [len(h) for h in row["holistic"]["windows"]["train/top"]] == [
            w[2] for w in row["splits"]["train"]["top"]
        ]
    refused(cli(*args, "--count", "coactive=1,1,1"), "coactive", "coactive_negative")
    refused(cli(*args, "--count", "top=1,1"), "top=10,10,10")
    refused(cli(*args, "--holistic", "magic"), "'exact', 'gradient'")
    refused(cli(*args, "--projection", "pca"), "closed-form")
    save_sae(tmp_path / "other", make_sae("relu", D_MODEL, 64), hook=HOOK, model="tiny")
    refused(
        cli(*args, "--count", "coactive_negative=1,1,1", "--sae", str(tmp_path / "other")),
        "another SAE",
        str(sae_folder),
    )
    refused(cli("explain", str(run), "--negatives", "random,top"), "'top'", "similar_negative")
    refused(
        cli("explain", str(run), "--explainer", "top-tokens", "--holistic", "exact"), "top-tokens", "holistic"
    )
    (tmp_path / "shots.json").write_text('[{"windows": []}]')
    refused(
        cli(
            "explain",
            str(run),
            "--style",
            "rules",
            "--few-shot",
            str(tmp_path / "shots.json"),
            "--base-url",
            "http://127.0.0.1:9/v1",
            "--llm-model",
            "m",
        ),
        "rules",
    )


def test_help_has_examples_and_debug_shows_the_traceback(tmp_path: Path):
    for verb in ("demo", "collect", "records", "explain", "report"):
        shown = cli(verb, "--help").stdout
        assert "Example" in shown and f"featureinterp {verb}" in shown
    with pytest.raises(InputError):
        cli("--debug", "report", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "featureinterp.cli.main", "report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    refused(done, "results.jsonl")
    assert cli("--version").stdout.startswith("featureinterp 0.")
    assert cli("explain", "--no-such-option").returncode == 2


def test_the_local_server_ends_with_its_parent(tmp_path: Path):
    """The parent is killed without a chance to clean up; the child sees its input close and ends."""
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import featureinterp.llm.local_server as s, "
        "threading, time;"
        ' threading.Thread(target=s._end_with_parent, daemon=True).start(); print("up", flush=True); '
        "time.sleep(600)'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    handle = os.pidfd_open(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    import select

    assert select.select([handle], [], [], 30)[0], "the child outlived its parent"


def test_lines_are_not_lost_while_a_library_is_silenced(capsys: pytest.CaptureFixture[str]):
    screen = Screen()
    with quiet_transformers():
        print("noise", file=sys.stderr)
        screen.say("feature 1: seen")
        with quiet_transformers():
            screen.step("explained", 1, 2)
    err = capsys.readouterr().err
    assert "feature 1: seen" in err and "explained: 1 of 2" in err and "noise" not in err


def test_threads_that_silence_at_once_leave_the_stream_as_it_was():
    before, inside = sys.stderr, threading.Event()

    def first() -> None:
        with quiet_transformers():
            inside.set()

    with quiet_transformers():
        thread = threading.Thread(target=first)
        thread.start()
        assert not inside.is_set()
    thread.join(10)
    assert inside.is_set() and sys.stderr is before
