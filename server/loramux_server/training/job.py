"""A fine-tuning job while the server runs: its record, whoever watches it, and how far training is.

A change is durable before it is visible. Changes of one job follow one another, so that none undoes another. For one event
loop; disk work runs on threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loramux_server.training.database import TrainingDatabase
from loramux_server.training.folder import JobFolder
from loramux_server.training.records import CheckpointRecord, FileRecord, JobEvent, JobRecord, Status

_SMOOTHING = 0.2


@dataclass
class Progress:
    """Of the job that is trained. Kept in memory only."""

    total_steps: int
    step: int
    seconds_per_step: float | None = None
    _last: float = field(default_factory=time.monotonic)

    def advance(self, step: int) -> None:
        """Time between two steps is what the user waits, serving included; recent steps count more."""
        now = time.monotonic()
        taken, before = now - self._last, self.seconds_per_step
        self.seconds_per_step = taken if before is None else before + _SMOOTHING * (taken - before)
        self.step, self._last = step, now

    @property
    def finish(self) -> float | None:
        """The time of day when it will probably be done; None before there is a rate."""
        if self.seconds_per_step is None:
            return None
        return time.time() + (self.total_steps - self.step) * self.seconds_per_step


@dataclass(eq=False)
class Job:
    record: JobRecord
    folder: JobFolder
    database: TrainingDatabase
    progress: Progress | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def id(self) -> str:
        return self.record.id

    async def change(
        self,
        *events: JobEvent,
        only: Collection[Status] | None = None,
        checkpoint: CheckpointRecord | None = None,
        results: Sequence[FileRecord] = (),
        **changes: Any,
    ) -> bool:
        """Change the record and say what happened; with `only`, if it has one of these statuses. Whether it did.

        Raises StorageError; then nothing has changed.
        """
        async with self._changing:
            if only is not None and self.record.status not in only:
                return False
            record = msgspec.structs.replace(self.record, **changes)
            await asyncio.to_thread(
                self.database.save_job, record, events, checkpoint=checkpoint, results=results
            )
            self.record = record
        self.touch()
        return True

    async def say(self, *events: JobEvent) -> None:
        """Raises StorageError."""
        await asyncio.to_thread(self.database.add_events, self.id, events)
        self.touch()

    def hold(self) -> None:
        """Pause it in memory only, when nothing can be written: the next server tries again."""
        if not self.record.ended:
            self.record = msgspec.structs.replace(self.record, status="paused")
            self.touch()

    def touch(self) -> None:
        """Wake whoever watches."""
        self.changed.set()
        self.changed = asyncio.Event()
