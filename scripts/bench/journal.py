"""The journal against its limits: results written per second, and the seconds to plan the resume of 100,000
features.

    python scripts/bench/journal.py [--quick] [--device cpu]

The limit of writing is 2,000 results per second, that of planning 2 seconds; a ratio above 1 is better than
the limit. What the machine lets through is shown by the bare work: the same rows, their text made before,
inserted by sqlite3 alone. No GPU is used.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from common import arguments, report

from featureinterp.domain.result import FeatureResult
from featureinterp.domain.usage import Usage
from featureinterp.explainers.baselines import TopTokens
from featureinterp.jobs.explain import ExplainJob
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.plan import Plan
from featureinterp.simulators.lexical import Lexical

WRITES_PER_S, PLAN_S = 2_000.0, 2.0


def main() -> None:
    args = arguments(__doc__ or "")
    n = 10_000 if args.quick else 100_000
    value = {"rules": [{"activates_on": "words about the sea", "strength": 5}], "levels": [0.125] * 300}
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.sqlite") as journal:
        writes = n // 10
        start = time.perf_counter()
        for i in range(writes):
            journal.stage(
                f"{i:032x}",
                i,
                "simulate",
                value,
                usage=Usage(3, 1000, 50, 0.5, 0.001),
                provenance={"model": "m", "prompt": "p/v1"},
            )
        rate = writes / (time.perf_counter() - start)
        report(
            "journal: results per second, each its own transaction", rate, WRITES_PER_S, rate / WRITES_PER_S
        )
        bare = writes / bare_seconds(
            Path(folder) / "bare.sqlite", writes, json.dumps(value, separators=(",", ":"))
        )
        report("journal: results per second, share of bare inserts", rate, bare, rate / bare)
        job = ExplainJob(journal, TopTokens(), Lexical(), plan=Plan())
        for i in range(n):
            if i % 10:
                journal.finish(job.key, FeatureResult(i, "sae", 1.0, 0.1, 100, ()), "done")
        start = time.perf_counter()
        left = job.remaining(range(n))
        took = time.perf_counter() - start
        assert len(left) == n // 10
        report(
            f"journal: seconds to plan the resume of {n:,} features",
            took,
            PLAN_S * n / 100_000,
            PLAN_S * n / 100_000 / took,
        )


def bare_seconds(path: Path, n: int, text: str) -> float:
    """Seconds of ``n`` inserts of a row like those of the journal, each its own transaction in a write-ahead
    log.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(
            "CREATE TABLE results (key TEXT PRIMARY KEY, feature INTEGER, stage TEXT, value TEXT)"
        )
        connection.execute("CREATE INDEX by_feature ON results (feature, stage)")
        start = time.perf_counter()
        for i in range(n):
            connection.execute("INSERT INTO results VALUES (?, ?, ?, ?)", (f"{i:032x}", i, "simulate", text))
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
