"""Everything that stands between a request and the routes, in one value: whose key it is, and how much the key may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loramux_server.keys.keyring import Keyring
from loramux_server.keys.limits import KeyLimits, Limits
from loramux_server.keys.store import KeyStore


@dataclass(frozen=True)
class Guard:
    """As it is, it lets everybody in. `changes` is what keys are made and revoked with, if that is possible."""

    keys: Keyring = field(default_factory=Keyring)
    limits: KeyLimits = field(default_factory=KeyLimits)
    changes: KeyStore | None = None


@contextmanager
def open_guard(data_dir: Path, admin_keys: Sequence[str], limits: Limits) -> Iterator[Guard]:
    """With the keys below the data directory beside `admin_keys`. Raises StorageError."""
    # Two connections: one is read on the event loop at every request, the other waits for the disk on threads.
    with closing(KeyStore(data_dir)) as store, closing(KeyStore(data_dir)) as changes:
        yield Guard(Keyring(store, admin_keys), KeyLimits(limits), changes)
