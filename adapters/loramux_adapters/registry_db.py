"""The registry's tables: durable rows in SQLite, one transaction per change. Rules are in `registry.py`.

Everything a method acknowledged survives a crash (WAL, synchronous=FULL). One process writes; within it the
caller serialises the calls.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loramux_adapters.errors import StorageDamaged, StorageError, UnknownAdapter
from loramux_adapters.names import check_description, check_json
from loramux_adapters.sqlite import DurableDatabase

Source = Literal["path", "upload", "hub", "training", "demo"]
State = Literal["available", "loading", "ready", "failed"]

# What each version of the schema added to the one before it.
_MIGRATIONS = (
    """
CREATE TABLE adapters (
    name TEXT PRIMARY KEY, generation TEXT NOT NULL, source TEXT NOT NULL, origin TEXT NOT NULL,
    owner TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, pinned INTEGER NOT NULL,
    description TEXT NOT NULL, metadata TEXT NOT NULL, default_sampling TEXT NOT NULL
) STRICT;
CREATE TABLE history (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL REFERENCES adapters(name) ON DELETE CASCADE,
    generation TEXT NOT NULL, source TEXT NOT NULL, origin TEXT NOT NULL, created REAL NOT NULL,
    UNIQUE (name, generation)
) STRICT;
CREATE TABLE scanned (path TEXT PRIMARY KEY, name TEXT NOT NULL, fingerprint TEXT NOT NULL) STRICT;
""",
    """
CREATE TABLE verifications (
    generation TEXT PRIMARY KEY, checked REAL NOT NULL, outcome TEXT NOT NULL, report TEXT NOT NULL
) STRICT;
""",
)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A generation a name has pointed at, and since when."""

    generation: str
    source: Source
    origin: str
    created: float


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What a name means at one moment; it never changes afterwards."""

    name: str
    generation: str
    source: Source
    origin: str  # the path, or hf://repo@commit, or job id it came from; "" for an upload
    owner: str
    created: float
    updated: float
    pinned: bool
    description: str
    metadata: Mapping[str, object]
    default_sampling: Mapping[str, object]
    history: tuple[HistoryEntry, ...]  # newest first, the current generation at the front
    state: State = "available"
    failure: str = ""  # why, when the state is "failed"

    def find(self, prefix: str, param: str = "generation") -> HistoryEntry:
        """The one generation of its history that begins so."""
        found = [entry for entry in self.history if entry.generation.startswith(prefix)]
        if len(found) != 1:
            problem = "no generation" if not found else f"{len(found)} generations"
            raise UnknownAdapter(
                f"{param}: the history of '{self.name}' has {problem} beginning with {prefix[:64]!a}",
                param=param,
            )
        return found[0]

    def changed(
        self,
        pinned: bool | None,
        description: str | None,
        metadata: Mapping[str, object] | None,
        default_sampling: Mapping[str, object] | None,
    ) -> AdapterRecord:
        """With what is not None. Raises RequestError for what is too long or not text."""
        return replace(
            self,
            pinned=self.pinned if pinned is None else pinned,
            description=self.description if description is None else check_description(description),
            metadata=self.metadata if metadata is None else check_json("metadata", metadata),
            default_sampling=self.default_sampling
            if default_sampling is None
            else check_json("default_sampling", default_sampling),
        )


@dataclass(frozen=True, slots=True)
class Scanned:
    """An adapter folder as a scan last imported it."""

    name: str
    fingerprint: str


class RegistryDatabase(DurableDatabase):
    def __init__(self, path: Path) -> None:
        super().__init__(path, _MIGRATIONS, "the adapter registry")

    def records(self) -> list[AdapterRecord]:
        """All of them, by name. Raises StorageDamaged for a row that is none."""
        try:
            return list(self._records())
        except (sqlite3.Error, ValueError, TypeError) as error:
            self.close()
            raise StorageDamaged(f"the adapter registry has a row that cannot be read: {error}") from error

    def _records(self) -> Iterator[AdapterRecord]:
        history: defaultdict[str, list[HistoryEntry]] = defaultdict(list)
        entries = "SELECT name, generation, source, origin, created FROM history ORDER BY seq DESC"
        for name, *entry in self._connection.execute(entries):
            history[name].append(HistoryEntry(*entry))
        columns = (
            "name, generation, source, origin, owner, created, updated, pinned, description, "
            "metadata, default_sampling"
        )
        for row in self._connection.execute(f"SELECT {columns} FROM adapters ORDER BY name"):
            name, generation, source, origin, owner, created, updated, pinned, description = row[:9]
            yield AdapterRecord(
                name=name,
                generation=generation,
                source=source,
                origin=origin,
                owner=owner,
                created=created,
                updated=updated,
                pinned=bool(pinned),
                description=description,
                metadata=json.loads(row[9]),
                default_sampling=json.loads(row[10]),
                history=tuple(history[name]),
            )

    def save(self, record: AdapterRecord) -> None:
        """Insert or replace a record with its history."""
        with self._transaction():
            self._connection.execute("DELETE FROM adapters WHERE name = ?", (record.name,))
            self._connection.execute(
                "INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.name,
                    record.generation,
                    record.source,
                    record.origin,
                    record.owner,
                    record.created,
                    record.updated,
                    record.pinned,
                    record.description,
                    json.dumps(record.metadata),
                    json.dumps(record.default_sampling),
                ),
            )
            self._connection.executemany(
                "INSERT INTO history (name, generation, source, origin, created) VALUES (?, ?, ?, ?, ?)",
                [
                    (record.name, entry.generation, entry.source, entry.origin, entry.created)
                    for entry in reversed(record.history)
                ],
            )

    def delete(self, name: str) -> None:
        with self._transaction():
            self._connection.execute("DELETE FROM adapters WHERE name = ?", (name,))

    def scanned(self) -> dict[str, Scanned]:
        rows = self._connection.execute("SELECT path, name, fingerprint FROM scanned")
        return {path: Scanned(name, fingerprint) for path, name, fingerprint in rows}

    def save_scanned(self, path: str, scanned: Scanned | None) -> None:
        """Remember, or with None forget, what a folder looked like."""
        with self._transaction():
            self._connection.execute("DELETE FROM scanned WHERE path = ?", (path,))
            if scanned is not None:
                row = (path, scanned.name, scanned.fingerprint)
                self._connection.execute("INSERT INTO scanned VALUES (?, ?, ?)", row)

    def outcomes(self) -> dict[str, str]:
        """Of all verifications, by generation."""
        return dict(self._connection.execute("SELECT generation, outcome FROM verifications"))

    def verification(self, generation: str) -> tuple[float, str] | None:
        """When a generation was verified, and the report as JSON or ""."""
        query = "SELECT checked, report FROM verifications WHERE generation = ?"
        try:
            found: tuple[float, str] | None = self._connection.execute(query, (generation,)).fetchone()
        except sqlite3.Error as error:
            raise StorageError(f"the adapter registry cannot be read: {error}") from error
        return found

    def save_verification(self, generation: str, checked: float, outcome: str, report: str) -> None:
        with self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO verifications VALUES (?, ?, ?, ?)",
                (generation, checked, outcome, report),
            )

    def forget_verifications(self, generations: Iterable[str]) -> None:
        with self._transaction():
            self._connection.executemany(
                "DELETE FROM verifications WHERE generation = ?", [(one,) for one in generations]
            )
