"""One entry per kind of content: what shares a folder, what does not, what is known of earlier versions, and
what nobody replaces while it is read.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from test_claims import holder

from featureinterp.claims import (
    CODES,
    EVALUATION,
    EXTRACTION,
    JOB,
    LAYERS,
    REPLACING,
    REQUEST,
    SENSITIVITY,
    STUDY,
    TABLE,
    TRAINING,
    Content,
    asked_in,
    claim,
    reading,
)
from featureinterp.errors import DamagedStoreError, FolderInUseError, IncompatibleError
from featureinterp.files import content_key
from featureinterp.stored.sums import write_marker

WINDOWED = {"corpus": "0" * 32, "window": {"length": 16}, "tokenizer": "1" * 32}


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (CODES, {**WINDOWED, "SAE": "s", "hook": "h"}),
        (EXTRACTION, {**WINDOWED, "hook": "h", "settings": {}}),
        (JOB, {"codes": "fingerprint"}),
        (TRAINING, {"sae": {"k": 4}, "training": {"lr": 0.1}, "corpus": {"window": 16}}),
        (LAYERS, {**WINDOWED, "labels": "l", "blocks": [0]}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_request_of_an_earlier_version_is_known_by_its_names_and_stays(
    tmp_path: Path, content: Content, asked: dict[str, object]
):
    write_marker(tmp_path / REQUEST, {"key": content_key(asked), **asked, "about": {"model": "m"}})
    assert asked_in(tmp_path, content) == asked
    for part in content.parts:
        (tmp_path / part).mkdir()
    claim(tmp_path, content, asked)
    claim(tmp_path, STUDY, {})
    assert asked_in(tmp_path, content) == asked and asked_in(tmp_path, STUDY) == {}
    assert json.loads((tmp_path / REQUEST).read_text())["contents"][content.name]["about"] == {"model": "m"}
    with pytest.raises(IncompatibleError, match="another request"):
        claim(tmp_path, content, {**asked, next(iter(asked)): "other"})


def test_a_damaged_entry_takes_no_other_with_it(tmp_path: Path):
    (tmp_path / "codes").mkdir()
    (tmp_path / "job.json").touch()
    claim(tmp_path, CODES, {"SAE": "s"}, earlier=lambda: {"SAE": "s"})
    claim(tmp_path, JOB, {"codes": "fingerprint"}, earlier=lambda: {"codes": "fingerprint"})
    path = tmp_path / REQUEST
    path.write_text(path.read_text().replace('"SAE": "s"', '"SAE": "z"'))
    with pytest.raises(DamagedStoreError):
        claim(tmp_path, CODES, {"SAE": "s"})
    claim(tmp_path, CODES, {"SAE": "s"}, earlier=lambda: {"SAE": "s"})
    assert asked_in(tmp_path, JOB) == {"codes": "fingerprint"} and asked_in(tmp_path, CODES) == {"SAE": "s"}


def test_contents_share_windows_of_one_request_and_no_others(tmp_path: Path):
    longer = {**WINDOWED, "window": {"length": 32}}
    claim(tmp_path, EXTRACTION, {**WINDOWED, "hook": "h"})
    for name in ("train", "windows"):
        (tmp_path / name).mkdir()
    refused = r"an extraction of other windows \(window length 16 there, 32 asked for\), and codes would"
    for replace in (False, True):
        with pytest.raises(IncompatibleError, match=refused):
            claim(tmp_path, CODES, {**longer, "SAE": "s"}, replace=replace)
    claim(tmp_path, CODES, {**WINDOWED, "SAE": "s"})  # the windows that are there are no codes of another
    (tmp_path / "codes").mkdir()
    with pytest.raises(IncompatibleError, match="other windows"):
        claim(tmp_path, CODES, {**longer, "SAE": "s"}, replace=True)
    claim(tmp_path, CODES, {**WINDOWED, "SAE": "z"}, replace=True)
    assert (tmp_path / "windows").is_dir() and not (tmp_path / "codes").exists()
    (tmp_path / "codes").mkdir()
    claim(tmp_path, EXTRACTION, {**WINDOWED, "hook": "i"}, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {"codes", "windows", REQUEST}
    (tmp_path / "codes").rmdir()  # by hand: nobody else has the windows now
    claim(tmp_path, EXTRACTION, {**longer, "hook": "i"}, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {REQUEST}


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        (TRAINING, EVALUATION, "metrics.json"),
        (JOB, SENSITIVITY, "journal.sqlite"),
        (STUDY, TABLE, "features.parquet"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_contents_that_would_write_over_one_another_are_kept_apart(
    tmp_path: Path, first: Content, second: Content, part: str
):
    for a, b, folder in ((first, second, tmp_path / "a"), (second, first, tmp_path / "b")):
        folder.mkdir()
        claim(folder, a, {})
        for name in a.parts:
            (folder / name).touch()
        for replace in (False, True):
            with pytest.raises(IncompatibleError, match=f"holds {a.words}, and {b.words} would .* {part}"):
                claim(folder, b, {}, replace=replace)
        assert all((folder / name).exists() for name in a.parts) and asked_in(folder, b) is None


def test_the_option_that_goes_on_with_what_is_there_is_named_when_it_is_enough(tmp_path: Path):
    asked = {"SAE": "s", "subject": {"dtype": "bfloat16"}, "precision": "float32"}
    (tmp_path / "codes").mkdir()
    claim(tmp_path, CODES, asked, earlier=lambda: asked)
    options = {"subject dtype": "--dtype {}", "precision": "--precision {}"}
    here = {**asked, "subject": {"dtype": "float32"}}
    with pytest.raises(
        IncompatibleError,
        match=r'\(subject dtype "bfloat16" there, "float32" asked for\): go on there with --dtype bfloat16, '
        "give another folder, or start anew",
    ):
        claim(tmp_path, CODES, here, options=options)
    with pytest.raises(IncompatibleError, match="on there with --dtype bfloat16 and --precision float32, "):
        claim(tmp_path, CODES, {**here, "precision": "bfloat16"}, options=options)
    with pytest.raises(IncompatibleError, match=r"another SAE.*\): give another folder"):
        claim(tmp_path, CODES, {**here, "SAE": "f" * 32}, options=options)


READ = """
import sys
from pathlib import Path
from featureinterp.claims import CODES, reading
with reading(Path(sys.argv[1]), CODES, "test"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_is_read_is_not_replaced_and_readers_that_died_block_nobody(tmp_path: Path):
    (tmp_path / "codes").mkdir()
    claim(tmp_path, CODES, {"SAE": "s"}, earlier=lambda: {"SAE": "s"})
    with holder(tmp_path, READ) as first, holder(tmp_path, READ) as second:
        for reader in (first, second):
            with pytest.raises(
                FolderInUseError,
                match=rf"process \d+ on {os.uname().nodename} \(test\) reads its codes since",
            ):
                claim(tmp_path, CODES, {"SAE": "z"}, replace=True)
            assert (tmp_path / "codes").is_dir() and asked_in(tmp_path, CODES) == {"SAE": "s"}
            claim(tmp_path, CODES, {"SAE": "s"})  # nothing is to be replaced
            reader.send_signal(signal.SIGKILL)
            reader.wait()
        claim(tmp_path, CODES, {"SAE": "z"}, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {REQUEST}


def test_readers_of_something_else_and_folders_without_marks_hinder_nobody(tmp_path: Path):
    with reading(tmp_path / "nowhere", CODES, "test"):
        assert not (tmp_path / "nowhere").exists()
    (tmp_path / "job.json").touch()
    claim(tmp_path, JOB, {"codes": "a"}, earlier=lambda: {"codes": "a"})
    with reading(tmp_path, CODES, "explain"):
        claim(tmp_path, JOB, {"codes": "b"}, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {REQUEST}


def test_who_comes_to_read_while_it_is_replaced_is_told(tmp_path: Path):
    with holder(tmp_path) as child:
        (tmp_path / REPLACING).write_text("codes")
        with pytest.raises(FolderInUseError, match=f"process {child.pid} "), reading(tmp_path, CODES, "test"):
            pass
        with reading(tmp_path, EXTRACTION, "test"):
            pass
    with reading(tmp_path, CODES, "test"):  # the process died over it
        pass
