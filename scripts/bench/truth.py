"""Which scores, and beside which windows, tell a true explanation from a wrong one?

    python scripts/bench/truth.py [--small] [--out FOLDER] [--device cpu|cuda]

Features are planted in the embedded corpus (``planted.py``), so that the true explanation of each is known, and wrong ones of named kinds. Every
explanation is simulated on held-out windows where the feature fires and on windows of every kind where it may not; every score is judged by the
share of features for which the true explanation scores above the wrong one (ties count half): the AUROC within a feature, with a 95 %
bootstrap interval over features. One half of the features is for choosing settings (``--half development``), the other is reported
(``--half report``). What is done is kept in FOLDER; the same command goes on. Prints a Markdown table and writes ``truth.csv`` and ``truth.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from planted import FEATURES, WRONG, Planted, development, plant
from transformers import AutoTokenizer

import featureinterp as fi
from featureinterp import api
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord, Source, Window
from featureinterp.domain.score import Interval, Simulation
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.kept import KeptSimulator, working_on
from featureinterp.jobs.records import build_records
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.records.policy import RecordPolicy
from featureinterp.score.correlation import Pairs, correlation, deviation_explained, explained_variance, false_positives
from featureinterp.score.detection import Detection
from featureinterp.score.fuzzing import Fuzzing
from featureinterp.score.intervals import bootstrap
from featureinterp.score.verdicts import judge
from featureinterp.simulate.all_at_once import AllAtOnce
from featureinterp.simulate.lexical import Lexical
from featureinterp.simulate.token_wise import TokenWise
from featureinterp.subject.load import HubTokenizer, load_causal_lm, model_source

BESIDE: tuple[Source, ...] = ("random", "random_negative", "similar_negative", "projected_similar_negative")
LENGTH, TOKENS = 24, 200_000
Row = dict[str, Any]


def main() -> None:
    args = arguments()
    wanted = [i for i, f in enumerate(FEATURES) if args.half == "all" or development(f) == (args.half == "development")]
    if args.small:
        wanted = wanted[:: max(1, len(wanted) // 12)]
    store = planted_run(args.out)
    n = 3 if args.small else args.windows
    counts = {"top": (0, n, n), **{source: (0, n if source == "random" else 0, n) for source in BESIDE}}
    records = {r.feature.index: r for r in build_records(args.out, store, wanted, RecordPolicy(counts))}
    rows = anyio.run(judged, args, [records[i] for i in wanted])
    write(args.out, rows, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("truth"), help="folder for windows, planted codes, what is done, and the tables")
    parser.add_argument("--small", action="store_true", help="a dozen features, three windows of each kind")
    parser.add_argument("--half", choices=("development", "report", "all"), default="report")
    parser.add_argument("--windows", type=int, default=6, help="windows of each kind")
    parser.add_argument("--simulator", choices=("token-wise", "all-at-once", "lexical"), default="token-wise")
    parser.add_argument("--model", default=api.EXPLAINER, help="the simulator's model")
    parser.add_argument("--version", help="version of the simulator's prompt")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--questions", action="store_true", help="detection and fuzzing, too")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def planted_run(out: Path) -> CodesStore:
    """Windows of the embedded corpus, with the planted features as codes."""
    tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(model_source(api.SUBJECT)))
    windows = build_windows(fi.load_corpus(api.CORPUS), tokenizer, WindowPolicy(LENGTH, LENGTH, TOKENS), out / "windows")
    return plant(out, windows)


async def judged(args: argparse.Namespace, records: Sequence[FeatureRecord]) -> list[Row]:
    """One row per feature, explanation and score."""
    loaded: list[Any] = []

    def load() -> tuple[Any, Any]:
        loaded[:] = loaded or [load_causal_lm(args.model, device=args.device)]
        return loaded[0]  # type: ignore[no-any-return]

    if args.simulator == "lexical":
        simulator: Any = Lexical()
    else:
        simulator = (AllAtOnce if args.simulator == "all-at-once" else TokenWise)(load, name=args.model, version=args.version, temperature=args.temperature)
    rows: list[Row] = []
    replies = ReplyStore(args.out / "replies.sqlite")
    with Journal(args.out / "truth.sqlite") as journal:
        kept = KeptSimulator(simulator, journal)
        for number, record in enumerate(records):
            feature = FEATURES[record.feature.index]
            for kind, explanation in explanations(feature).items():
                with working_on(record.feature.index):
                    rows += await simulated(kept, feature, kind, explanation, record)
                if args.questions:
                    rows += await asked(args, load, replies, feature, kind, explanation, record)
            say(f"{number + 1} of {len(records)}: {feature.name}: {summary(rows, feature)}")
    return rows


def explanations(feature: Planted) -> dict[str, Explanation]:
    """The true explanation and the wrong ones, by kind; "another concept" comes from further on in the list."""
    place = FEATURES.index(feature)
    others = [FEATURES[(place + 17 + i) % len(FEATURES)] for i in range(len(FEATURES))]
    return {"true": feature.truth, **feature.wrong(others)}


async def simulated(simulator: Any, feature: Planted, kind: str, explanation: Explanation, record: FeatureRecord) -> list[Row]:
    """The scores that come from simulations, beside every kind of window."""
    parts: dict[tuple[str, Source], tuple[Window, ...]] = {("valid", "top"): record.get("valid", "top"), ("valid", "random"): record.get("valid", "random")}
    parts |= {("test", source): record.get("test", source) for source in ("top", *BESIDE)}
    windows = [w for part in parts.values() for w in part]
    found = iter(await simulator.simulate(explanation, windows))
    by_part: dict[tuple[str, Source], list[Simulation]] = {part: [next(found) for _ in ws] for part, ws in parts.items()}

    def pairs(split: str, source: Source) -> Pairs:
        return Pairs.of(parts[split, source], by_part[split, source])

    rows = []
    valid = pairs("valid", "top") + pairs("valid", "random")
    for source in BESIDE:
        test = pairs("test", "top") + pairs("test", source)
        scores = {
            "correlation": correlation(test),
            "explained variance": explained_variance(valid, test),
            "deviation explained": deviation_explained(valid, test),
        }
        if source.endswith("negative"):
            scores["false positives (fewer is better)"] = false_positives(pairs("valid", "top"), pairs("test", source))
        for name, score in scores.items():
            rows.append(row_of(feature, kind, name, source, score.value))
    return rows


async def asked(
    args: argparse.Namespace, load: Callable[[], Any], replies: ReplyStore, feature: Planted, kind: str, explanation: Explanation, record: FeatureRecord
) -> list[Row]:
    """Detection beside every kind of silent window, and fuzzing."""
    from featureinterp.llm.local import LocalModel

    model = Cached(LocalModel(load, name=args.model), replies)
    rows = []
    top = record.get("test", "top")
    for source in BESIDE[1:]:
        _, verdicts, _ = await Detection(model).run(explanation, [*top, *record.get("test", source)])
        rows += [row_of(feature, kind, s.name.replace("_", " "), source, s.value) for s in judge("detection", verdicts)]
    _, verdicts, _ = await Fuzzing(model).run(explanation, top)
    return rows + [row_of(feature, kind, s.name.replace("_", " "), "top", s.value) for s in judge("fuzzing", verdicts)]


def row_of(feature: Planted, kind: str, score: str, source: str, value: float | None) -> Row:
    return {"feature": feature.name, "family": feature.family, "explanation": kind, "score": score, "beside": source, "value": value}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """For every score, kind of window and kind of wrong explanation: the share of features whose true explanation scores above the wrong one. An
    undefined score of a wrong explanation counts as below, of a true one as below any that is defined."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        sign = -1.0 if "fewer" in row["score"] else 1.0
        value = -np.inf if row["value"] is None else sign * row["value"]
        values.setdefault((row["score"], row["beside"], row["explanation"]), {})[row["feature"]] = value
    table = []
    for (score, beside, kind), wrong in values.items():
        if kind == "true":
            continue
        true = values[score, beside, "true"]
        wins = np.array([paired(true[name], value) for name, value in wrong.items()])
        interval = bootstrap(lambda counts, wins=wins: counts @ wins / len(wins), len(wins), np.random.default_rng(0))  # type: ignore[misc]
        table.append({"score": score, "beside": beside, "wrong": kind, "auroc": float(wins.mean()), "interval": interval, "n": len(wins)})
    return table


def paired(true: float, wrong: float) -> float:
    """1 when the true explanation scores above the wrong one, ½ when equal, else 0."""
    return 1.0 if true > wrong else 0.5 if true == wrong else 0.0


def summary(rows: Sequence[Row], feature: Planted) -> str:
    """A feature's correlations beside random windows, by explanation."""
    shown = [r for r in rows if r["feature"] == feature.name and r["score"] == "correlation" and r["beside"] == "random"]
    return ", ".join(f"{r['explanation']} " + ("–" if r["value"] is None else f"{r['value']:.2f}") for r in shown)


def write(out: Path, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """``truth.csv`` (every value), ``truth.json`` (the table and the settings), and the table on the screen."""
    table = ranked(rows)
    with (out / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
    as_json = [{**t, "interval": None if t["interval"] is None else [t["interval"].low, t["interval"].high]} for t in table]
    (out / "truth.json").write_text(json.dumps({"settings": settings, "table": as_json}, indent=1) + "\n", encoding="utf-8")
    print("| score | beside | " + " | ".join(WRONG) + " |")
    print("| --- | --- |" + " --- |" * len(WRONG))
    for score, beside in dict.fromkeys((t["score"], t["beside"]) for t in table):
        cells = [cell(next((t for t in table if (t["score"], t["beside"], t["wrong"]) == (score, beside, kind)), None)) for kind in WRONG]
        print(f"| {score} | {beside.replace('_', ' ')} | " + " | ".join(cells) + " |")


def cell(entry: Row | None) -> str:
    """An AUROC with its interval."""
    if entry is None:
        return "–"
    interval: Interval | None = entry["interval"]
    return f"{entry['auroc']:.2f}" + (f" ({interval.low:.2f}–{interval.high:.2f})" if interval else "")


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
