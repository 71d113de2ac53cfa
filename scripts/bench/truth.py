"""Which scores tell a true explanation from a wrong one, beside which windows, and which explainers find the
truth?

    python scripts/bench/truth.py [--small] [--out FOLDER] [--device cpu|cuda] [--dtype float32|bfloat16]

Features are planted in the embedded corpus (``planted.py``), so that the true explanation of each is known,
and wrong ones of named kinds. Every explanation is simulated on held-out windows where the feature fires and
on windows of every kind where it may not; every score is judged by the share of features for which the true
explanation scores above the wrong one (ties count half): the AUROC within a feature, with a 95 % bootstrap
interval over features (``truth_scores.py``). Then every explainer is given the features, and judged by how
often it names what was planted (``truth_explainers.py``), and texts are written to test explanations and
features (``truth_falsify.py``). One half of the features is for choosing settings (``--half development``),
the other is reported (``--half report``). What is done is kept in FOLDER; the same command goes on. Prints
Markdown tables and writes them as CSV, and everything as ``truth.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from planted import FEATURES, Planted, development, plant
from transformers import AutoTokenizer
from truth_explainers import Descriptions, explained, explainers, hard_correlation, print_explainers
from truth_falsify import KINDS, PlantedActivator, print_sensitivity, print_trials, sensed, tried
from truth_scores import BESIDE, HARD, Row, asked, explanations, print_scores, ranked, simulated

import featureinterp as fi
from featureinterp import api
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.domain.record import FeatureRecord, Source
from featureinterp.falsification.counterexamples import Falsifier
from featureinterp.falsification.writing import TextWriter
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.kept import KeptSimulator, working_on
from featureinterp.jobs.records import build_records
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.config import Endpoint
from featureinterp.llm.metered import Meter
from featureinterp.llm.stack import open_stack
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.local.chat import LocalModel
from featureinterp.local.token_wise import TokenWise
from featureinterp.machine import this_machine
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.similar import SentenceEmbedder
from featureinterp.scorers.detection import FitJudge
from featureinterp.simulators.lexical import Lexical
from featureinterp.subject.load import HubTokenizer, load_causal_lm, model_source

LENGTH, TOKENS = 24, 200_000
PARTS = ("scores", "questions", "explainers", "trials", "sensitivity")


def main() -> None:
    args = arguments()
    wanted = [
        i
        for i, f in enumerate(FEATURES)
        if args.half == "all" or development(f) == (args.half == "development")
    ]
    if args.small:
        wanted = wanted[:: max(1, len(wanted) // 12)]
    n = 3 if args.small else args.windows
    shown = n if "explainers" in args.parts else 0
    from_examples = not {"sensitivity", "trials"}.isdisjoint(args.parts)
    learnt = 10 if shown or from_examples else 0
    counts: dict[Source, tuple[int, int, int]] = {
        source: (0, n if source == "random" else 0, n) for source in BESIDE
    }
    counts |= {"top": (learnt, n, n), "weighted": (5 if from_examples else 0, 0, 0), HARD: (shown, shown, n)}
    records = {
        r.feature.index: r
        for r in build_records(args.out, planted_run(args.out), wanted, RecordPolicy(counts))
    }
    anyio.run(judged, args, [records[i] for i in wanted])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("truth"),
        help="folder for windows, planted codes, what is done, and the tables",
    )
    parser.add_argument(
        "--small", action="store_true", help="a dozen features, three windows of each kind, a small tree"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["scores", "explainers"],
        help="questions: detection and fuzzing; trials, sensitivity: written texts",
    )
    parser.add_argument(
        "--explainers", nargs="+", help="which, by name; all but the older prompts when not given"
    )
    parser.add_argument("--half", choices=("development", "report", "all"), default="report")
    parser.add_argument("--windows", type=int, default=6, help="windows of each kind")
    parser.add_argument("--simulator", choices=("token-wise", "all-at-once", "lexical"), default="token-wise")
    parser.add_argument(
        "--model", default=api.EXPLAINER, help="the model that simulates and answers questions"
    )
    parser.add_argument(
        "--base-url", help="endpoint of the model that explains; the embedded one when not given"
    )
    parser.add_argument("--llm-model", default="", help="its model")
    parser.add_argument("--version", help="version of the simulator's prompt")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the simulator")
    return parser.parse_args()


def planted_run(out: Path) -> CodesStore:
    """Windows of the embedded corpus, with the planted features as codes."""
    windows = build_windows(
        fi.load_corpus(api.CORPUS), subject_tokenizer(), WindowPolicy(LENGTH, LENGTH, TOKENS), out / "windows"
    )
    return plant(out, windows)


async def judged(args: argparse.Namespace, records: Sequence[FeatureRecord]) -> None:
    """Runs the parts that were asked for, prints their tables and writes their files."""
    loaded: list[Any] = []
    dtype = this_machine().dtype(args.dtype, args.device)

    def load() -> tuple[Any, Any]:
        loaded[:] = loaded or [load_causal_lm(args.model, device=args.device, dtype=dtype)]
        return loaded[0]  # type: ignore[no-any-return]

    if args.simulator == "lexical":
        simulator: Any = Lexical()
    else:
        simulator = (AllAtOnce if args.simulator == "all-at-once" else TokenWise)(
            load, name=args.model, dtype=dtype, version=args.version, temperature=args.temperature
        )
    replies = ReplyStore(args.out / "replies.sqlite")
    found: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    with Journal(args.out / "truth.sqlite") as journal:
        kept = KeptSimulator(simulator, journal)
        if "scores" in args.parts or "questions" in args.parts:
            judge = LocalModel(load, name=args.model, dtype=dtype)
            rows = await scores(args.parts, kept, Cached(judge, replies), records)
            write(args.out / "scores.csv", rows)
            print_scores(rows)
            found["scores"] = [
                {**t, "interval": t["interval"] and [t["interval"].low, t["interval"].high]}
                for t in ranked(rows)
            ]
        if "explainers" in args.parts:
            endpoint = Endpoint(args.base_url, args.llm_model) if args.base_url else Endpoint()
            async with open_stack(endpoint, Meter()) as stack:
                known = explainers(stack.model(replies), kept, small=args.small)
                chosen = {
                    name: known[name]
                    for name in args.explainers or known
                    if args.explainers or not name.endswith(" v1")
                }
                rows, truth = await explanations_of(chosen, kept, records)
            write(args.out / "explainers.csv", rows)
            print()
            print_explainers(rows, truth)
            found["explainers"] = rows
        if "trials" in args.parts or "sensitivity" in args.parts:
            async with open_stack(
                Endpoint(args.base_url, args.llm_model) if args.base_url else Endpoint(), Meter()
            ) as stack:
                found |= await written(args.parts, stack.model(replies), kept, records, args.out)
    (args.out / "truth.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


async def scores(
    parts: Sequence[str], simulator: Any, model: Any, records: Sequence[FeatureRecord]
) -> list[Row]:
    """One row per feature, explanation, score and kind of window."""
    rows: list[Row] = []
    for number, record in enumerate(records):
        feature = FEATURES[record.feature.index]
        for kind, explanation in explanations(feature).items():
            with working_on(record.feature.index):
                rows += await simulated(simulator, feature, kind, explanation, record)
            if "questions" in parts:
                rows += await asked(model, feature, kind, explanation, record)
        say(f"{number + 1} of {len(records)}: {feature.name}: {summary(rows, feature)}")
    return rows


async def explanations_of(
    by_name: dict[str, Any], simulator: Any, records: Sequence[FeatureRecord]
) -> tuple[list[Row], dict[str, float | None]]:
    """One row per feature and explainer, and the correlations of the true explanations."""
    descriptions = Descriptions(SentenceEmbedder())
    rows: list[Row] = []
    truth: dict[str, float | None] = {}
    for number, record in enumerate(records):
        feature = FEATURES[record.feature.index]
        with working_on(record.feature.index):
            truth[feature.name] = await hard_correlation(simulator, feature, "true", feature.truth, record)
            for name, explainer in by_name.items():
                rows.append(await explained(explainer, name, simulator, descriptions, feature, record))
        say(
            f"{number + 1} of {len(records)}: {feature.name}: "
            + ", ".join(f"{r['explainer']}: {r['explanation']}" for r in rows[-len(by_name) :])
        )
    return rows, truth


async def written(
    parts: Sequence[str], model: Any, simulator: Any, records: Sequence[FeatureRecord], out: Path
) -> dict[str, list[Row]]:
    """The parts that rest on texts which a language model writes."""
    activator = PlantedActivator(subject_tokenizer())
    found: dict[str, list[Row]] = {}
    if "trials" in parts:
        rows: list[Row] = []
        for number, record in enumerate(records):
            feature = FEATURES[record.feature.index]
            with working_on(record.feature.index):
                rows += await tried(Falsifier(model, activator, FitJudge(model)), simulator, feature, record)
            shown = ", ".join(
                f"{r['explanation']} " + ("–" if r["f1"] is None else f"{r['f1']:.2f}")
                for r in rows[-len(KINDS) :]
            )
            say(f"{number + 1} of {len(records)}: {feature.name}: {shown}")
        write(out / "trials.csv", rows)
        print()
        print_trials(rows)
        found["trials"] = rows
    if "sensitivity" in parts:
        found["sensitivity"] = await sensed(TextWriter(model), activator, records, 10)
        write(out / "sensitivity.csv", found["sensitivity"])
        print()
        print_sensitivity(found["sensitivity"])
    return found


def subject_tokenizer() -> HubTokenizer:
    """That of the embedded subject."""
    return HubTokenizer(AutoTokenizer.from_pretrained(model_source(api.SUBJECT)))


def summary(rows: Sequence[Row], feature: Planted) -> str:
    """A feature's correlations beside random windows, by explanation."""
    shown = [
        r
        for r in rows
        if r["feature"] == feature.name and r["score"] == "correlation" and r["beside"] == "random"
    ]
    return ", ".join(
        f"{r['explanation']} " + ("–" if r["value"] is None else f"{r['value']:.2f}") for r in shown
    )


def write(path: Path, rows: Sequence[Row]) -> None:
    """Rows as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
