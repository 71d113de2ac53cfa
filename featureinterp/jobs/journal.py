"""The journal of a job: one SQLite file (write-ahead log) in which everything that finished is a row,
failures included.

Table ``results``: one stage of one feature. ``key``: content hash of everything that the result depends on.
``feature``, ``stage``.
``status``: ``done``; ``partial`` (usable, but some of its requests failed; running again tries those again);
``failed``. ``value``: JSON; of a failure its error and message. ``requests``, ``prompt_tokens``,
``completion_tokens``, ``seconds``, ``cost_usd`` (null: not known): what it cost. ``provenance``: JSON with
the model and prompt; of a partial stage also ``gaps``, why its requests failed and how many of each; and
``usage``, where there are any, with ``cached_tokens`` of the prompts and ``estimated``, the requests whose
tokens were not reported.
``created``: Unix seconds.

Table ``features``: a feature with all its stages. ``job``: content hash of all settings. ``status`` as above.
``summary``: JSON with explanation, scores and failures. ``windows``: zlib-compressed JSON of the windows with
true and predicted activations.

Table ``runs``: every start of the job: ``started``, ``ended``, ``outcome``, ``cost_usd``, ``requests``.

A row appears in one transaction, so that a killed process leaves a journal that is whole and lacks at most
what was in flight.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureinterp.domain.result import FeatureResult
from featureinterp.domain.score import Failure
from featureinterp.domain.usage import Usage
from featureinterp.files import parse_json
from featureinterp.stored.sums import described
from featureinterp.stored.tables import Table, Tables

VERSION, READS = 4, (3,)
MOST_GAPS = 5
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_STATUS = "status TEXT NOT NULL CHECK (status IN ('done', 'partial', 'failed'))"
_SPENT = ("requests", "prompt_tokens", "completion_tokens", "seconds", "cost_usd")
TABLES = {
    "results": Table(
        f"key TEXT PRIMARY KEY, feature INTEGER NOT NULL, stage TEXT NOT NULL, {_STATUS}, value TEXT NOT "
        "NULL, "
        "requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, "
        "seconds REAL NOT NULL, "
        "cost_usd REAL, provenance TEXT NOT NULL, created REAL NOT NULL",
        ("key", "feature", "stage", "status", *_SPENT, "provenance", "created"),
        ("value",),
    ),
    "features": Table(
        f"job TEXT NOT NULL, feature INTEGER NOT NULL, {_STATUS}, summary TEXT NOT NULL, windows BLOB NOT "
        "NULL, "
        "created REAL NOT NULL, PRIMARY KEY (job, feature)",
        ("job", "feature", "status", "created"),
        ("summary", "windows"),
    ),
    "runs": Table(
        "id INTEGER PRIMARY KEY, job TEXT NOT NULL, started REAL NOT NULL, ended REAL, outcome TEXT, "
        "wanted INTEGER NOT NULL, requests INTEGER, cost_usd REAL",
        ("job", "started", "ended", "outcome", "wanted", "requests", "cost_usd"),
    ),
}
_INDEX = "CREATE INDEX IF NOT EXISTS results_by_feature ON results (feature, stage)"
_REMEDY = (
    "restore it from a copy, or delete it to start anew (replies.sqlite beside it keeps what was paid for)"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A stage as the journal has it."""

    status: str
    value: Any
    usage: Usage


class Journal:
    """Opens or makes the journal at ``path`` (``":memory:"``: one that is kept nowhere). Use it as a context
    manager, from one thread.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._tables = Tables(
            path, TABLES, "the journal", version=VERSION, reads=READS, indexes=_INDEX, remedy=_REMEDY
        )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()

    def check(self) -> int:
        """Raises ``DamagedStoreError`` when anything in the journal is not what was written. How many rows
        have no checksum.
        """
        return self._tables.check()

    def get(self, key: str) -> Row | None:
        """A stage that is done or partly done; None when it has not run or has failed."""
        for row in self._tables.rows("results", "WHERE key = ? AND status != 'failed'", (key,)):
            more = self._read(row["provenance"]).get("usage", {})
            return Row(
                row["status"], self._read(row["value"]), Usage(*(row[name] for name in _SPENT), **more)
            )
        return None

    def _read(self, text: str | bytes) -> Any:
        with described(Path(self.path), _REMEDY):
            return parse_json(text)

    def stage(
        self,
        key: str,
        feature: int,
        stage: str,
        value: Any,
        *,
        usage: Usage | None = None,
        provenance: Mapping[str, Any] | None = None,
        partial: bool = False,
        gaps: Sequence[str] = (),
    ) -> None:
        """Writes a finished stage, over an earlier failure of it. ``gaps``: why parts of it failed, which
        makes it partial.
        """
        known = dict(Counter(gaps).most_common(MOST_GAPS))
        found = {**(provenance or {}), "gaps": known} if known else provenance or {}
        self._write(
            key, feature, stage, "partial" if partial or known else "done", value, usage or Usage(), found
        )

    def failed(self, key: str, failure: Failure, *, usage: Usage | None = None) -> None:
        """Writes a failure; running again tries it again."""
        self._write(
            key,
            failure.feature,
            failure.stage,
            "failed",
            {"error": failure.error, "message": failure.message},
            usage or Usage(),
            {},
        )

    def _write(
        self,
        key: str,
        feature: int,
        stage: str,
        status: str,
        value: Any,
        usage: Usage,
        provenance: Mapping[str, Any],
    ) -> None:
        extra = {
            name: n
            for name, n in (("cached_tokens", usage.cached_tokens), ("estimated", usage.estimated))
            if n
        }
        provenance = {**provenance, "usage": extra} if extra else provenance
        spent = (usage.requests, usage.prompt_tokens, usage.completion_tokens, usage.seconds, usage.cost_usd)
        row = {"key": key, "feature": feature, "stage": stage, "status": status, "value": _dumps(value)}
        row |= dict(zip(_SPENT, spent, strict=True))
        self._tables.put("results", row | {"provenance": _dumps(provenance), "created": time.time()})

    def finish(self, job: str, result: FeatureResult, status: str) -> None:
        """Writes a feature that is through all stages."""
        summary = result.to_json()
        windows = zlib.compress(_dumps(summary.pop("windows")).encode(), 6)
        row = {
            "job": job,
            "feature": result.feature,
            "status": status,
            "summary": _dumps(summary),
            "windows": windows,
        }
        self._tables.put("features", row | {"created": time.time()})

    def finished(self, job: str) -> dict[int, str]:
        """Status of every feature that a job is through with."""
        self._tables.check_small("features")
        rows = self._tables.small("SELECT feature, status FROM features WHERE job = ?", (job,))
        return {row["feature"]: row["status"] for row in rows}

    def features(self, job: str, wanted: Sequence[int] | None = None) -> Iterator[FeatureResult]:
        """The results of a job, in the order of ``wanted`` or by index; those that are not there are left
        out.
        """
        if wanted is None:
            rows = self._tables.rows("features", "WHERE job = ? ORDER BY feature", (job,))
        else:
            one = "WHERE job = ? AND feature = ?"
            rows = (row for i in wanted for row in list(self._tables.rows("features", one, (job, i))))
        for row in rows:
            with described(Path(self.path), _REMEDY):
                windows = parse_json(zlib.decompress(row["windows"]))
                found = FeatureResult.from_json(parse_json(row["summary"]) | {"windows": windows})
            yield found

    def start(self, job: str, wanted: int) -> int:
        """Writes that a run begins; returns its number."""
        row = {"job": job, "started": time.time(), "ended": None, "outcome": None, "wanted": wanted}
        return self._tables.put("runs", row | {"requests": None, "cost_usd": None})

    def end(self, run: int, outcome: str, usage: Usage) -> None:
        """Writes how a run ended and what it spent."""
        for row in list(self._tables.rows("runs", "WHERE id = ?", (run,))):
            ended = {
                "ended": time.time(),
                "outcome": outcome,
                "requests": usage.requests,
                "cost_usd": usage.cost_usd,
            }
            self._tables.put("runs", row | ended | {"id": run})

    def last_run(self) -> dict[str, Any] | None:
        """The newest row of ``runs``."""
        numbered = self._tables.small("SELECT max(id) AS id FROM runs")[0]["id"]
        for row in self._tables.rows("runs", "WHERE id = ?", (numbered,)):
            return {"id": numbered, **row}
        return None

    def jobs(self) -> set[str]:
        """The jobs that ran."""
        return {row["job"] for row in self._tables.rows("runs")}

    def stages(self) -> list[dict[str, Any]]:
        """Per stage and status: how many, and what they cost."""
        self._tables.check_small("results")
        return self._tables.small(
            "SELECT stage, status, count(*) AS n, sum(requests) AS requests, sum(prompt_tokens) AS "
            "prompt_tokens, sum(completion_tokens) AS completion_tokens, "
            "CASE WHEN count(cost_usd) = count(*) THEN sum(cost_usd) END AS cost_usd, "
            "coalesce(sum(json_extract(provenance, '$.usage.estimated')), 0) AS estimated "
            "FROM results GROUP BY stage, status ORDER BY min(rowid)"
        )

    def causes(self, limit: int = 5) -> list[dict[str, Any]]:
        """Failures of stages, and of single requests within stages that got through, grouped by their cause,
        the commonest first.
        """
        for _ in self._tables.rows("results", "WHERE status = 'failed'"):
            pass  # they are what was written
        return self._tables.small(
            "SELECT stage, error, message, sum(n) AS n, min(feature) AS example FROM ("
            "SELECT stage, json_extract(value, '$.error') AS error, json_extract(value, '$.message') AS "
            "message, 1 AS n, feature "
            "FROM results WHERE status = 'failed' UNION ALL "
            "SELECT stage, CASE WHEN instr(gap.key, ': ') THEN substr(gap.key, 1, instr(gap.key, ': ') - "
            "1) ELSE 'gap' END, "
            "CASE WHEN instr(gap.key, ': ') THEN substr(gap.key, instr(gap.key, ': ') + 2) ELSE gap.key "
            "END, gap.value, feature "
            "FROM results, json_each(provenance, '$.gaps') AS gap WHERE status = 'partial'"
            ") GROUP BY 1, 2, 3 ORDER BY n DESC LIMIT ?",
            (limit,),
        )


class Rehearsal(Journal):
    """Reads a real journal and keeps what is written to itself: for finding out what a job would do."""

    def __init__(self, real: Journal) -> None:
        super().__init__(":memory:")
        self._real = real

    def get(self, key: str) -> Row | None:
        return super().get(key) or self._real.get(key)

    def finished(self, job: str) -> dict[int, str]:
        return self._real.finished(job) | super().finished(job)
