"""A job's folder: what training needs and makes, kept until the job ends.

    <root>/<job id>/training_file/<name>      the data, by hard link: deleting a file takes nothing from a job
    <root>/<job id>/validation_file/<name>
    <root>/<job id>/initial/                  the adapter that is trained further
    <root>/<job id>/out/                      the run's own: checkpoints, and at its end the adapter and its manifest

The methods block.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE
from loramux_adapters.files import fsync_directory, link_or_copy, storage_error
from loramux_adapters.sources import Staged, new_staging_directory
from loramux_adapters.training.layout import CHECKPOINTS
from loramux_adapters.training.rows import check_rows
from loramux_server.training.files import FileStore

FileField = Literal["training_file", "validation_file"]

_FILES: tuple[FileField, ...] = ("training_file", "validation_file")

_STEP = re.compile(r"step-([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class JobFolder:
    path: Path

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def initial(self) -> Path:
        return self.path / "initial"

    @property
    def trained(self) -> bool:
        """Whether the run is complete; its adapter's config is written last."""
        return (self.out / CONFIG_FILE).exists()

    def create(self) -> None:
        self._create(self.path)

    def keep_file(self, field: FileField, files: FileStore, file_id: str) -> None:
        """Link a file, under a name that messages about it may show. Raises UnknownFile."""
        name = re.sub(r"[^A-Za-z0-9._-]", "-", files.get(file_id).filename)[-100:].lstrip(".")
        self._create(self.path / field)
        files.link(file_id, self.path / field / (name or "data.jsonl"))

    def keep_adapter(self, generation: Path) -> None:
        """Link a stored generation."""
        self._create(self.initial)
        try:
            _link_adapter(generation, self.initial)
        except OSError as error:
            raise storage_error("the adapter cannot be kept for the job", error) from error

    def sync(self) -> None:
        """Make what was kept durable."""
        try:
            for entry in (*(path for path in self.path.iterdir() if path.is_dir()), self.path):
                fsync_directory(entry)
            fsync_directory(self.path.parent)
        except OSError as error:
            raise storage_error("the job cannot be stored", error) from error

    def file(self, field: FileField) -> Path | None:
        directory = self.path / field
        return next(directory.iterdir()) if directory.is_dir() else None

    def check_rows(self) -> None:
        """Read every row of the files, and keep none. Raises TrainingError, naming line, message and key."""
        for field in _FILES:
            path = self.file(field)
            if path is not None:
                check_rows(path, lambda row: None, param=field)

    def checkpoints(self) -> list[int]:
        """The steps of which a whole checkpoint is here, oldest first."""
        directory = self.out / CHECKPOINTS
        if not directory.is_dir():
            return []
        return sorted(int(m[1]) for path in directory.iterdir() if (m := _STEP.fullmatch(path.name)))

    def checkpoint(self, step: int) -> Path:
        return self.out / CHECKPOINTS / f"step-{step}"

    def _create(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise storage_error("the job cannot be stored", error) from error

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # what stays is removed at the next start


def stage(directory: Path, staging: Path, job_id: str, info: dict[str, Any]) -> Staged:
    """An adapter of the trainer's for the gate. Raises OSError."""
    staged = Staged(new_staging_directory(staging), "training", job_id, info)
    try:
        _link_adapter(directory, staged.directory)
    except BaseException:
        staged.discard()
        raise
    return staged


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def _link_adapter(source: Path, target: Path) -> None:
    for name in ADAPTER_FILES:
        link_or_copy(source / name, target / name)
