"""JSON and TOML from anybody: nested without end, or with a number of thousands of digits, it is one sentence
or nothing, wherever it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featureinterp.claims import CODES, claim
from featureinterp.cli.endpoint import endpoint_of
from featureinterp.corpus.text import load_corpus
from featureinterp.errors import DamagedStoreError, FeatureInterpError
from featureinterp.explainers.styles import FEW_SHOT
from featureinterp.files import UnparsedError, parse_json, parse_toml
from featureinterp.jobs.spec import load_job
from featureinterp.llm import config, learnt
from featureinterp.probing.labels import load_labels
from featureinterp.prompts import load_prompt
from featureinterp.reports.render import StoredResults
from featureinterp.training.settings import load_recipe, value_of

DEEP, LONG = "[" * 100_000, "9" * 5000


def labels(text: str, folder: Path) -> None:
    (folder / "l.jsonl").write_text(text)
    load_labels(folder / "l.jsonl")


def patterns(text: str, folder: Path) -> None:
    (folder / "l.toml").write_text(f"a = {text}")
    load_labels(folder / "l.toml")


def corpus(text: str, folder: Path) -> None:
    (folder / "c.jsonl").write_text(f'{{"text": "a", "more": {text}}}')
    list(load_corpus(str(folder / "c.jsonl")))


def job(text: str, folder: Path) -> None:
    (folder / "job.toml").write_text(f"features = {text}")
    load_job(folder / "job.toml")


def recipe(text: str, folder: Path) -> None:
    (folder / "r.toml").write_text(f"sae = {text}")
    load_recipe(folder / "r.toml")


def endpoints(text: str, folder: Path) -> None:
    (folder / "config.toml").write_text(f"endpoints = {text}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(config.CONFIG_VARIABLE, str(folder / "config.toml"))
        config.load_config()


def worked_examples(text: str, folder: Path) -> None:
    (folder / "few.json").write_text(text)
    load_prompt("explain-rules", "v1").with_examples(FEW_SHOT, folder / "few.json")


def results(text: str, folder: Path) -> None:
    (folder / "results.jsonl").write_text(text + "\n")
    list(StoredResults(folder / "results.jsonl"))


def body(text: str, folder: Path) -> None:
    endpoint_of(None, "http://127.0.0.1:9/v1", model="m", extra_body=text)


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
@pytest.mark.parametrize(
    "read", [labels, patterns, corpus, job, recipe, endpoints, worked_examples, results, body]
)
def test_what_a_user_gives_is_refused_in_one_sentence(
    read: Callable[[str, Path], None], text: str, tmp_path: Path
):
    with pytest.raises(FeatureInterpError) as caught:
        read(text, tmp_path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("nested too deeply", "a number that is too long"))


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_what_was_kept_and_cannot_be_read_is_as_if_it_were_not_there(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(learnt, "_file", lambda *_: tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text(text)
    assert learnt.recall("http://127.0.0.1:9/v1", "m") is None
    assert value_of(text) == text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "request.json").write_text(text)
    (tmp_path / "out" / "records.jsonl").write_text("hours of work")
    with pytest.raises(DamagedStoreError, match="is damaged"):
        claim(tmp_path / "out", CODES, {"a": 1})
    assert (tmp_path / "out" / "records.jsonl").read_text() == "hours of work"


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    PLAIN,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=8,
)
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(JSON)
def test_json_is_read_as_the_library_reads_it(value: object):
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text)) == repr(parse_json(text.encode()))


@SLOW
@given(st.text() | st.binary())
def test_any_text_is_a_value_or_one_error(text: str | bytes):
    for read in (parse_json, parse_toml) if isinstance(text, str) else (parse_json,):
        try:
            read(text)  # type: ignore[arg-type]
        except UnparsedError as error:
            assert str(error) == f"it {error.says}" and error.says.startswith("is not ")
