"""The tables of files, fine-tuning jobs, their events and checkpoints. Rules are in `files.py` and `manager.py`.

What a method acknowledged survives a crash. Methods block, and may be called from any thread.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import StorageDamaged, StorageError, UnknownFile, UnknownJob
from loramux_adapters.set_aside import database_files, open_or_set_aside
from loramux_adapters.sqlite import DurableDatabase
from loramux_server.training.records import CheckpointRecord, FileRecord, JobEvent, JobRecord

_MIGRATIONS = (
    """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, record TEXT NOT NULL) STRICT;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs(id),
    created REAL NOT NULL, level TEXT NOT NULL, message TEXT NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL,
    step INTEGER
) STRICT;
CREATE INDEX events_by_job ON events (job, seq);
CREATE INDEX metrics_by_step ON events (job, step) WHERE step IS NOT NULL;
CREATE TABLE checkpoints (
    id TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES jobs(id), step INTEGER NOT NULL, created REAL NOT NULL,
    model TEXT NOT NULL, generation TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step)
) STRICT;
""",
    "ALTER TABLE files ADD COLUMN owner TEXT NOT NULL DEFAULT '';",
)

Order = Literal["asc", "desc"]


class TrainingDatabase(DurableDatabase):
    def __init__(self, path: Path) -> None:
        """Raises StorageDamaged, StorageError."""
        super().__init__(path, _MIGRATIONS, "the fine-tuning database")
        self._lock = threading.Lock()
        try:
            self.jobs()
        except StorageDamaged:
            self.close()
            raise

    def close(self) -> None:
        with self._lock:
            super().close()

    # --- files -----------------------------------------------------------------------------------------------------

    def add_file(self, file: FileRecord) -> None:
        with self._changing():
            self._insert_file(file)

    def file(self, file_id: str, access: Access = OPERATOR) -> FileRecord:
        """Raises UnknownFile."""
        where, values = _owned(access)
        rows = self._read(f"SELECT {_FILE} FROM files WHERE id = ? AND {where}", (file_id, *values))
        if not rows:
            raise UnknownFile(f"id: there is no file {file_id[:64]!a}", param="id")
        return _file(rows[0])

    def files(
        self, *, purpose: str | None, after: str | None, limit: int, order: Order, access: Access = OPERATOR
    ) -> tuple[list[FileRecord], bool]:
        """A page by age, and whether there are more. Raises UnknownFile for `after`."""
        owned, values = _owned(access)
        where = [owned]
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        if after is not None:
            where.append(f"seq {'>' if order == 'asc' else '<'} ?")
            values.append(self._place("files", after, UnknownFile, *_owned(access)))
        query = f"SELECT {_FILE} FROM files WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"
        rows = self._read(query, (*values, limit + 1))
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def file_ids(self) -> set[str]:
        return {row[0] for row in self._read("SELECT id FROM files", ())}

    def delete_file(self, file_id: str) -> None:
        with self._changing():
            self._connection.execute("DELETE FROM files WHERE id = ?", (file_id,))

    # --- jobs ------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[JobRecord]:
        """All of them, oldest first. Raises StorageDamaged for a record that is none."""
        rows = self._read("SELECT record FROM jobs ORDER BY seq", ())
        try:
            return [msgspec.json.decode(row[0], type=JobRecord) for row in rows]
        except msgspec.DecodeError as error:
            raise StorageDamaged(
                f"the fine-tuning database has a job that cannot be read: {error}"
            ) from error

    def save_job(
        self,
        job: JobRecord,
        events: Sequence[JobEvent] = (),
        *,
        checkpoint: CheckpointRecord | None = None,
        results: Sequence[FileRecord] = (),
    ) -> None:
        """A job as it is now, with what happened, in one transaction."""
        with self._changing():
            self._connection.execute(
                "INSERT INTO jobs (id, record) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                (job.id, msgspec.json.encode(job).decode()),
            )
            self._insert_events(job.id, events)
            for file in results:
                self._insert_file(file)
            if checkpoint is not None:
                self._connection.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        checkpoint.id,
                        checkpoint.job,
                        checkpoint.step,
                        checkpoint.created,
                        checkpoint.model,
                        checkpoint.generation,
                        json.dumps(checkpoint.metrics),
                    ),
                )

    def add_events(self, job_id: str, events: Sequence[JobEvent]) -> None:
        with self._changing():
            self._insert_events(job_id, events)

    def events(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
        """A page, newest first, and whether there are more. Raises UnknownJob for `after`."""
        before = 2**62 if after is None else self._place("events", after, UnknownJob, "job = ?", [job_id])
        query = f"SELECT {_EVENT} FROM events WHERE job = ? AND seq < ? ORDER BY seq DESC LIMIT ?"
        rows = self._read(query, (job_id, before, limit + 1))
        return [_event(row) for row in rows[:limit]], len(rows) > limit

    def events_since(self, job_id: str, seq: int, limit: int) -> list[tuple[int, JobEvent]]:
        """The next events behind a place, oldest first, each with its own place."""
        query = f"SELECT {_EVENT}, seq FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?"
        return [(row[-1], _event(row)) for row in self._read(query, (job_id, seq, limit))]

    def metrics(self, job_id: str, step: int | None = None) -> dict[int, dict[str, Any]]:
        """What was measured, by step; of a step that was done again, because it was lost, the last time counts."""
        query = "SELECT step, data FROM events WHERE job = ? AND step IS NOT NULL"
        values: tuple[object, ...] = (job_id,)
        if step is not None:
            query, values = f"{query} AND step = ?", (job_id, step)
        found: dict[int, dict[str, Any]] = {}
        for number, data in self._read(f"{query} ORDER BY seq", values):
            found[number] = {**found.get(number, {}), **json.loads(data)}
        return dict(sorted(found.items()))

    def checkpoints(self, job_id: str) -> list[CheckpointRecord]:
        """Newest step first."""
        columns = "id, job, step, created, model, generation, metrics"
        query = f"SELECT {columns} FROM checkpoints WHERE job = ? ORDER BY step DESC"
        return [_checkpoint(row) for row in self._read(query, (job_id,))]

    # --- below -----------------------------------------------------------------------------------------------------

    def _insert_file(self, file: FileRecord) -> None:
        self._connection.execute(
            f"INSERT INTO files ({_FILE}) VALUES (?, ?, ?, ?, ?, ?)",
            (file.id, file.filename, file.purpose, file.num_bytes, file.created, file.owner),
        )

    def _insert_events(self, job_id: str, events: Sequence[JobEvent]) -> None:
        self._connection.executemany(
            f"INSERT INTO events ({_EVENT}, job) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (e.id, e.created, e.level, e.message, e.type, json.dumps(e.data), e.step, job_id)
                for e in events
            ],
        )

    def _place(
        self,
        table: str,
        row_id: str,
        unknown: type[UnknownFile | UnknownJob],
        where: str,
        values: Sequence[object],
    ) -> int:
        rows = self._read(f"SELECT seq FROM {table} WHERE id = ? AND {where}", [row_id, *values])
        if not rows:
            raise unknown(f"after: there is no {row_id[:64]!a} here", param="after")
        return int(rows[0][0])

    def _read(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the fine-tuning database cannot be read: {error}") from error

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock, self._transaction():
            yield


def open_database(root: Path) -> TrainingDatabase:
    """If it is damaged, it is set aside with files and jobs: those that no row names are removed as a crash's leftovers."""
    path = root / "training.sqlite3"
    return open_or_set_aside(
        lambda: TrainingDatabase(path), *database_files(path), root / "files", root / "jobs"
    )


_FILE = "id, filename, purpose, bytes, created, owner"
_EVENT = "id, created, level, message, type, data, step"


def _owned(access: Access) -> tuple[str, list[object]]:
    """A condition for rows with an owner, and its values."""
    return ("1", []) if access.is_operator else ("owner = ?", [access.owner])


def _file(row: Sequence[Any]) -> FileRecord:
    file_id, filename, purpose, num_bytes, created, owner = row
    return FileRecord(file_id, filename, purpose, num_bytes, created, owner)


def _event(row: Sequence[Any]) -> JobEvent:
    event_id, created, level, message, kind, data, step = row[:7]
    return JobEvent(event_id, created, level, message, kind, json.loads(data), step)


def _checkpoint(row: Sequence[Any]) -> CheckpointRecord:
    checkpoint_id, job, step, created, model, generation, metrics = row
    return CheckpointRecord(checkpoint_id, job, step, created, model, generation, json.loads(metrics))
