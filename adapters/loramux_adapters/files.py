"""File operations that mean what they say: a write survives a crash, a stranger's file cannot trap a read.

`write_file` and `replace_file` return when the bytes are on the disk. `open_regular` opens only a regular
file, so a FIFO, device or directory under a known name cannot block or surprise the reader. No torch.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from loramux_adapters.errors import StorageError, StorageFull

CHUNK = 1024 * 1024

Chunk = bytes | bytearray | memoryview


def storage_error(what: str, error: OSError) -> StorageError:
    """The operating system's refusal as one sentence without the path; StorageFull when room is what lacks."""
    cls = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return cls(f"{what}: {error.strerror or type(error).__name__}")


class Readable(Protocol):
    """Anything with `read(size)`, which gives b"" at the end."""

    def read(self, size: int, /) -> bytes: ...


def open_regular(path: Path, *, follow_links: bool = True) -> BinaryIO:
    """Open for reading, unbuffered. Raises OSError for anything that is not a regular file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return open(descriptor, "rb", buffering=0)


def read_into(file: BinaryIO, buffer: memoryview) -> int:
    """Fill `buffer` from an unbuffered file and say how many bytes came; one system call gives 2 GiB."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def copy_bounded(source: Readable, target: Path, limit: int) -> bool:
    """Copy a stream to a new file, not yet durable; False as soon as it is longer than `limit`.

    Errors of the source pass through; those of the target are StorageError, because they are not its fault.
    """
    copied = 0
    try:
        writer = open(target, "xb", buffering=0)  # noqa: SIM115 (closed below, apart from the source's errors)
    except OSError as error:
        raise storage_error("a file cannot be created", error) from error
    with writer:
        while chunk := source.read(CHUNK):
            copied += len(chunk)
            if copied > limit:
                return False
            rest = memoryview(chunk)
            try:
                while rest:
                    rest = rest[writer.write(rest) :]
            except OSError as error:
                raise storage_error("a file cannot be written", error) from error
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that never changes a second place, which stays when the first goes. Raises OSError."""
    try:
        os.link(source, target)
    except PermissionError:  # a file system without hard links
        shutil.copyfile(source, target)


def write_file(path: Path, chunks: Iterable[Chunk]) -> None:
    """Create a new file that is durable on return; its directory entry is the caller's to fsync."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, chunks: Iterable[Chunk]) -> None:
    """Write beside `path` and rename over it: readers and crashes see the old bytes or the new, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write_file(temporary, chunks)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames and new entries in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
