"""Compares prompts of the explainer and simulators on features of a run, so that the defaults are chosen by
figures.

    python scripts/compare_prompts.py --run RUN --explainer v2 --simulator token-wise/v1 all-at-once/v2
    --features 20 --seed 1

Explains features of a run (``featureinterp collect``) and simulates every explanation on held-out top and
random windows. What is done is kept in ``--work`` and not done again. Prints a Markdown table. How simulators
rank true explanations above wrong ones is measured by ``scripts/bench/truth.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import anyio

from featureinterp import api
from featureinterp.domain.result import FeatureResult
from featureinterp.explainers.one_shot import OneShot
from featureinterp.explainers.styles import SentenceStyle
from featureinterp.jobs.explain import ExplainJob
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.records import random_features
from featureinterp.llm.embedded import EmbeddedModel
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.local.token_wise import TokenWise
from featureinterp.machine import this_machine
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.subject.load import load_causal_lm


async def compare_features(args: argparse.Namespace, put: Callable[[tuple[str, ...]], None]) -> None:
    """Rows of the table of explainers and simulators."""
    put(
        (
            "explainer prompt",
            "simulator and prompt",
            "window",
            "mean r",
            "mean null r",
            "above the null's interval",
            "above top tokens",
        )
    )
    store = api.open_run(args.run)
    chosen = random_features(store, args.features, seed=args.seed, min_windows=api.DEMO_MIN_WINDOWS)
    policy = RecordPolicy({"top": (10, 10, 10), "random": (0, 0, 10)})
    records = dict(zip(chosen, api.records(args.run, chosen, policy=policy), strict=True))
    loaded: list[tuple[object, object]] = []
    dtype = this_machine().dtype(None, None)

    def load() -> tuple[object, object]:
        loaded[:] = loaded or [load_causal_lm(api.EXPLAINER, dtype=dtype)]
        return loaded[0]

    args.work.mkdir(parents=True, exist_ok=True)
    async with EmbeddedModel() as model:
        for explainer_version in args.explainer:
            for simulator_name in args.simulator:
                kind, _, version = simulator_name.partition("/")
                simulator = (TokenWise if kind == "token-wise" else AllAtOnce)(
                    load, name=api.EXPLAINER, dtype=dtype, version=version
                )
                plan = Plan(
                    n_test=args.windows, n_valid=0, negatives=("random",), concurrency=1, seed=args.seed
                )
                start = time.monotonic()
                with Journal(args.work / "journal.sqlite") as journal:
                    job = ExplainJob(
                        journal,
                        OneShot(model, SentenceStyle(explainer_version)),
                        simulator,
                        plan=plan,
                        on_event=lambda e: say(
                            f"{e.stage} {e.done}/{e.total}: {e.result.feature} "
                            f"{e.result.explanation and e.result.explanation.text}"
                        ),
                    )
                    await job.run(chosen, lambda features: iter([records[f] for f in features]))
                    results = list(journal.features(job.key, chosen))
                say(f"{time.monotonic() - start:.0f} s")
                put((explainer_version, simulator_name, str(store.windows.length), *figures_of(results)))


def figures_of(results: list[FeatureResult]) -> tuple[str, ...]:
    """Mean correlation, mean null, share above the null's interval, share above the top-token baseline."""
    scores = [(r.score("correlation"), r.baseline_score("correlation")) for r in results]
    known = [(s, b) for s, b in scores if s and s.value is not None]
    above = sum(s.clear_of_null for s, _ in known)
    beats = sum(
        bool(b and b.value is not None and s.value is not None and s.value > b.value) for s, b in known
    )
    nulls = [s.null for s, _ in known if s.null is not None]
    values = [s.value for s, _ in known if s.value is not None]
    return (
        f"{mean(values):.2f}",
        f"{mean(nulls):.2f}",
        f"{above} of {len(results)}",
        f"{beats} of {len(results)}",
    )


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def row(cells: tuple[str, ...], header: list[bool]) -> None:
    """One line of the Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)
    if not header:
        print("|" + " --- |" * len(cells), flush=True)
        header.append(True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("compare-prompts"))
    parser.add_argument(
        "--explainer", nargs="+", default=["v1", "v2"], help="versions of prompts/explain-sentence"
    )
    parser.add_argument(
        "--simulator",
        nargs="+",
        default=["token-wise/v1", "all-at-once/v2"],
        help="simulators and versions of their prompts",
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of each kind")
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    header: list[bool] = []
    anyio.run(compare_features, args, lambda cells: row(cells, header))


if __name__ == "__main__":
    main()
