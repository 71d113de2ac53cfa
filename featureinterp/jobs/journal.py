"""The journal of a job: one SQLite file (write-ahead log) in which everything that finished is a row, failures included.

Table ``results``: one stage of one feature. ``key``: content hash of everything that the result depends on. ``feature``, ``stage``.
``status``: ``done``; ``partial`` (usable, but some of its requests failed; running again tries those again); ``failed``. ``value``: JSON; of a
failure its error and message. ``requests``, ``prompt_tokens``, ``completion_tokens``, ``seconds``, ``cost_usd`` (null: not known): what it
cost. ``provenance``: JSON with the model and prompt; of a partial stage also ``gaps``, why its requests failed and how many of each; and
``usage``, where there are any, with ``cached_tokens`` of the prompts and ``estimated``, the requests whose tokens were not reported.
``created``: Unix seconds.

Table ``features``: a feature with all its stages. ``job``: content hash of all settings. ``status`` as above. ``summary``: JSON with
explanation, scores and failures. ``windows``: zlib-compressed JSON of the windows with true and predicted activations.

Table ``runs``: every start of the job: ``started``, ``ended``, ``outcome``, ``cost_usd``, ``requests``.

A row appears in one transaction, so that a killed process leaves a journal that is whole and lacks at most what was in flight.
"""

from __future__ import annotations

import json
import sqlite3
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
from featureinterp.errors import InputError, StorageError

VERSION = 3
MOST_GAPS = 5
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY, feature INTEGER NOT NULL, stage TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'partial', 'failed')),
    value TEXT NOT NULL, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL,
    cost_usd REAL, provenance TEXT NOT NULL, created REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS results_by_feature ON results (feature, stage);
CREATE TABLE IF NOT EXISTS features (
    job TEXT NOT NULL, feature INTEGER NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'partial', 'failed')),
    summary TEXT NOT NULL, windows BLOB NOT NULL, created REAL NOT NULL, PRIMARY KEY (job, feature)
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, job TEXT NOT NULL, started REAL NOT NULL, ended REAL, outcome TEXT, wanted INTEGER NOT NULL, requests INTEGER, cost_usd REAL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A stage as the journal has it."""

    status: str
    value: Any
    usage: Usage


class Journal:
    """Opens or makes the journal at ``path`` (``":memory:"``: one that is kept nowhere). Use it as a context manager, from one thread."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        try:
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            known = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if known and version != VERSION:
                raise InputError(f"the journal {path} was written by another version of featureinterp: give another folder, or delete it to start anew")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("PRAGMA busy_timeout = 10000")
            self._connection.executescript(_SCHEMA + f"PRAGMA user_version = {VERSION};")
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"the journal {path} cannot be opened ({error}): check the path, its permissions and the free space") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, key: str) -> Row | None:
        """A stage that is done or partly done; None when it has not run or has failed."""
        row = self._connection.execute(
            "SELECT status, value, provenance, requests, prompt_tokens, completion_tokens, seconds, cost_usd FROM results WHERE key = ? AND status != 'failed'",
            (key,),
        ).fetchone()
        return None if row is None else Row(row[0], json.loads(row[1]), Usage(*row[3:], **json.loads(row[2]).get("usage", {})))

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
        """Writes a finished stage, over an earlier failure of it. ``gaps``: why parts of it failed, which makes it partial."""
        known = dict(Counter(gaps).most_common(MOST_GAPS))
        found = {**(provenance or {}), "gaps": known} if known else provenance or {}
        self._write(key, feature, stage, "partial" if partial or known else "done", value, usage or Usage(), found)

    def failed(self, key: str, failure: Failure, *, usage: Usage | None = None) -> None:
        """Writes a failure; running again tries it again."""
        self._write(key, failure.feature, failure.stage, "failed", {"error": failure.error, "message": failure.message}, usage or Usage(), {})

    def _write(self, key: str, feature: int, stage: str, status: str, value: Any, usage: Usage, provenance: Mapping[str, Any]) -> None:
        extra = {name: n for name, n in (("cached_tokens", usage.cached_tokens), ("estimated", usage.estimated)) if n}
        provenance = {**provenance, "usage": extra} if extra else provenance
        spent = (usage.requests, usage.prompt_tokens, usage.completion_tokens, usage.seconds, usage.cost_usd)
        row = (key, feature, stage, status, _dumps(value), *spent, _dumps(provenance), time.time())
        self._execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def finish(self, job: str, result: FeatureResult, status: str) -> None:
        """Writes a feature that is through all stages."""
        summary = result.to_json()
        windows = zlib.compress(_dumps(summary.pop("windows")).encode(), 6)
        self._execute("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?, ?)", (job, result.feature, status, _dumps(summary), windows, time.time()))

    def finished(self, job: str) -> dict[int, str]:
        """Status of every feature that a job is through with."""
        return dict(self._connection.execute("SELECT feature, status FROM features WHERE job = ?", (job,)))

    def features(self, job: str, wanted: Sequence[int] | None = None) -> Iterator[FeatureResult]:
        """The results of a job, in the order of ``wanted`` or by index; those that are not there are left out."""
        query = "SELECT summary, windows FROM features WHERE job = ?"
        if wanted is None:
            rows: Iterator[Any] = self._connection.execute(query + " ORDER BY feature", (job,))
        else:
            rows = (row for i in wanted for row in self._connection.execute(query + " AND feature = ?", (job, i)).fetchall())
        for summary, windows in rows:
            yield FeatureResult.from_json(json.loads(summary) | {"windows": json.loads(zlib.decompress(windows))})

    def start(self, job: str, wanted: int) -> int:
        """Writes that a run begins; returns its number."""
        return int(self._execute("INSERT INTO runs (job, started, wanted) VALUES (?, ?, ?)", (job, time.time(), wanted)).lastrowid or 0)

    def end(self, run: int, outcome: str, usage: Usage) -> None:
        """Writes how a run ended and what it spent."""
        self._execute(
            "UPDATE runs SET ended = ?, outcome = ?, requests = ?, cost_usd = ? WHERE id = ?", (time.time(), outcome, usage.requests, usage.cost_usd, run)
        )

    def last_run(self) -> dict[str, Any] | None:
        """The newest row of ``runs``."""
        cursor = self._connection.execute("SELECT * FROM runs ORDER BY id DESC LIMIT 1")
        row = cursor.fetchone()
        return None if row is None else dict(zip((c[0] for c in cursor.description), row, strict=True))

    def stages(self) -> list[dict[str, Any]]:
        """Per stage and status: how many, and what they cost."""
        cursor = self._connection.execute(
            "SELECT stage, status, count(*) AS n, sum(requests) AS requests, sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens, "
            "CASE WHEN count(cost_usd) = count(*) THEN sum(cost_usd) END AS cost_usd, "
            "coalesce(sum(json_extract(provenance, '$.usage.estimated')), 0) AS estimated "
            "FROM results GROUP BY stage, status ORDER BY min(rowid)"
        )
        return [dict(zip((c[0] for c in cursor.description), row, strict=True)) for row in cursor]

    def causes(self, limit: int = 5) -> list[dict[str, Any]]:
        """Failures of stages, and of single requests within stages that got through, grouped by their cause, the commonest first."""
        cursor = self._connection.execute(
            "SELECT stage, error, message, sum(n) AS n, min(feature) AS example FROM ("
            "SELECT stage, json_extract(value, '$.error') AS error, json_extract(value, '$.message') AS message, 1 AS n, feature "
            "FROM results WHERE status = 'failed' UNION ALL "
            "SELECT stage, CASE WHEN instr(gap.key, ': ') THEN substr(gap.key, 1, instr(gap.key, ': ') - 1) ELSE 'gap' END, "
            "CASE WHEN instr(gap.key, ': ') THEN substr(gap.key, instr(gap.key, ': ') + 2) ELSE gap.key END, gap.value, feature "
            "FROM results, json_each(provenance, '$.gaps') AS gap WHERE status = 'partial'"
            ") GROUP BY 1, 2, 3 ORDER BY n DESC LIMIT ?",
            (limit,),
        )
        return [dict(zip((c[0] for c in cursor.description), row, strict=True)) for row in cursor]

    def _execute(self, statement: str, values: Sequence[Any]) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise StorageError(f"the journal {self.path} cannot be written ({error}): free some space and run the same command again") from error


class Rehearsal(Journal):
    """Reads a real journal and keeps what is written to itself: for finding out what a job would do."""

    def __init__(self, real: Journal) -> None:
        super().__init__(":memory:")
        self._real = real

    def get(self, key: str) -> Row | None:
        return super().get(key) or self._real.get(key)

    def finished(self, job: str) -> dict[int, str]:
        return self._real.finished(job) | super().finished(job)
