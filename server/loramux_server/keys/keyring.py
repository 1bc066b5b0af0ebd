"""From a key that somebody sends to who he is. Knows the keys of the configuration and those of the store.

Promises: keys are compared as digests in constant time, and kept as nothing else; a key that another process made or revoked
counts with the next request. As long as there was never a key, everybody is let in.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence

from loramux_server.keys.principal import ANYBODY, Principal
from loramux_server.keys.store import KeyRecord, KeyStore, digest_of


class Keyring:
    """For one thread: the event loop's. `admin_keys` may do everything."""

    def __init__(self, store: KeyStore | None = None, admin_keys: Sequence[str] = ()) -> None:
        self._store = store
        self._admins = [
            (digest_of(key), Principal(f"api-key-{number}", "", frozenset({"admin"})))
            for number, key in enumerate(dict.fromkeys(admin_keys), 1)
        ]
        self._version: object = None
        self._records: dict[bytes, KeyRecord] = {}

    @property
    def is_open(self) -> bool:
        """No key was ever made. Raises StorageError when that cannot be found out."""
        return not self._admins and not self._known()

    def find(self, key: str) -> Principal | None:
        """Whose key it is; None for one that is unknown, revoked or expired. Raises StorageError."""
        digest = digest_of(key)
        found = None
        for known, admin in self._admins:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = admin
        if found is not None:
            return found
        # The digest's place in a table tells nothing about the key: nobody can choose digests.
        record = self._known().get(digest)
        if record is None or not hmac.compare_digest(record.digest, digest):
            return None
        return _principal(record) if record.state(time.time()) == "active" else None

    def anybody(self) -> Principal | None:
        """Who comes without a key, if the server is open."""
        return ANYBODY if self.is_open else None

    def _known(self) -> dict[bytes, KeyRecord]:
        if self._store is not None and (version := self._store.version()) != self._version:
            self._records = {record.digest: record for record in self._store.all()}
            self._version = version
        return self._records


def _principal(record: KeyRecord) -> Principal:
    return Principal(
        record.id,
        record.tenant,
        frozenset(record.scopes),
        record.requests_per_minute,
        record.tokens_per_minute,
    )
