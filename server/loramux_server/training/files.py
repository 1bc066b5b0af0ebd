"""The files of the files API: their bytes below one folder, their rows in the database.

    <root>/<file id>      the bytes as they came; never changed

Promises: a file that was acknowledged is durable; one that is deleted is unknown at once, and readers keep what they have
open. Bytes without a row were left by a crash, and go at the next start. All methods block.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import StorageError, UnknownFile
from loramux_adapters.files import (
    fsync_directory,
    link_or_copy,
    open_regular,
    storage_error,
    write_file,
)
from loramux_server.training.database import Order, TrainingDatabase
from loramux_server.training.records import FileRecord, Purpose, new_id

MAX_FILE_BYTES = 512 * 2**20  # OpenAI's


class FileStore:
    """One process owns the folder; opening it removes what a crash left."""

    def __init__(self, root: Path, database: TrainingDatabase) -> None:
        self._root = root
        self._database = database
        try:
            root.mkdir(parents=True, exist_ok=True)
            known = database.file_ids()
            for path in root.iterdir():
                if path.name not in known:
                    path.unlink()
        except OSError as error:
            raise storage_error("the files cannot be opened", error) from error

    def add(self, source: Path, filename: str, purpose: Purpose, owner: str = "") -> FileRecord:
        """Take a file over from where it lies. Durable on return."""
        file = FileRecord(new_id("file-"), filename, purpose, source.stat().st_size, time.time(), owner)
        try:
            with open(source, "rb") as data:
                os.fsync(data.fileno())
            source.rename(self._root / file.id)
            fsync_directory(self._root)
        except OSError as error:
            raise storage_error("the file cannot be stored", error) from error
        try:
            self._database.add_file(file)
        except StorageError:
            self.discard(file)
            raise
        return file

    def write(self, data: bytes, filename: str, purpose: Purpose, owner: str = "") -> FileRecord:
        """Bytes that are durable on return; the row is the caller's to add."""
        file = FileRecord(new_id("file-"), filename, purpose, len(data), time.time(), owner)
        try:
            write_file(self._root / file.id, [data])
            fsync_directory(self._root)
        except OSError as error:
            raise storage_error("the file cannot be stored", error) from error
        return file

    def discard(self, file: FileRecord) -> None:
        """Remove what was written and never got a row."""
        (self._root / file.id).unlink(missing_ok=True)

    def get(self, file_id: str, access: Access = OPERATOR) -> FileRecord:
        """Raises UnknownFile, also for a file that is somebody else's."""
        return self._database.file(file_id, access)

    def page(
        self, *, purpose: str | None, after: str | None, limit: int, order: Order, access: Access = OPERATOR
    ) -> tuple[Sequence[FileRecord], bool]:
        """Files by age, and whether there are more. Raises UnknownFile for `after`."""
        return self._database.files(purpose=purpose, after=after, limit=limit, order=order, access=access)

    def open(self, file_id: str, access: Access = OPERATOR) -> tuple[FileRecord, BinaryIO]:
        """The caller closes it. Raises UnknownFile, StorageError."""
        file = self.get(file_id, access)
        try:
            return file, open_regular(self._root / file_id)
        except OSError as error:
            raise self._gone(file_id, error) from error

    def link(self, file_id: str, target: Path) -> FileRecord:
        """Give a file a second place, which stays when the file is deleted. Raises UnknownFile, StorageError."""
        file = self.get(file_id)
        try:
            link_or_copy(self._root / file_id, target)
        except OSError as error:
            raise self._gone(file_id, error) from error
        return file

    def delete(self, file_id: str, access: Access = OPERATOR) -> None:
        """Raises UnknownFile."""
        self.get(file_id, access)
        self._database.delete_file(file_id)
        (self._root / file_id).unlink(missing_ok=True)

    def _gone(self, file_id: str, error: OSError) -> StorageError | UnknownFile:
        """Why there are no bytes: deleted a moment ago, or lost."""
        try:
            self.get(file_id)
        except UnknownFile as unknown:
            return unknown
        return storage_error(f"the file {file_id} cannot be read", error)
