#!/usr/bin/env python3
"""Copy a data directory while the server runs: backup.py DATA_DIR TARGET. Standard library only.

Databases first, each as of one moment, then the files: what a database names was written before it was named and is never
changed afterwards, so that it is in the copy. Uploads that are coming in are left out. What vanishes meanwhile (exports and
checkpoints in the making) is left out, too. To restore: stop the server, and give it the copy as --data-dir.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

_LEFT_OUT = ("staging", "lock")
_DATABASE_SUFFIXES = (".sqlite3", ".sqlite3-wal", ".sqlite3-shm")


def backup(source: Path, target: Path) -> int:
    """How many databases were copied. `target` must not exist."""
    target.mkdir(parents=True)
    databases = _databases(source)
    for database in databases:
        copy = target / database.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (
            closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as live,
            closing(sqlite3.connect(copy)) as copied,
        ):
            live.backup(copied)
    _copy_files(source, target)
    return len(databases)


def _databases(source: Path) -> list[Path]:
    """Folders may vanish meanwhile, which `Path.rglob` does not expect."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = []
    for folder, folders, files in os.walk(source, onerror=failed):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(folder, name) for name in files if name.endswith(_DATABASE_SUFFIXES[0])]
    return sorted(found)


def _copy_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name in _LEFT_OUT or path.name.endswith(_DATABASE_SUFFIXES):
            continue
        try:
            if path.is_dir():
                (target / path.name).mkdir(exist_ok=True)
                _copy_files(path, target / path.name)
            else:
                shutil.copy2(path, target / path.name)
        except FileNotFoundError:
            if path.exists():
                raise


def main() -> int:
    if len(sys.argv) != 3:
        sys.stderr.write("usage: backup.py DATA_DIR TARGET\n")
        return 2
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if not source.is_dir() or target.exists():
        sys.stderr.write(f"backup.py: {source} must be a directory, and {target} must not exist\n")
        return 1
    sys.stdout.write(f"{backup(source, target)} databases and their files are in {target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
