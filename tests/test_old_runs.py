"""A run folder that version 0.1.0 left behind: results, report, export, status, going on from its journal.

``data/old-run`` was made by the code of 2026-11: ``run/explain`` has all five stages and a search,
``run/plain`` three of them and one-shot explanations. ``explain.csv`` is what that code exported. The model
is not there, so that nothing can be computed with it again, and neither is the endpoint.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import featureinterp as fi
from featureinterp.api.stored import verify
from featureinterp.jobs.spec import changed, job_of
from featureinterp.reports.render import read_results

OLD = Path(__file__).parent / "data" / "old-run"
FEATURES = [0, 1, 2]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(OLD / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # its paths are relative
    return Path("run")


def explanations(folder: Path) -> dict[int, str]:
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {r["feature"]: "; ".join(x["activates_on"] for x in r["explanation"]["rules"]) for r in found}


@pytest.mark.parametrize("name", ["explain", "plain"])
def test_its_report_is_drawn_again(old: Path, name: str):
    folder = old / name
    page = fi.report(folder).read_text(encoding="utf-8")
    for feature, text in explanations(folder).items():
        assert f'id="f{feature}"' in page and text.split("; ")[0] in page
    assert "Detection, AUROC" in page
    assert (
        ("On trial" in page) == ("Steered" in page) == ("explanations tried" in page) == (name == "explain")
    )


def test_it_is_exported_as_it_was(old: Path):
    path, n = fi.export(old, to="csv")
    assert n == 3 and path.read_text(encoding="utf-8") == (OLD / "explain.csv").read_text(encoding="utf-8")
    assert fi.export(old, to="parquet")[1] == fi.export(old / "plain", to="jsonl")[1] == 3


@pytest.mark.parametrize("name", ["explain", "plain"])
def test_it_is_whole_and_says_how_far_it_is(old: Path, name: str):
    assert verify(old).good
    status = fi.status(old / name)
    assert (status.wanted, status.done, status.failed, status.left) == (3, 3, 0, 0)


@pytest.mark.parametrize("name", ["explain", "plain"])
def test_the_same_job_goes_on_and_asks_nothing(old: Path, name: str):
    before, _ = read_results(old / name)
    known = list(before)
    job = job_of(old / name)
    again = fi.run(changed(job, stages=[stage for stage in job.stages if stage != "steer"]))
    assert again.outcome is not None and set(again.outcome.status.values()) == {"done"}
    assert [r.feature for r in again] == FEATURES and again.outcome.progress.requests == 0
    for result in known:  # texts of a subject that is pushed are written anew, as it is pushed otherwise now
        scores = tuple(s for s in result.scores if s.name != "steering_effect")
        assert replace(result, intervention=None, scores=scores) in again
