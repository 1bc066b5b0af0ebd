"""What is damaged is moved out of the way and kept, and the rest goes on. No torch.

    adapters.sqlite3  ->  adapters.sqlite3.corrupt-20260101T120000Z

Promises: nothing is deleted, and nothing that is set aside is ever read, replaced or swept again. Only for state whose loss
leaves a server that refuses more than before; one that would let more in (keys) has to stay closed instead.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loramux_adapters.errors import StorageDamaged
from loramux_adapters.files import fsync_directory, storage_error

T = TypeVar("T")

logger = logging.getLogger(__name__)

MARK = ".corrupt-"


def set_aside(*paths: Path) -> str:
    """Rename those of them that exist; what was appended to their names. Raises StorageError."""
    stamp = f"{MARK}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for number in itertools.count(1):
        suffix = stamp if number == 1 else f"{stamp}-{number}"
        if not any(path.with_name(path.name + suffix).exists() for path in paths):
            break
    try:
        # The database, which names the others, goes last: while it is here and damaged, the next start goes on with this.
        for path in reversed(paths):
            if path.exists():
                path.rename(path.with_name(path.name + suffix))
        for folder in {path.parent for path in paths}:
            fsync_directory(folder)
    except OSError as error:
        raise storage_error(f"{paths[0].name} is damaged and cannot be set aside", error) from error
    return suffix


def open_or_set_aside(open_it: Callable[[], T], *paths: Path) -> T:
    """What is opened; if it is damaged, an empty one, and `paths` with all that only it could name are set aside."""
    try:
        return open_it()
    except StorageDamaged as error:
        names = ", ".join(path.name for path in paths if path.exists())
        logger.error(
            "%s; set aside in %s as *%s: %s", error.message, paths[0].parent, set_aside(*paths), names
        )
        return open_it()


def database_files(path: Path) -> tuple[Path, Path, Path]:
    """A SQLite database with what belongs to it."""
    return (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm"))
