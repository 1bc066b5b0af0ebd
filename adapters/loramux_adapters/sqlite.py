"""A SQLite file of rows that must last: opened, brought to the newest schema, changed in whole transactions.

What a transaction did survives a crash once it is left (WAL, synchronous=FULL). One process writes; within it the caller
serialises the calls. A file whose pages are damaged is noticed when it is opened. Tables and rules are the subclass's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import StorageDamaged, StorageError, StorageFull

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class DurableDatabase:
    """`migrations` is what each version of the schema added to the one before it; `what` is its name in messages."""

    def __init__(self, path: Path, migrations: Sequence[str], what: str) -> None:
        """Raises StorageDamaged, StorageError."""
        self._what = what
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=30
            )
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{what} cannot be opened: {error}") from error
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise StorageDamaged(f"{what} is damaged: {verdict}")
            self._migrate(migrations)
        except sqlite3.Error as error:
            self._connection.close()
            damaged = (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED
            cls, how = (StorageDamaged, "is damaged") if damaged else (StorageError, "cannot be opened")
            raise cls(f"{what} {how}: {error}") from error
        except StorageDamaged:
            self._connection.close()
            raise

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
