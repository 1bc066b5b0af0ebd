"""What the server will need around it: its data directory, and its port."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from loramux_server.doctor.finding import Finding, fault, note, ok

GIB = 2**30
_LEAST_DISK = GIB


def data_dir(path: Path) -> Iterator[Finding]:
    """May it be written, is there room, does another server have it. It is not made."""
    check = "data directory"
    existing = _nearest(path)
    if not existing.is_dir():
        yield fault(check, f"{existing} is a file", "choose another directory with --data-dir")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield fault(
            check, f"{existing} cannot be written by this user", "change its owner, or choose --data-dir"
        )
        return
    free = shutil.disk_usage(existing).free
    found = f"{path}{'' if path.exists() else ' (made at start)'}, {free / GIB:.1f} GiB free"
    if free < _LEAST_DISK:
        yield fault(check, found, "make room: adapters, training checkpoints and exports are kept there")
    else:
        yield ok(check, found)
    for lock in sorted(path.glob("bases/*/lock")):
        if _is_held(lock):
            yield note(
                check,
                f"a running server has {lock.parent.name}",
                "for another server of the same base choose another --data-dir",
            )


def port(host: str, number: int) -> Finding:
    check = "port"
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, number))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = "stop what listens there, or choose another with --port"
            return fault(check, f"{number} on {host} is in use", advice)
        return fault(
            check, f"cannot listen on {host}:{number}: {error.strerror}", "choose another --host or --port"
        )
    return ok(check, f"{number} on {host} is free")


def _nearest(path: Path) -> Path:
    """The path itself or the first directory above that exists."""
    for candidate in (path.absolute(), *path.absolute().parents):
        if candidate.exists():
            return candidate
    return Path("/")


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # not ours to read: whether it may be written is said elsewhere
    return False
