"""An export job and its folder: what of it outlives the server.

    <root>/<id>/job.json             the record, replaced as a whole and durable before a change is answered
    <root>/<id>/adapters/<name>/     the merged generations' files, kept here by hard links, and of those trained here the
                                     trainer's manifest
    <root>/<id>/merged.partial/      what the export has written so far; it can be resumed
    <root>/<id>/merged/              a finished export
    <root>/<id>/merge_report.json    the report of one that could not be proven, whose weights are gone

A folder without a record is one whose deletion or creation was interrupted: it is removed at the next start.
Because the adapters' files are linked, deleting an adapter, or its store's sweep, takes nothing from a job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.errors import StorageError
from loramux_adapters.files import fsync_directory, link_or_copy, replace_file, storage_error, write_file
from loramux_adapters.set_aside import MARK, set_aside
from loramux_adapters.training.layout import MANIFEST_FILE

logger = logging.getLogger(__name__)

RECORD = "job.json"
REPORT = "merge_report.json"

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})


class ExportRequest(msgspec.Struct, frozen=True):
    """What was asked for; the words are those of the command line."""

    format: str
    onto: str
    shard_size: int
    verify: int | None
    verify_tokens: int
    compare: bool
    strict: bool


class MergedAdapter(msgspec.Struct, frozen=True):
    """One adapter of the sum."""

    name: str
    generation: str
    weight: float


class JobEvent(msgspec.Struct, frozen=True):
    id: str
    created: float
    level: Level
    message: str


class JobFault(msgspec.Struct, frozen=True):
    """Why a job failed."""

    message: str
    code: str
    param: str | None = None


class ExportJob(msgspec.Struct, frozen=True, kw_only=True):
    """The durable record. `created` is also the place in the queue."""

    id: str
    adapter: str
    adapters: list[MergedAdapter]
    request: ExportRequest
    created: float
    status: Status = "queued"
    started: float | None = None
    finished: float | None = None
    num_bytes: int | None = None  # of the finished files
    needed_bytes: int = 0  # an estimate from before the start
    error: JobFault | None = None
    events: list[JobEvent] = []
    owner: str = ""  # the tenant whose it is; "" is the operator

    @property
    def ended(self) -> bool:
        return self.status in FINAL

    def saying(self, message: str, level: Level = "info", **changes: Any) -> ExportJob:
        """The record after a change, with an event that tells of it."""
        event = JobEvent(f"{self.id}-event-{len(self.events) + 1}", time.time(), level, message)
        return msgspec.structs.replace(self, events=[*self.events, event], **changes)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where a job's files lie. The methods block."""

    path: Path

    @property
    def out(self) -> Path:
        return self.path / "merged"

    @property
    def partial(self) -> Path:
        return self.path / "merged.partial"

    def adapter(self, index: int, adapter: MergedAdapter) -> Path:
        """The directory of the job's adapter; its name is what the model card calls the adapter."""
        return self.path / "adapters" / str(index) / re.sub(r"[^A-Za-z0-9._-]", "-", adapter.name)

    def keep(
        self, index: int, adapter: MergedAdapter, generation: Path, trained: bytes | None = None
    ) -> None:
        """Take the files of a generation into the job, so that they stay whatever happens to it.

        `trained` is what the trainer's manifest says; the report of the export names the data from it.
        """
        directory = self.adapter(index, adapter)
        try:
            directory.mkdir(parents=True)
            for name in ADAPTER_FILES:
                link_or_copy(generation / name, directory / name)
            if trained is not None:
                write_file(directory / MANIFEST_FILE, [trained])
        except OSError as error:
            raise storage_error("the adapter cannot be kept for the export", error) from error

    def save(self, job: ExportJob) -> None:
        """Durable on return."""
        try:
            replace_file(self.path / RECORD, [msgspec.json.encode(job)])
            fsync_directory(self.path.parent)
        except OSError as error:
            raise storage_error("the export job cannot be stored", error) from error

    def forget(self) -> None:
        """Durable on return; the files are left to `remove`."""
        try:
            (self.path / RECORD).unlink(missing_ok=True)
            fsync_directory(self.path)
        except OSError as error:
            raise storage_error("the export cannot be deleted", error) from error

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # what stays is removed at the next start

    def remove_partial(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def give_up(self) -> dict[str, Any] | None:
        """Remove the weights of a failed export; its report, if it got that far, is kept and returned."""
        report = self.partial / REPORT
        if report.is_file():
            report.replace(self.path / REPORT)
        self.remove_partial()
        return self.report()

    def report(self) -> dict[str, Any] | None:
        for path in (self.out / REPORT, self.path / REPORT):
            if path.is_file():
                found: dict[str, Any] = json.loads(path.read_bytes())
                return found
        return None

    def present_bytes(self) -> int:
        """What the export has on disk so far; it may be writing."""
        total = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.partial) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
        return total

    def files(self) -> list[Path]:
        """Of a finished export, in the order they are sent."""
        return sorted(path for path in self.out.iterdir() if path.is_file())


def open_jobs(root: Path) -> Iterator[tuple[ExportJob, JobFolder]]:
    """The jobs a server left, oldest first; what is half created or half deleted is removed."""
    found: list[tuple[ExportJob, JobFolder]] = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path in [one for one in root.iterdir() if MARK not in one.name]:
            folder = JobFolder(path)
            if not (path / RECORD).is_file():
                folder.remove()
                continue
            try:
                found.append((msgspec.json.decode((path / RECORD).read_bytes(), type=ExportJob), folder))
            except msgspec.DecodeError as error:
                suffix = set_aside(path)
                logger.error(
                    "export %s has no readable record: %s; set aside as *%s", path.name, error, suffix
                )
    except OSError as error:
        raise StorageError(f"the exports cannot be opened: {error.strerror}") from error
    return iter(sorted(found, key=lambda item: (item[0].created, item[0].id)))
