"""Compares versions of the prompts, so that the defaults are chosen by figures.

    python scripts/compare_prompts.py truth --simulator v1 v2
    python scripts/compare_prompts.py features --run RUN --explainer v1 v2 --simulator v1 --features 20 --seed 1

``truth`` marks tokens of the embedded corpus by hand-written definitions (names of months, modal verbs, …) and simulates each concept with
its true explanation, with one that is too broad and with a wrong one. A simulator is good when it ranks the three in this order by a wide
margin; the height of the correlation says little, because the simulating model is small.

``features`` explains features of a run (``featureinterp collect``) and simulates every explanation on held-out top and random windows. What
is done is kept in ``--work`` and not done again. Both print a Markdown table.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import anyio
import numpy as np
from transformers import AutoTokenizer

from featureinterp import api
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.record import Window
from featureinterp.domain.result import FeatureResult
from featureinterp.explain.one_shot import OneShot
from featureinterp.explain.styles import SentenceStyle
from featureinterp.jobs.explain import ExplainJob
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Plan
from featureinterp.jobs.records import random_features
from featureinterp.llm.embedded import EmbeddedModel
from featureinterp.records.policy import RecordPolicy
from featureinterp.score.correlation import Pairs, correlation
from featureinterp.simulate.all_at_once import AllAtOnce
from featureinterp.subject.load import HubTokenizer, load_causal_lm, model_source


@dataclass(frozen=True)
class Concept:
    """Tokens that match ``pattern``, and explanations of them: true, too broad, wrong."""

    pattern: str
    explanations: tuple[str, str, str]


CONCEPTS = (
    Concept(r" (January|February|March|April|June|July|August|September|October|November|December)", ("names of months", "words about time", "verbs")),
    Concept(r" (wars?|army|navy|troops|soldiers|enemy|weapons|battle|military)", ("words about war and the military", "nouns", "names of months")),
    Concept(r"\d", ("digits of numbers", "words about money", "names of people")),
    Concept(r" (not|no|never|nor|cannot)", ('words of negation such as "not" and "never"', "short words", "words about farming")),
    Concept(r" (should|must|shall|would|could|will)", ('modal verbs such as "should" and "will"', "verbs", "punctuation")),
    Concept(r" than", ('the word "than"', "comparisons", "names of countries")),
    Concept(r" [a-z]{2,}ing", ("words that end in -ing", "verbs", "digits of numbers")),
    Concept(r" of", ('the word "of"', "short words", "words about war")),
)


def concept_windows(table: WindowTable, concept: Concept, n: int) -> list[Window]:
    """``n`` windows with the concept and ``n`` without it, activations 1 on its tokens."""
    found: dict[bool, list[Window]] = {True: [], False: []}
    for row in np.random.default_rng(0).permutation(len(table)).tolist():
        pieces = table.pieces(row)
        activations = np.array([bool(re.fullmatch(concept.pattern, piece)) for piece in pieces], np.float32)
        group = found[bool(activations.any())]
        if len(group) < n:
            group.append(Window(row, int(table.documents[row]), table.ids(row), pieces, activations))
    return found[True] + found[False]


def compare_truth(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Rows of the table of simulators."""
    yield ("simulator prompt", "temperature", "header tokens", "prompt tokens per token", "true", "too broad", "wrong", "ranked right")
    model = load_causal_lm(api.EXPLAINER)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(model_source(api.SUBJECT)))
        table = build_windows(load_corpus(api.CORPUS), tokenizer, WindowPolicy(args.length, args.length, 40_000), Path(folder))
        windows = [concept_windows(table, c, args.windows) for c in CONCEPTS]
    for version in args.simulator:
        simulator = AllAtOnce(lambda: model, name=api.EXPLAINER, version=version, temperature=args.temperature)
        rs = []
        for concept, shown in zip(CONCEPTS, windows, strict=True):
            found = []
            for text in concept.explanations:
                simulated = simulator.predict(Explanation.sentence(text, Provenance("given")), shown)
                r = correlation(Pairs.of(shown, simulated), "r", seed=0).value
                found.append(float("nan") if r is None else r)  # undefined: left out of the means, and never ranked right
            rs.append(found)
            say(f"{version}: {concept.explanations[0]}: " + " / ".join(f"{r:.2f}" for r in found))
        per_token = mean(len(simulator.builder.window(w.pieces).ids) / len(w.pieces) for shown in windows for w in shown)
        ranked = mean(a > b > c for a, b, c in rs)
        figures = (f"{value:.2f}" for value in np.nanmean(rs, 0))
        yield (version, f"{args.temperature:g}", str(len(simulator.builder.header)), f"{per_token:.1f}", *figures, f"{ranked:.0%}")


async def compare_features(args: argparse.Namespace, put: Callable[[tuple[str, ...]], None]) -> None:
    """Rows of the table of explainers and simulators."""
    put(("explainer prompt", "simulator prompt", "temperature", "window", "mean r", "mean null r", "above the null's interval", "above top tokens"))
    store = api.open_run(args.run)
    chosen = random_features(store, args.features, seed=args.seed, min_windows=api.DEMO_MIN_WINDOWS)
    policy = RecordPolicy({"top": (10, 10, 10), "random": (0, 0, 10)})
    records = dict(zip(chosen, api.records(args.run, chosen, policy=policy), strict=True))
    loaded: list[tuple[object, object]] = []

    def load() -> tuple[object, object]:
        loaded[:] = loaded or [load_causal_lm(api.EXPLAINER)]
        return loaded[0]

    args.work.mkdir(parents=True, exist_ok=True)
    async with EmbeddedModel() as model:
        for explainer_version in args.explainer:
            for simulator_version in args.simulator:
                simulator = AllAtOnce(load, name=api.EXPLAINER, version=simulator_version, temperature=args.temperature)
                plan = Plan(n_test=args.windows, n_valid=0, negatives=("random",), concurrency=1, seed=args.seed)
                start = time.monotonic()
                with Journal(args.work / "journal.sqlite") as journal:
                    job = ExplainJob(
                        journal,
                        OneShot(model, SentenceStyle(explainer_version)),
                        simulator,
                        plan=plan,
                        on_event=lambda e: say(f"{e.stage} {e.done}/{e.total}: {e.result.feature} {e.result.explanation and e.result.explanation.text}"),
                    )
                    await job.run(chosen, lambda features: iter([records[f] for f in features]))
                    results = list(journal.features(job.key, chosen))
                say(f"{time.monotonic() - start:.0f} s")
                put((explainer_version, simulator_version, f"{args.temperature:g}", str(store.windows.length), *figures_of(results)))


def figures_of(results: list[FeatureResult]) -> tuple[str, ...]:
    """Mean correlation, mean null, share above the null's interval, share above the top-token baseline."""
    scores = [(r.score("correlation"), r.baseline_score("correlation")) for r in results]
    known = [(s, b) for s, b in scores if s and s.value is not None]
    above = sum(s.clear_of_null for s, _ in known)
    beats = sum(bool(b and b.value is not None and s.value is not None and s.value > b.value) for s, b in known)
    nulls = [s.null for s, _ in known if s.null is not None]
    values = [s.value for s, _ in known if s.value is not None]
    return (f"{mean(values):.2f}", f"{mean(nulls):.2f}", f"{above} of {len(results)}", f"{beats} of {len(results)}")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    truth, features = kinds.add_parser("truth"), kinds.add_parser("features")
    for kind, n in ((truth, 5), (features, 8)):
        kind.add_argument("--simulator", nargs="+", default=["v1", "v2"], help="versions of prompts/simulate-all-at-once")
        kind.add_argument("--temperature", type=float, default=0.5, help="of the level distribution; below 1 sharpens it")
        kind.add_argument("--windows", type=int, default=n, help="windows of each kind")
    truth.add_argument("--length", type=int, default=24, help="tokens per window")
    features.add_argument("--run", type=Path, required=True)
    features.add_argument("--work", type=Path, default=Path("compare-prompts"))
    features.add_argument("--explainer", nargs="+", default=["v1", "v2"], help="versions of prompts/explain-sentence")
    features.add_argument("--features", type=int, default=20)
    features.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    header: list[bool] = []
    if args.kind == "truth":
        for cells in compare_truth(args):
            row(cells, header)
    else:
        anyio.run(compare_features, args, lambda cells: row(cells, header))


if __name__ == "__main__":
    main()
