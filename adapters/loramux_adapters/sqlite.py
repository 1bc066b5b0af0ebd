"""A SQLite file of rows that must last: opened, brought to the newest schema, changed in whole transactions.

What a transaction did survives a crash once it is left (WAL, synchronous=FULL). One process writes; within it the caller
serialises the calls. Tables and rules are the subclass's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import StorageError, StorageFull


class DurableDatabase:
    """`migrations` is what each version of the schema added to the one before it; `what` is its name in messages."""

    def __init__(self, path: Path, migrations: Sequence[str], what: str) -> None:
        self._what = what
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=30
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            self._migrate(migrations)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{what} cannot be opened: {error}") from error

    def close(self) -> None:
        self._connection.close()

    def _migrate(self, migrations: Sequence[str]) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise sqlite3.DatabaseError(f"schema {version} was written by another version of loramux")
        for number, script in enumerate(migrations[version:], version + 1):
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            cls = StorageFull if full else StorageError
            raise cls(f"{self._what} cannot be written: {error}") from error
