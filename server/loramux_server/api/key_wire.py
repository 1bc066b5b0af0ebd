"""What is said about keys on the wire: the body of a new one, and the objects that tell of it.

The words are those of `loramux keys`. Nothing here holds what opens anything, but `NewKeyObject`, the one answer that does.
"""

from __future__ import annotations

import time
from typing import Literal

import msgspec
from pydantic import Field

from loramux_server.api.adapter_wire import Body
from loramux_server.keys.principal import Scope
from loramux_server.keys.store import DEFAULT_TENANT, KeyRecord, NewKey

MAX_SECONDS = 100 * 366 * 86_400
MAX_A_MINUTE = 10**12


class KeyBody(Body):
    """POST /v1/keys. Limits that are left out are the server's; 0 is none."""

    name: str = ""
    tenant: str = DEFAULT_TENANT
    scopes: list[Scope] = Field(["infer"], min_length=1)
    expires_in: int | None = Field(None, ge=1, le=MAX_SECONDS)
    requests_per_minute: int | None = Field(None, ge=0, le=MAX_A_MINUTE)
    tokens_per_minute: int | None = Field(None, ge=0, le=MAX_A_MINUTE)

    def wanted(self) -> NewKey:
        """Raises RequestError for what no key can be."""
        return NewKey(
            name=self.name,
            tenant=self.tenant,
            scopes=self.scopes,
            expires=None if self.expires_in is None else time.time() + self.expires_in,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
        )


class KeyObject(msgspec.Struct, tag_field="object", tag="api_key"):
    """A key without what opens anything. `current`: the request that is answered came with it."""

    id: str
    name: str
    tenant: str
    scopes: list[Scope]
    state: Literal["active", "expired", "revoked"]
    current: bool
    created: int
    expires: int | None
    revoked: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


class NewKeyObject(KeyObject, kw_only=True, tag_field="object", tag="api_key"):
    """`key` is told this once."""

    key: str


class KeyList(msgspec.Struct, tag_field="object", tag="list"):
    """All of them, oldest first."""

    data: list[KeyObject]
    has_more: bool = False


def key_view(record: KeyRecord, current_id: str) -> KeyObject:
    return KeyObject(
        id=record.id,
        name=record.name,
        tenant=record.tenant,
        scopes=list(record.scopes),
        state=record.state(time.time()),
        current=record.id == current_id,
        created=int(record.created),
        expires=None if record.expires is None else int(record.expires),
        revoked=None if record.revoked is None else int(record.revoked),
        requests_per_minute=record.requests_per_minute,
        tokens_per_minute=record.tokens_per_minute,
    )


def new_key_view(record: KeyRecord, key: str) -> NewKeyObject:
    """Made by another key, or by one of the configuration: it is nobody's current one."""
    return NewKeyObject(**msgspec.structs.asdict(key_view(record, "")), key=key)
