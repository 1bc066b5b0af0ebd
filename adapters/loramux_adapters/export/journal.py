"""What of an export is already on disk and proven, so that a killed export can go on.

`export-journal.jsonl` in the partial directory: first line the plan's fingerprint, then one line a finished
shard with its sha256 and what was measured. A line is appended and fsynced after the shard's rename; a torn
last line counts for nothing. Promises: one writer at a time (the file is locked while it is open), and a
shard that is reported as finished has the bytes that were written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from loramux_adapters.errors import ExportError
from loramux_adapters.export.merge import TensorOutcome
from loramux_adapters.files import fsync_directory

JOURNAL = "export-journal.jsonl"


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard on disk and the outcomes of its tensors."""

    name: str
    num_bytes: int
    sha256: str
    tensors: tuple[TensorOutcome, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "shard": self.name,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> FinishedShard:
        outcomes = tuple(TensorOutcome(**fields) for fields in line["tensors"])
        return cls(line["shard"], line["bytes"], line["sha256"], outcomes)


class Journal:
    """An open journal. Raises ExportError if another export holds it or it belongs to another plan."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._path = directory / JOURNAL
        self._file: BinaryIO = open(self._path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            _lock(self._file, directory)
            self.finished = self._read(fingerprint)
        except BaseException:
            self._file.close()
            raise
        fsync_directory(directory)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, shard: FinishedShard) -> None:
        """Durable on return."""
        self._append(shard.to_json())
        self.finished[shard.name] = shard

    def _read(self, fingerprint: str) -> dict[str, FinishedShard]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._append({"fingerprint": fingerprint})
            return {}
        if lines[0].get("fingerprint") != fingerprint:
            raise ExportError(
                f"{self._path.parent} was begun with another base, adapter, option or library version: "
                "delete it to start "
                "again",
                param="resume",
            )
        return {line["shard"]: FinishedShard.from_json(line) for line in lines[1:]}

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def is_intact(path: Path, shard: FinishedShard) -> bool:
    """True if the file has the length and the sha256 the journal says."""
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _lock(file: BinaryIO, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ExportError(f"another export is writing {directory}", param="out") from None
