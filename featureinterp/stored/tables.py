"""SQLite files whose rows prove themselves.

Every table has two columns more: ``head``, the CRC-32 of the row's small columns, and ``checksum``, that of
all of them. ``totals`` has for every table how many rows it holds and the sum of their checksums, kept by
triggers in the transaction of every change, so that a row that is lost shows as well. Rows of an earlier
version have neither and are read as they are.
"""

from __future__ import annotations

import errno
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureinterp.errors import DamagedStoreError, InputError, StorageError

_TOTALS = (
    "CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, n INTEGER NOT NULL, sum INTEGER NOT "
    "NULL) STRICT;"
)
_TRIGGERS = """
CREATE TRIGGER IF NOT EXISTS {t}_added AFTER INSERT ON {t} BEGIN
    UPDATE totals SET n = n + 1, sum = sum + coalesce(new.checksum, 0) WHERE name = '{t}'; END;
CREATE TRIGGER IF NOT EXISTS {t}_gone AFTER DELETE ON {t} BEGIN
    UPDATE totals SET n = n - 1, sum = sum - coalesce(old.checksum, 0) WHERE name = '{t}'; END;
CREATE TRIGGER IF NOT EXISTS {t}_changed AFTER UPDATE ON {t} BEGIN
    UPDATE totals SET sum = sum + coalesce(new.checksum, 0) - coalesce(old.checksum, 0)
    WHERE name = '{t}'; END;
"""


@dataclass(frozen=True, slots=True)
class Table:
    """``ddl``: columns and constraints without the two of this module; ``small``: columns that are read
    often, ``large``: the others. ``id`` columns that SQLite numbers are in neither."""

    ddl: str
    small: tuple[str, ...]
    large: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All that the checksum is of."""
        return self.small + self.large


def crc_of(*values: Any) -> int:
    """The CRC-32 of some values of a row, their types and order included."""
    found = 0
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        found = zlib.crc32(data, zlib.crc32(f"{type(value).__name__}{len(data)}:".encode(), found))
    return found


class Tables:
    """A SQLite file (write-ahead log) of checked tables. ``what``: its name in errors ("the journal");
    ``remedy``: what to do about a damaged one. ``reads``: earlier versions whose tables are the same but for
    the checksums.

    Raises ``StorageError`` when it cannot be opened or written, ``DamagedStoreError`` when it is not what was
    written.
    """

    def __init__(
        self,
        path: Path | str,
        tables: Mapping[str, Table],
        what: str,
        *,
        version: int,
        reads: Sequence[int] = (),
        indexes: str = "",
        remedy: str,
    ) -> None:
        self.path, self.tables, self._what, self._remedy = path, tables, what, remedy
        try:
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and not path.is_file():
                    raise OSError(errno.EINVAL, "it is no regular file")
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise self._unopened(error) from error
        try:
            self._prepare(version, reads, indexes)
        except sqlite3.Error as error:
            self._connection.close()
            raise self._unopened(error) from error
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, version: int, reads: Sequence[int], indexes: str) -> None:
        run = self._connection.execute
        self._connection.create_function("crc", -1, crc_of, deterministic=True)
        run("PRAGMA busy_timeout = 10000")
        run("PRAGMA trusted_schema = OFF")  # a file from elsewhere may hold triggers and views of its own
        there = run("PRAGMA user_version").fetchone()[0]
        names = {row[0] for row in run("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if names and there not in (version, *reads):
            again = "give another folder, or delete it to start anew"
            raise InputError(
                f"{self._what} {self.path} was written by another version of featureinterp: {again}"
            )
        if there == version and not {"totals", *self.tables} <= names:
            raise DamagedStoreError(
                f"{self._what} {self.path} is damaged: a table is missing; {self._remedy}"
            )
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA recursive_triggers = ON")  # so that replacing a row counts as deleting it
        run("PRAGMA cell_size_check = ON")
        if there == version:
            return
        run("BEGIN IMMEDIATE")
        if run("PRAGMA user_version").fetchone()[0] != version:  # another process may have been first
            self._make(names, indexes)
            run(f"PRAGMA user_version = {version}")
        run("COMMIT")

    def _make(self, names: set[str], indexes: str) -> None:
        run = self._connection.execute
        run(_TOTALS)
        for name, table in self.tables.items():
            if name in names:
                for column in ("head", "checksum"):
                    run(f"ALTER TABLE {name} ADD COLUMN {column} INTEGER")
            else:
                run(f"CREATE TABLE {name} ({_with_sums(table.ddl)}) STRICT")
            run(f"INSERT OR REPLACE INTO totals SELECT '{name}', count(*), 0 FROM {name}")  # noqa: S608
            for statement in _TRIGGERS.format(t=name).split("END;")[:-1]:
                run(f"{statement} END")
        if indexes:
            run(indexes)

    def _unopened(self, error: Exception) -> StorageError:
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            return DamagedStoreError(f"{self._what} {self.path} cannot be opened ({error}): {self._remedy}")
        check = "check the path, its permissions and the free space"
        return StorageError(f"{self._what} {self.path} cannot be opened ({error}): {check}")

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> DamagedStoreError:
        return DamagedStoreError(f"{self._what} {self.path} is damaged ({why}): {self._remedy}")

    def put(self, table: str, row: Mapping[str, Any]) -> int:
        """Writes a row, over one with the same key; its number."""
        kind = self.tables[table]
        sums = (crc_of(*(row[c] for c in kind.small)), crc_of(*(row[c] for c in kind.columns)))
        names = [*row, "head", "checksum"]
        marks = ", ".join("?" * len(names))
        statement = f"INSERT OR REPLACE INTO {table} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608
        try:
            return int(self._connection.execute(statement, (*row.values(), *sums)).lastrowid or 0)
        except sqlite3.Error as error:
            mend = "free some space and run the same command again"
            raise StorageError(f"{self._what} {self.path} cannot be written ({error}): {mend}") from error

    def rows(self, table: str, rest: str = "", values: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
        """Rows as they were written, each one checked. ``rest``: what follows ``FROM``."""
        kind = self.tables[table]
        names = (*kind.columns, "checksum")
        with self._reading():
            statement = f"SELECT {', '.join(names)} FROM {table} {rest}"  # noqa: S608 (our own names)
            for row in self._connection.execute(statement, values):
                if row[-1] is not None and crc_of(*row[:-1]) != row[-1]:
                    raise self._damaged(f"a row of {table} is not what was written")
                yield dict(zip(names[:-1], row, strict=False))

    def small(self, statement: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query of small columns alone. :meth:`check_small` says whether they can be
        trusted.
        """
        with self._reading():
            cursor = self._connection.execute(statement, values)
            return [dict(zip((c[0] for c in cursor.description), row, strict=True)) for row in cursor]

    def check_small(self, table: str) -> None:
        """Raises ``DamagedStoreError`` when rows are lost or a small column is not what was written."""
        small = ", ".join(self.tables[table].small)
        with self._reading():
            # Tables and columns have our own names.
            wrong = f"SELECT count(*) FROM {table} WHERE head IS NOT NULL AND head != crc({small})"  # noqa: S608
            if self._connection.execute(wrong).fetchone()[0]:
                raise self._damaged(f"a row of {table} is not what was written")
            # One statement: others may write meanwhile.
            counted = f"(SELECT count(*) FROM {table}) = n"  # noqa: S608
            summed = f"(SELECT coalesce(sum(checksum), 0) FROM {table}) = sum"  # noqa: S608
            one = f"SELECT {counted} AND {summed} FROM totals WHERE name = ?"  # noqa: S608
            if self._connection.execute(one, (table,)).fetchone() != (1,):
                raise self._damaged(f"rows of {table} are lost or changed")

    def check(self) -> int:
        """Raises ``DamagedStoreError`` when anything in the file is not what was written; how many rows have
        no checksum.
        """
        with self._reading():
            found = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise self._damaged(" ".join(str(found).split()))
        unchecked = 0
        for name in self.tables:
            self.check_small(name)
            for _ in self.rows(name):
                pass
            with self._reading():
                bare = f"SELECT count(*) FROM {name} WHERE checksum IS NULL"  # noqa: S608 (our own names)
                unchecked += int(self._connection.execute(bare).fetchone()[0])
        return unchecked


def _with_sums(ddl: str) -> str:
    """Columns come before the constraint on several of them."""
    head, found, constraint = ddl.partition("PRIMARY KEY (")
    sums = "head INTEGER, checksum INTEGER"
    return f"{head}{sums}, {found}{constraint}" if found else f"{ddl}, {sums}"
