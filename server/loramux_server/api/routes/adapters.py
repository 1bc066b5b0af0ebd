"""/v1/adapters: upload, list, show, change, download, roll back and delete adapters while the server runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.adapter_files import ADAPTER_FILES, GateLimits
from loramux_adapters.errors import Fault, InvalidAdapter, Overloaded, RequestError
from loramux_adapters.sources import HuggingFaceHub, Staged, stage_archive, stage_hub
from loramux_adapters.training.layout import published_manifest
from loramux_server.api.adapter_view import AdapterViews
from loramux_server.api.adapter_wire import (
    Adapter,
    AdapterDeleted,
    AdapterList,
    AdapterOptions,
    AdapterPlan,
    NewAdapter,
    PlanBody,
    PulledAdapter,
    RollbackBody,
    parse,
)
from loramux_server.api.body import parse_object, read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.download import AdapterDownload
from loramux_server.api.idempotency import Idempotency, OwnedKey, key_of
from loramux_server.api.methods import refuse_others
from loramux_server.api.openapi import describe, describe_answer, describe_download
from loramux_server.api.uploads import ARCHIVE, FIELDS, FILES, Upload, is_multipart, receive_upload
from loramux_server.api.visible import VisibleAdapters
from loramux_server.catalog import AdapterCatalog
from loramux_server.keys.principal import current_access

MAX_UPLOADS = 16  # at once; each may take the disk space of the largest adapter
DELETE_WAIT_S = 30.0

_FLAGS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


ADAPTER_BODIES: list[type[BaseModel]] = [PulledAdapter, AdapterOptions, RollbackBody, PlanBody]
ADAPTER_ANSWERS: list[type[msgspec.Struct]] = [Adapter, AdapterList, AdapterDeleted, AdapterPlan]


def adapters_router(api: ApiContext, catalog: AdapterCatalog) -> APIRouter:
    router = APIRouter()
    routes = AdapterRoutes(api, catalog)
    one = "/v1/adapters/{name:path}"  # names have slashes and colons in them
    for method, path, endpoint, extra in (
        ("POST", "/v1/adapters", routes.create, _describe_create()),
        ("GET", "/v1/adapters", routes.page, describe_answer(AdapterList)),
        ("POST", "/v1/adapters/plan", routes.plan, describe(PlanBody, AdapterPlan)),
        ("POST", f"{one}/rollback", routes.rollback, describe(RollbackBody, Adapter)),
        (
            "GET",
            f"{one}/download",
            routes.download,
            describe_download(AdapterDownload),
        ),  # or JSON, of one called so
        ("GET", one, routes.show, describe_answer(Adapter)),
        ("PATCH", one, routes.change, describe(AdapterOptions, Adapter)),
        ("DELETE", one, routes.delete, describe_answer(AdapterDeleted)),
    ):
        status = 201 if endpoint == routes.create else 200
        router.add_api_route(path, endpoint, methods=[method], openapi_extra=extra, status_code=status)
    refuse_others(router, "/v1/adapters", {"GET", "POST"})
    refuse_others(router, one, {"GET", "PATCH", "DELETE"})
    return router


class AdapterRoutes:
    def __init__(self, api: ApiContext, catalog: AdapterCatalog) -> None:
        self._api = api
        self._catalog = catalog
        self._visible = VisibleAdapters(catalog.registry)
        self._views = AdapterViews(catalog)
        self._repeats = Idempotency()
        self._uploads = 0
        self._pulls = asyncio.Semaphore(2)  # each keeps one of the few threads that all routes share

    async def create(self, request: Request) -> Response:
        """Add an adapter: its two files or an archive as multipart/form-data, or JSON with a source to fetch."""
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are being received already; try again shortly")
        key = key_of(request)
        self._uploads += 1
        try:
            if is_multipart(request):
                answer = await self._upload(request, key)
            else:
                answer = await self._pull(request, key)
        finally:
            self._uploads -= 1
        return Response(answer, 201, media_type="application/json")

    async def page(
        self, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Response:
        """The adapters by name, a page at a time."""
        return _json(await asyncio.to_thread(self._views.page, after, limit))

    async def show(self, name: str) -> Response:
        """One adapter, by `name` or `name@generation`."""
        return _json(await asyncio.to_thread(self._views.one, name))

    async def change(self, name: str, request: Request) -> Response:
        """Change what the body names; the generation stays."""
        body = parse(AdapterOptions, await read_object(request, self._api.settings.max_body_bytes))
        record = await self._catalog.update(name, body.options(), current_access())
        return _json(await asyncio.to_thread(self._views.card, record))

    async def delete(
        self, name: str, timeout: Annotated[float, Query(ge=0, le=600)] = DELETE_WAIT_S
    ) -> Response:
        """Forget the name at once, and wait for the requests that run on it: 200 when none is left, else 202."""
        left = await self._catalog.delete(name, timeout, current_access())
        return _json(AdapterDeleted(name, left), 202 if left else 200)

    async def rollback(self, name: str, request: Request) -> Response:
        """Point the name back at an earlier generation, by default the one before the current."""
        values = await read_object(request, self._api.settings.max_body_bytes)
        body = parse(RollbackBody, values)

        async def work() -> bytes:
            record = await self._catalog.rollback(name, body.generation, current_access())
            return msgspec.json.encode(await asyncio.to_thread(self._views.card, record))

        answer = await self._repeats.once(key_of(request), _digest("rollback", name, values), work)
        return Response(answer, media_type="application/json")

    async def download(self, name: str) -> Response:
        """The files of `name` or `name@generation` as a .tar.gz, which can be uploaded again."""
        if f"{name}/download" in self._visible:  # an adapter may be called that
            return await self.show(f"{name}/download")
        lease = self._visible.lease(name)
        try:
            store, generation = self._visible.store, lease.record.generation
            path = await asyncio.to_thread(store.path, generation)
            facts = (await asyncio.to_thread(store.manifest, generation)).info
            return AdapterDownload(lease, path, published_manifest(facts, lease.record.origin))
        except BaseException:
            lease.release()
            raise

    async def plan(self, request: Request) -> Response:
        """Would this adapter fit, and what would make room for it now?"""
        body = parse(PlanBody, await read_object(request, self._api.settings.max_body_bytes))
        return _json(await asyncio.to_thread(self._views.plan, body))

    async def _upload(self, request: Request, key: OwnedKey | None) -> bytes:
        catalog = self._catalog
        async with receive_upload(request, catalog.staging, catalog.limits) as upload:
            body = parse(NewAdapter, _typed(upload.fields))
            stage = partial(_stage_upload, upload, catalog.staging, catalog.limits)
            return await self._repeats.once(key, upload.digest, lambda: self._publish(body, stage))

    async def _pull(self, request: Request, key: OwnedKey | None) -> bytes:
        catalog = self._catalog
        values = await read_object(request, self._api.settings.max_body_bytes)
        body = parse(PulledAdapter, values)
        stage = partial(stage_hub, body.source, catalog.staging, hub=HuggingFaceHub(), limits=catalog.limits)

        async def pull() -> bytes:
            async with self._pulls:
                return await self._publish(body, stage)

        return await self._repeats.once(key, _digest("pull", values), pull)

    async def _publish(self, body: NewAdapter, stage: Callable[[], Staged]) -> bytes:
        published = await self._catalog.publish(body.name, stage, body.options(), current_access())
        card = await asyncio.to_thread(self._views.card, published.record)
        card.warnings = list(published.warnings)
        return msgspec.json.encode(card)


def _describe_create() -> dict[str, Any]:
    extra = describe(PulledAdapter, Adapter)
    parts = {name: {"type": "string", "format": "binary"} for name in FILES}
    parts |= {name: {"type": "string"} for name in FIELDS}
    form = {"schema": {"type": "object", "required": ["name"], "properties": parts}}
    extra["requestBody"]["content"]["multipart/form-data"] = form
    extra["responses"]["201"] = extra["responses"].pop("200")
    return extra


def _typed(fields: Mapping[str, str]) -> dict[str, object]:
    """The texts of a form as the values that JSON would have."""
    values: dict[str, object] = dict(fields)
    for name in ("pinned", "overwrite", "verify", "allow_noop"):
        if name in fields:
            values[name] = _FLAGS.get(fields[name].strip().lower(), fields[name])
    for name in ("metadata", "default_sampling"):
        if name in fields:
            try:
                values[name] = parse_object(fields[name].encode())
            except RequestError as error:
                reason = error.message.removeprefix("the request body ")
                raise RequestError(f"{name}: {reason}", param=name, code=error.code) from None
    return values


def _stage_upload(upload: Upload, staging: Path, limits: GateLimits) -> Staged:
    """Raises InvalidAdapter naming each file that is missing or too many."""
    if set(upload.files) == {ARCHIVE}:
        return stage_archive(upload.directory / ARCHIVE, staging, limits=limits)
    if ARCHIVE in upload.files:
        raise InvalidAdapter(
            [Fault(ARCHIVE, f"comes beside files, send it alone or {' and '.join(ADAPTER_FILES)}")]
        )
    missing = [Fault(name, "is missing") for name in ADAPTER_FILES if name not in upload.files]
    if missing:
        raise InvalidAdapter(missing)
    return Staged(upload.directory, "upload", "")


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _json(answer: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")
