"""Idempotency-Key: the same request sent twice is done once.

Promises: equal requests with one key, also at the same time, get one and the same answer; a key that comes back with
other content is refused. A request that failed is forgotten, so that it may be tried again. Kept in memory: a restart
forgets all keys, after which equal content still makes the same generation.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request

from loramux_adapters.errors import EngineError, RequestError
from loramux_server.keys.principal import current_access

MAX_KEYS = 1024
KEEP_S = 24 * 3600.0

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class KeyReused(RequestError):
    code = "idempotency_key_reused"


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
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def once(self, key: str | None, digest: str, work: Callable[[], Awaitable[bytes]]) -> bytes:
        """What `work` answers, or answered to an equal request with this key. `digest` stands for the content."""
        if key is None:
            return await work()
        entry = self._entries.get(key)
        if entry is not None and not entry.is_old:
            if entry.digest != digest:
                raise KeyReused("the Idempotency-Key was used with another request; choose a new key")
            return await asyncio.shield(entry.answer)
        self._make_room()
        entry = _Entry(digest, asyncio.get_running_loop().create_future(), time.monotonic())
        self._entries[key] = entry
        try:
            answer = await work()
        except BaseException as error:
            del self._entries[key]
            shared = error if isinstance(error, Exception) else EngineError("the server is stopping")
            entry.answer.set_exception(shared)
            entry.answer.exception()  # seen: nobody else may be waiting for it
            raise
        entry.answer.set_result(answer)
        return answer

    def _make_room(self) -> None:
        """Forget what is old, then the oldest; one that is being answered stays, and there are never many of those."""
        for key, entry in list(self._entries.items()):
            if not (entry.is_old or len(self._entries) >= self._max_keys):
                break
            if entry.answer.done():
                del self._entries[key]


def key_of(request: Request) -> str | None:
    """With the tenant before it: nobody is answered what somebody else was."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise RequestError("Idempotency-Key must be 1 to 255 printable ASCII characters without spaces")
    return None if key is None else f"{current_access().owner} {key}"
