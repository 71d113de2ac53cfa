"""The whole path on the embedded parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureinterp.api.common import CORPUS, SUBJECT, Steps, silent
from featureinterp.api.explaining import explain
from featureinterp.api.local import EXPLAINER
from featureinterp.api.results import Results
from featureinterp.api.runs import collect
from featureinterp.jobs.plan import Event, Plan

if TYPE_CHECKING:
    from featureinterp.api.planning import DemoPlan

DEMO_MIN_WINDOWS = 15


def demo(
    *,
    out: str | Path = "featureinterp-demo",
    features: int = 5,
    seed: int = 0,
    max_tokens: int | None = None,
    n_test: int | None = None,
    simulator: str = "token-wise",
    on_plan: Callable[[DemoPlan], None] = silent,
    on_chosen: Callable[[list[str]], object] = silent,
    retry_failed: bool = False,
    replace: bool = False,
    on_event: Callable[[Event], None] = silent,
    steps: Steps = silent,
) -> Results:
    """The whole path on the embedded parts: collects, makes records, explains and scores random features, and
    writes the report.

    Features are drawn at random among those that fire in at least 15 windows. ``max_tokens`` of the corpus
    and ``n_test`` windows of each kind: what this machine does in about ten minutes for five features, when
    not given. What is already in ``out`` is reused. ``on_plan`` gets the plan, ``on_chosen`` a line on each
    feature before any is explained.
    """
    from featureinterp.api.planning import first_figures, planned
    from featureinterp.assets import fetch
    from featureinterp.jobs.records import random_features
    from featureinterp.subject.gguf import hugging_face_folder

    work = planned(Path(out), features, seed, max_tokens, n_test)
    on_plan(work)
    for name in (SUBJECT, EXPLAINER, "all-minilm-l6-v2", CORPUS):
        fetch(name, lambda file, done, total: steps(f"download {file}", done, total))
    for name in (SUBJECT, EXPLAINER):
        steps(f"unpack {name}", 0, 1)
        hugging_face_folder(name)
        steps(f"unpack {name}", 1, 1)
    store = collect(out=out, max_tokens=work.max_tokens, replace=replace, steps=steps)
    chosen = random_features(store, features, seed=seed, min_windows=DEMO_MIN_WINDOWS)
    on_chosen(first_figures(store, chosen))
    plan = Plan(
        n_test=work.n_test,
        n_valid=(work.n_test + 1) // 2,
        negatives=("random", "similar_negative"),
        seed=seed,
    )
    options: dict[str, Any] = {
        "retry_failed": retry_failed,
        "replace": replace,
        "on_event": on_event,
        "steps": steps,
    }
    return explain(out, chosen, plan=plan, simulator=simulator, **options)


def unpacked(name: str) -> Path:
    """The folder of an embedded model as the model library reads it; unpacked once."""
    from featureinterp.subject.gguf import hugging_face_folder

    return hugging_face_folder(name)
