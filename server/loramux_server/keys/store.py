"""The keys that `loramux keys` and /v1/keys make: rows in SQLite below the data directory, secrets as SHA-256 only.

Several processes have the file open, and write: servers and commands. Promises: what a method acknowledged is durable; a key
is told once, when it is made, and cannot be found out from the file: it is 256 random bits. Rows of revoked keys stay, so
that a server whose last key was revoked is closed, not open.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from loramux_adapters.errors import RequestError, StorageError
from loramux_adapters.sqlite import DurableDatabase
from loramux_server.keys.principal import SCOPES, Scope

FILE_NAME = "keys.sqlite3"
PREFIX = "lmx-"
DEFAULT_TENANT = "default"

_MIGRATIONS = (
    """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, name TEXT NOT NULL, tenant TEXT NOT NULL, scopes TEXT NOT NULL,
    created REAL NOT NULL, expires REAL, revoked REAL, requests_per_minute INTEGER, tokens_per_minute INTEGER
) STRICT;
""",
)
_COLUMNS = (
    "id, name, tenant, scopes, created, expires, revoked, requests_per_minute, tokens_per_minute, digest"
)
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_NAME = 128


class UnknownKey(RequestError):
    """No key of that id, whatever its state."""

    code = "key_not_found"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """What somebody wants a key to be. Raises RequestError for what no key can be."""

    name: str = ""
    tenant: str = DEFAULT_TENANT
    scopes: Sequence[Scope] = ("infer",)
    expires: float | None = None  # Unix seconds
    requests_per_minute: int | None = None  # None: the server's; 0: no limit
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not _TENANT.fullmatch(self.tenant):
            raise RequestError(
                f"tenant: {self.tenant[:80]!a} is not 1 to 64 letters, digits and ._-, beginning with a letter or digit",
                param="tenant",
            )
        if len(self.name) > _MAX_NAME or not self.name.isprintable():
            raise RequestError(f"name: is at most {_MAX_NAME} printable characters", param="name")
        unknown = [scope for scope in self.scopes if scope not in SCOPES]
        if unknown or not self.scopes:
            raise RequestError(f"scope: is one or more of {', '.join(SCOPES)}", param="scope")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is kept. `digest` is the SHA-256 of the key."""

    id: str
    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    created: float
    expires: float | None
    revoked: float | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    digest: bytes

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


def digest_of(key: str) -> bytes:
    """Unsalted and quick on purpose: nobody guesses 256 random bits."""
    return hashlib.sha256(key.encode()).digest()


class KeyStore(DurableDatabase):
    """For one thread at a time."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir / FILE_NAME, _MIGRATIONS, "the key database")
        self.data_dir = data_dir
        self._own_changes = 0

    def create(self, wanted: NewKey) -> tuple[KeyRecord, str]:
        """The key itself comes with it, for the only time."""
        key = PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(
            id=f"key_{secrets.token_hex(6)}",
            name=wanted.name,
            tenant=wanted.tenant,
            scopes=tuple(scope for scope in SCOPES if scope in wanted.scopes),
            created=time.time(),
            expires=wanted.expires,
            revoked=None,
            requests_per_minute=wanted.requests_per_minute,
            tokens_per_minute=wanted.tokens_per_minute,
            digest=digest_of(key),
        )
        row = (
            *(record.id, record.name, record.tenant, " ".join(record.scopes), record.created, record.expires),
            *(None, record.requests_per_minute, record.tokens_per_minute, record.digest),
        )
        with self._transaction():
            self._connection.execute(
                f"INSERT INTO keys ({_COLUMNS}) VALUES ({','.join('?' * len(row))})", row
            )
        self._own_changes += 1
        return record, key

    def revoke(self, key_id: str) -> KeyRecord:
        """From here on it opens nothing; revoking it again changes nothing. Raises UnknownKey."""
        with self._transaction():
            self._connection.execute(
                "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), key_id)
            )
        self._own_changes += 1
        found = [record for record in self.all() if record.id == key_id]
        if not found:
            raise UnknownKey(
                f"id: there is no key {key_id[:64]!a}; the list of keys has their ids", param="id"
            )
        return found[0]

    def all(self) -> list[KeyRecord]:
        """Oldest first, revoked and expired ones among them."""
        return [_record(row) for row in self._read(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id")]

    def version(self) -> tuple[int, int]:
        """Another one whenever anybody has changed the file. Costs microseconds."""
        return self._read("PRAGMA data_version")[0][0], self._own_changes

    def _read(self, query: str) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(query).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the key database cannot be read: {error}") from error


def _record(row: Sequence[Any]) -> KeyRecord:
    key_id, name, tenant, scopes, *rest = row
    known = tuple(cast("Scope", scope) for scope in scopes.split() if scope in SCOPES)
    return KeyRecord(key_id, name, tenant, known, *rest)
