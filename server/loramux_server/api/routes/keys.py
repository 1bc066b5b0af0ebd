"""/v1/keys: list, make and revoke the keys of the server, for admins; as `loramux keys` does it where the server runs.

Promises: a key is told once, in the answer to the request that made it, which no cache may keep; digests and keys are in no
other answer and in no log line. Whoever gets here is an admin (`api/scopes.py`), so that nobody can make a key that may do
more than his own. The first key is never made here: somebody who only reaches the port could shut everybody out with it.
Keys of the configuration are not listed, and cannot be revoked.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_server.api.adapter_wire import parse
from loramux_server.api.body import read_object
from loramux_server.api.key_wire import KeyBody, KeyList, KeyObject, NewKeyObject, key_view, new_key_view
from loramux_server.api.methods import refuse_others
from loramux_server.api.openapi import describe, describe_answer
from loramux_server.keys.guard import Guard
from loramux_server.keys.principal import current_principal
from loramux_server.keys.store import KeyStore

KEY_BODIES: list[type[BaseModel]] = [KeyBody]
KEY_ANSWERS: list[type[msgspec.Struct]] = [KeyObject, NewKeyObject, KeyList]

MAX_BODY_BYTES = 64 * 2**10

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class NoKeysYet(RequestError):
    code = "no_keys_yet"


def keys_router(guard: Guard, store: KeyStore) -> APIRouter:
    """`store` is for these routes alone: they use it on threads, one at a time."""
    router = APIRouter()
    routes = KeyRoutes(guard, store)
    every, one = "/v1/keys", "/v1/keys/{key_id}"
    created = describe(KeyBody, NewKeyObject)
    created["responses"]["201"] = created["responses"].pop("200")
    router.add_api_route(every, routes.create, methods=["POST"], openapi_extra=created, status_code=201)
    router.add_api_route(every, routes.page, methods=["GET"], openapi_extra=describe_answer(KeyList))
    router.add_api_route(one, routes.revoke, methods=["DELETE"], openapi_extra=describe_answer(KeyObject))
    refuse_others(router, every, {"GET", "POST"})
    refuse_others(router, one, {"DELETE"})
    return router


class KeyRoutes:
    def __init__(self, guard: Guard, store: KeyStore) -> None:
        self._keys = guard.keys
        self._store = store
        self._one_at_a_time = threading.Lock()  # on the threads: one goes on when its request is cancelled

    async def page(self) -> Response:
        """All keys, also those that are revoked or expired, without what opens anything."""
        records = await self._on_thread(self._store.all)
        mine = current_principal().key_id
        return _json(KeyList([key_view(record, mine) for record in records]))

    async def create(self, request: Request) -> Response:
        """Make a key. The answer has it, this once."""
        if self._keys.is_open:
            raise NoKeysYet(
                "this server has no keys, and the first is not made over HTTP: run loramux keys create --scope admin "
                "where it runs, or start it with --api-key"
            )
        wanted = parse(KeyBody, await read_object(request, MAX_BODY_BYTES)).wanted()
        record, key = await self._on_thread(lambda: self._store.create(wanted))
        logger.info("key %s of tenant %s is made by %s", record.id, record.tenant, current_principal().key_id)
        return _json(new_key_view(record, key), 201)

    async def revoke(self, key_id: str) -> Response:
        """Let a key open nothing any more, from the next request on; those that run finish."""
        record = await self._on_thread(lambda: self._store.revoke(key_id))
        who = current_principal().key_id
        logger.info("key %s is revoked by %s", record.id, who)
        return _json(key_view(record, who))

    async def _on_thread(self, work: Callable[[], Found]) -> Found:
        """A commit waits for the disk, and for other processes that write."""

        def alone() -> Found:
            with self._one_at_a_time:
                return work()

        return await asyncio.to_thread(alone)


def _json(answer: msgspec.Struct, status: int = 200) -> Response:
    return Response(
        msgspec.json.encode(answer), status, {"cache-control": "no-store"}, media_type="application/json"
    )
