"""The experiments against a played endpoint: every arm in the tables, figures written, and nothing asked
twice.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import HOOK
from endpoint import endpoint
from tiny import make_sae

import featureinterp as fi
from featureinterp.domain.chat import Reply
from featureinterp.domain.usage import Usage
from featureinterp.jobs.records import alive_features
from featureinterp.jobs.spec import make_job
from featureinterp.llm.cached import ReplyStore
from featureinterp.sae.load import save_sae

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "experiments"))

import answer_share
import common
import explainers
import layers
import polysemanticity
import sources

JOB = """
[{size}]
features = {features}
simulator = "lexical"
llm = {{ base_url = "{url}", model = "m", api_key_env = "" }}
plan = {{ n_test = 2, n_valid = 2, negatives = {negatives}, detection = false, fuzzing = false }}
records = {{ counts = {{ top = [4, 2, 2] }} }}
tree = {{ roots = 2, depth = 1, width = 1, branching = 1, negatives = ["random_negative"], n_windows = 2 }}

[{size}.experiment]
{own}
"""


def go(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    server: Any,
    *arguments: str,
    **fields: Any,
) -> tuple[list[dict[str, str]], Path]:
    """Runs an experiment twice, of which the second asks nothing, and returns its table and its folder."""
    config = out / "config.toml"
    config.write_text(
        JOB.format(**({"size": "full", "url": server.url, "negatives": '["random"]', "own": ""} | fields)),
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "argv", ["experiment", "--config", str(config), "--out", str(out), *arguments])
    module.main()
    n = len(server.ledger)
    name = module.__name__
    before = {kind: (out / name / f"{name}.{kind}").read_bytes() for kind in ("csv", "svg")}
    module.main()
    assert len(server.ledger) == n
    assert module is layers or not server.paid_twice()  # each layer is a run with replies of its own
    assert all((out / name / f"{name}.{kind}").read_bytes() == content for kind, content in before.items())
    assert (out / name / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with (out / name / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file)), out / name


@pytest.fixture
def chosen(run: Path) -> list[int]:
    return [int(f) for f in alive_features(fi.open_run(run))[:3]]


def test_sources_has_every_kind_for_every_feature(
    run: Path, chosen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds = ["random", "random_negative", "coactive_negative"]
    with endpoint() as server:
        rows, folder = go(
            sources,
            monkeypatch,
            tmp_path,
            server,
            "--run",
            str(run),
            features=chosen,
            negatives=str(kinds).replace("'", '"'),
        )
    assert [(int(r["feature"]), r["source"]) for r in rows] == [(f, k) for f in chosen for k in kinds]
    assert all((r["false positives per window"] == "") == (r["source"] == "random") for r in rows)
    results = {
        r.feature: r
        for r in fi.run(
            fi.Job(
                run=run,
                out=folder / "job-again",
                features=tuple(chosen),
                explainer="top-tokens",
                stages=("explain",),
            )
        )
    }
    assert set(results) == set(chosen)


def test_explainers_are_eight_and_a_baseline(
    run: Path, chosen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with endpoint() as server:
        rows, folder = go(
            explainers,
            monkeypatch,
            tmp_path,
            server,
            "--run",
            str(run),
            features=chosen[:2],
            negatives='["random", "random_negative"]',
            own='holistic = "gradient"',
        )
    arms = list(dict.fromkeys(r["explainer"] for r in rows))
    assert (
        len(arms) == 9
        and len(rows) == 18
        and arms[-1] == "top tokens"
        and sum("tree" in a for a in arms) == sum("holistic" in a for a in arms) == 4
    )
    asked = {a: sum(float(r["requests"] or 0) for r in rows if r["explainer"] == a) for a in arms}
    assert asked["top tokens"] == 0 < asked["one-shot, rules"] < asked["tree, rules"]
    with (folder / "explainers-summary.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = [
                float(r["correlation"])
                for r in rows
                if r["explainer"] == row["explainer"] and r["correlation"]
            ]
            assert int(row["features"]) == len(values) and (
                not values or float(row["correlation"]) == pytest.approx(np.mean(values))
            )


def test_polysemanticity_never_has_more_rules_than_the_cap(
    run: Path, chosen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with endpoint() as server:
        rows, _ = go(
            polysemanticity,
            monkeypatch,
            tmp_path,
            server,
            "--run",
            str(run),
            features=chosen,
            own="caps = [1, 2, 5]",
        )
    assert [int(r["rule cap"]) for r in rows] == [1, 1, 1, 2, 2, 2, 5, 5, 5]
    assert all(
        1 <= float(r["rules"]) <= int(r["rule cap"]) and 0 <= float(r["complexity"]) <= 5 for r in rows
    )


def test_layers_collects_each_sae(
    subject_folder: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for layer in (0, 1):
        save_sae(
            tmp_path / f"sae{layer}",
            make_sae("topk", 32, 64),
            hook=HOOK.replace("1", str(layer)),
            model="tiny",
        )
    entries = ", ".join(f'{{ layer = {layer}, sae = "{tmp_path}/sae{layer}" }}' for layer in (0, 1))
    own = f'model = "{subject_folder}"\ncorpus = "{corpus_file}"\nmax_tokens = 3000\nlayers = [{entries}]'
    with endpoint() as server:
        rows, _ = go(layers, monkeypatch, tmp_path, server, features='"random:2"', own=own)
    assert [int(r["layer"]) for r in rows] == [0, 0, 1, 1] and all(r["explanation"] for r in rows)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="give the run folder"):
        sources.main()
    with pytest.raises(SystemExit, match="name the SAEs to compare"):
        layers.main()


def test_means_and_intervals():
    row = common.summarised("r", [0.2, None, 0.4])
    assert row["r"] == pytest.approx(0.3) and row["features"] == 2 and row["r, 95 %"] == "0.20 to 0.40"
    assert common.summarised("r", [None]) == {"r": None, "r, 95 %": None, "features": 0}
    assert common.summarised("r", [0.5])["r, 95 %"] is None


@pytest.mark.parametrize("module", [sources, explainers, polysemanticity, layers])
def test_shipped_configurations_are_jobs(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for size in ([], ["--small"]):
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), *size])
        experiment = common.Experiment(str(module.__file__), "")
        made = make_job(run=tmp_path, **experiment.settings)
        assert made.plan.negatives[0] == "random" and "simulate" in made.stages


def test_arms_are_compared_on_features_that_have_a_value_in_all():
    values = {("a", 1): 0.1, ("a", 2): 0.3, ("b", 1): None, ("b", 2): 0.5, ("c", 1): None, ("c", 2): None}
    rows = [{"arm": arm, "feature": f, "r": v} for (arm, f), v in values.items()]
    assert common.means(rows, "arm", "r", paired=True) == {"a": [0.3], "b": [0.5], "c": [None]}
    assert common.means(rows, "arm", "r") == {"a": [0.1, 0.3], "b": [None, 0.5], "c": [None, None]}
    assert common.means([r for r in rows if r["arm"] == "c"], "arm", "r", paired=True) == {"c": []}


def test_the_shares_of_answers_are_those_of_the_kept_replies(tmp_path: Path):
    """By hand: 0.9 + 0.05 on yes and no; 0.02; 0.5 on the levels; and a reply without probabilities."""
    kept = (
        {"Yes": math.log(0.9), " no": math.log(0.05), "Maybe": math.log(0.01)},
        {"The": math.log(0.9), "No": math.log(0.02)},
        {"3": math.log(0.3), "**4**": math.log(0.2), "Yes": math.log(0.1)},
        {},
    )
    store = ReplyStore(tmp_path / "replies.sqlite")
    for number, first in enumerate(kept):
        store.put(str(number), "m", Reply(("x",), (False,), Usage(), (first,)))
    store.close()
    found = sorted(answer_share.shares(tmp_path))
    assert [(m, k) for m, k, _ in found] == [("m", "level"), ("m", "yes or no"), ("m", "yes or no")]
    assert [s for *_, s in found] == pytest.approx([0.5, 0.02, 0.95])
    head, _, levels, yes_no = answer_share.table([tmp_path])
    assert head.endswith("| below 10% |") and levels.endswith("| 50.00% | 0 |")
    assert "| yes or no | 2 | 2.00% |" in yes_no and yes_no.endswith("| 95.00% | 1 |")
