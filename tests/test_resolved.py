"""A job is settled once: everything explicit, kept beside the results, and nothing is settled again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import HOOK
from endpoint import endpoint
from service import configured
from test_cli import embed

import featureinterp as fi
from featureinterp.codes.store import CodesStore
from featureinterp.domain.choice import SimulatorChoice, SubjectChoice
from featureinterp.errors import InputError, StorageError
from featureinterp.jobs.resolved import ResolvedJob, in_order, resolve, resolved_in
from featureinterp.jobs.spec import Job, make_job
from featureinterp.llm.prices import FREE, Price
from featureinterp.machine import this_machine
from featureinterp.sampling.similar import SentenceEmbedder


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATUREINTERP_CONFIG", str(configured(tmp_path / "c.toml", "http://127.0.0.1:9/v1")))


def test_what_a_job_leaves_open_is_spelt_out(run: Path, store: CodesStore, named: None):
    job = make_job(
        run=run,
        features="3,5,3",
        llm="played",
        explainer="tree",
        stages=("steer", "score", "explain", "simulate"),
        plan={"n_test": 4, "fuzzing": False, "negatives": ("random",)},
        simulator="rated",
    )
    found = resolve(job, store)
    assert found.features == (3, 5) and found.stages == ("explain", "simulate", "score", "steer")
    assert found.scorers == ("detection", "complexity") and not found.plan.fuzzing
    assert found.folder == run / "explain" and found.codes == store.fingerprint and found.asks
    assert (found.endpoint.model, found.endpoint.price, found.judge) == ("m", Price(1, 1), found.endpoint)
    assert found.policy.counts["top"] == (10, 10, 10) and found.policy.counts["random"] == (0, 10, 10)
    meta = store.meta
    dtype = this_machine().dtype(None, None, made_in="float32")
    device = this_machine().device(None)
    assert found.subject == SubjectChoice(meta["model"]["name"], meta["sae"]["name"], device, dtype)
    assert found.simulator == SimulatorChoice("rated", job.simulator_model), (
        "an endpoint has no dtype of ours"
    )
    assert found.dtype is None and HOOK in str(meta["sae"])


def test_local_models_have_a_device_and_a_dtype_only_where_they_are_needed(run: Path, store: CodesStore):
    local = resolve(make_job(run=run, features="3", device="cpu", simulator_dtype="bfloat16"), store)
    assert (
        (local.simulator.device, local.simulator.dtype) == ("cpu", "bfloat16") == (local.device, local.dtype)
    )
    assert local.endpoint.price == local.judge.price == FREE and local.judge.base_url == "local"
    assert local.plan.features_at_once == 1 and local.subject is None
    auto = resolve(make_job(run=run, features="3", device="cpu"), store)
    assert auto.simulator.dtype == this_machine().dtype(None, "cpu")
    lexical = make_job(run=run, features="3", simulator="lexical", explainer="top-tokens", stages=["explain"])
    found = resolve(lexical, store)
    assert found.dtype is None and not found.asks and found.stages == ("explain",)


def test_stages_that_a_plan_empties_are_left_out(run: Path, store: CodesStore):
    plan = dict.fromkeys(("simulate", "detection", "fuzzing", "complexity"), False)
    assert resolve(make_job(run=run, features="3", plan=plan), store).stages == ("explain",)
    assert in_order(("mine", "score", "explain", "other", "score")) == ("explain", "score", "mine", "other")


def test_it_lies_beside_the_results_and_is_read_back_equal(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SentenceEmbedder, "embed", embed)
    asked: list[str] = []
    for name in ("effective_plan", "policy", "judge_endpoint"):
        whole = getattr(Job, name)
        seen = property(lambda job, whole=whole, name=name: (asked.append(name), whole.fget(job))[1])
        monkeypatch.setattr(Job, name, seen)
    out = tmp_path / "out"
    with endpoint() as server:
        llm = fi.Endpoint(server.url, "m", None, price=Price(2, 3), extra_headers={"X-Key": "env:HOME"})
        job = make_job(
            run=run,
            features="3,5",
            out=out,
            llm=llm,
            simulator="lexical",
            few_shot=None,
            options={"mine": {"letters": 3}},
        )
        fi.run(job)
    assert sorted(asked) == ["effective_plan", "judge_endpoint", "policy"], "nothing is settled twice"
    kept = resolved_in(out)
    assert kept == resolve(job, fi.open_run(run)) and kept.options == {"mine": {"letters": 3}}
    written = json.loads((out / "resolved.json").read_text())
    assert written["format"] == 1 and {f.name for f in dataclasses.fields(ResolvedJob)} <= set(written)
    assert written["endpoint"]["extra_headers"] == {"X-Key": "env:HOME"}, (
        "the name of a secret, not its value"
    )


def test_a_folder_without_it_or_with_a_damaged_one_is_one_sentence(tmp_path: Path):
    with pytest.raises(InputError, match="has no resolved.json: run the same job again"):
        resolved_in(tmp_path)
    (tmp_path / "resolved.json").write_text('{"format": 1, "run": 3}')
    with pytest.raises(StorageError, match="resolved.json is damaged"):
        resolved_in(tmp_path)


def test_a_settled_job_cannot_be_changed(run: Path, store: CodesStore):
    found: Any = resolve(make_job(run=run, features="3", simulator="lexical"), store)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.stages = ()
