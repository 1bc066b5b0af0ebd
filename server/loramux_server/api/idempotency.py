"""Idempotency-Key: the same request sent twice is done once.

Promises: equal requests with one key, also at the same time, get one and the same answer; a key that comes back with
other content is refused. A request that failed is forgotten, so that it may be tried again. Keys of two tenants are two, and
no tenant's are forgotten for another's. Kept in memory: a restart forgets all keys, after which equal content still makes
the same generation.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

from starlette.requests import Request

from loramux_adapters.errors import EngineError, RequestError
from loramux_server.keys.principal import current_access

MAX_KEYS = 1024  # of each tenant
KEEP_S = 24 * 3600.0

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class KeyReused(RequestError):
    code = "idempotency_key_reused"


class OwnedKey(NamedTuple):
    """A key with the tenant who sent it: nobody is answered what somebody else was."""

    owner: str
    key: str


@dataclass(frozen=True)
class _Entry:
    digest: str
    answer: asyncio.Future[bytes]
    since: float

    @property
    def is_old(self) -> bool:
        return self.answer.done() and time.monotonic() - self.since > KEEP_S


class Idempotency:
    """The answers given lately, by key. For one event loop."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._entries: dict[str, OrderedDict[str, _Entry]] = {}  # by owner, the next to go first

    async def once(self, owned: OwnedKey | None, digest: str, work: Callable[[], Awaitable[bytes]]) -> bytes:
        """What `work` answers, or answered to an equal request with this key. `digest` stands for the content."""
        if owned is None:
            return await work()
        key, entries = owned.key, self._entries.setdefault(owned.owner, OrderedDict())
        entry = entries.get(key)
        if entry is not None and not entry.is_old:
            if entry.digest != digest:
                raise KeyReused("the Idempotency-Key was used with another request; choose a new key")
            return await asyncio.shield(entry.answer)
        self._make_room(entries)
        entry = _Entry(digest, asyncio.get_running_loop().create_future(), time.monotonic())
        entries[key] = entry
        try:
            answer = await work()
        except BaseException as error:
            del entries[key]
            shared = error if isinstance(error, Exception) else EngineError("the server is stopping")
            entry.answer.set_exception(shared)
            entry.answer.exception()  # seen: nobody else may be waiting for it
            raise
        entry.answer.set_result(answer)
        return answer

    def _make_room(self, entries: OrderedDict[str, _Entry]) -> None:
        """Forget what is old, then the oldest; one that is being answered stays, and there are never many of those."""
        for key, entry in list(entries.items()):
            if not (entry.is_old or len(entries) >= self._max_keys):
                break
            if entry.answer.done():
                del entries[key]


def key_of(request: Request) -> OwnedKey | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise RequestError("Idempotency-Key must be 1 to 255 printable ASCII characters without spaces")
    return None if key is None else OwnedKey(current_access().owner, key)
