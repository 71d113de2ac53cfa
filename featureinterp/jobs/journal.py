"""The journal of a run: one SQLite file in which every finished stage of every feature is a row, failures included.

Table ``results``: ``key`` (content hash of everything that the result depends on), ``feature``, ``stage``, ``status`` ("done" or
"failed"), ``value`` (JSON; of a failure: error and message), ``created`` (Unix seconds). A row appears in one transaction.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from featureinterp.domain.score import Failure
from featureinterp.errors import StorageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY, feature INTEGER NOT NULL, stage TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    value TEXT NOT NULL, created REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS results_by_feature ON results (feature, stage);
"""


class Journal:
    """Opens or makes the journal at ``path``. Use it as a context manager, from one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"the journal {path} cannot be opened ({error}): check the path, its permissions and the free space") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, key: str) -> Any | None:
        """The value of a finished stage; None when it has not run or has failed."""
        row = self._connection.execute("SELECT value FROM results WHERE key = ? AND status = 'done'", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def done(self, key: str, feature: int, stage: str, value: Any) -> None:
        """Writes a finished stage, over an earlier failure of it."""
        self._write(key, feature, stage, "done", value)

    def failed(self, key: str, failure: Failure) -> None:
        """Writes a failure; running again tries it again."""
        self._write(key, failure.feature, failure.stage, "failed", {"error": failure.error, "message": failure.message})

    def _write(self, key: str, feature: int, stage: str, status: str, value: Any) -> None:
        row = (key, feature, stage, status, json.dumps(value, ensure_ascii=False), time.time())
        try:
            with self._connection:
                self._connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise StorageError(f"the journal {self.path} cannot be written ({error}): free some space and run the same command again") from error
