"""What is said about files on the wire: OpenAI's objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from loramux_server.training.records import FileRecord, Purpose


class FileObject(msgspec.Struct, tag_field="object", tag="file"):
    """`status` is for older clients, which wait for "processed": a file that was answered is complete."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None


class FileList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, tag_field="object", tag="file"):
    id: str
    deleted: bool = True


def file_view(file: FileRecord) -> FileObject:
    return FileObject(file.id, file.num_bytes, int(file.created), file.filename, file.purpose)


def file_list(files: Sequence[FileRecord], has_more: bool) -> FileList:
    data = [file_view(file) for file in files]
    return FileList(data, data[0].id if data else None, data[-1].id if data else None, has_more)
