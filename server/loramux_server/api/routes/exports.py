"""/v1/adapters/{name}/exports: merged checkpoints as jobs, with progress, events and downloads."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from pydantic import BaseModel
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError, UnknownAdapter
from loramux_adapters.registry import AdapterRecord
from loramux_server.api.adapter_view import AdapterViews
from loramux_server.api.adapter_wire import parse
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.export_download import ExportDownload
from loramux_server.api.export_wire import (
    AdapterExport,
    AdapterExportDeleted,
    AdapterExportEvent,
    AdapterExportEvents,
    AdapterExportList,
    ExportBody,
    ExportProgressView,
    event_view,
    progress_view,
    view,
)
from loramux_server.api.idempotency import Idempotency, key_of
from loramux_server.api.methods import refuse_others
from loramux_server.api.openapi import describe, describe_answer, describe_download
from loramux_server.api.stream import DONE, EventStream, encode_event
from loramux_server.api.visible import VisibleAdapters
from loramux_server.catalog import AdapterCatalog
from loramux_server.exports.manager import ExportManager
from loramux_server.exports.run import Export
from loramux_server.keys.principal import current_access

EXPORT_BODIES: list[type[BaseModel]] = [ExportBody]
EXPORT_ANSWERS: list[type[msgspec.Struct]] = [
    *(AdapterExport, AdapterExportList, AdapterExportEvents, AdapterExportEvent, AdapterExportDeleted),
    ExportProgressView,
]
SECONDS_BETWEEN_PROGRESS = 1.0


_ID = "export-[0-9a-f]{16}"
ExportId = Annotated[str, PathParameter(pattern=f"^{_ID}$")]


class _ExportId(Convertor[str]):
    """So that an adapter whose name has "/exports/" in it is not taken for an export."""

    regex = _ID

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("export_id", _ExportId())


def exports_router(api: ApiContext, catalog: AdapterCatalog, exports: ExportManager) -> APIRouter:
    """To be included before the adapters' routes, whose names have slashes in them."""
    router = APIRouter()
    routes = ExportRoutes(api, catalog, exports)
    every = "/v1/adapters/{name:path}/exports"
    one = f"{every}/{{export_id:export_id}}"
    table: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
        ("POST", every, routes.create, describe(ExportBody, AdapterExport)),
        ("GET", every, routes.page, describe_answer(AdapterExportList)),
        ("GET", one, routes.show, describe_answer(AdapterExport)),
        ("DELETE", one, routes.delete, describe_answer(AdapterExportDeleted)),
        ("GET", f"{one}/events", routes.events, describe_answer(AdapterExportEvents)),
        ("POST", f"{one}/cancel", routes.cancel, describe_answer(AdapterExport)),
        ("GET", f"{one}/download", routes.download, describe_download(ExportDownload)),
    ]
    table[0][3]["responses"]["201"] = table[0][3]["responses"].pop("200")
    for method, path, endpoint, extra in table:
        status = 201 if endpoint == routes.create else 200
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            openapi_extra=extra,
            status_code=status,
            response_class=Response,
        )
    for path in dict.fromkeys(path for _, path, *_ in table):
        refuse_others(router, path, {method for method, other, *_ in table if other == path})
    return router


class ExportRoutes:
    def __init__(self, api: ApiContext, catalog: AdapterCatalog, exports: ExportManager) -> None:
        self._api = api
        self._registry = VisibleAdapters(catalog.registry)
        self._adapters = AdapterViews(catalog)
        self._exports = exports
        self._repeats = Idempotency()

    async def create(self, name: str, request: Request) -> Response:
        """Queue an export of an adapter, or of several with weights."""
        values = await read_object(request, self._api.settings.max_body_bytes)
        body = parse(ExportBody, values)

        async def work() -> bytes:
            adapter = self._registry.resolve(name).name
            merged, access = self._merged(name, adapter, body), current_access()
            export = await self._exports.create(adapter, merged, body.request(), access)
            return msgspec.json.encode(view(export))

        digest = hashlib.sha256(json.dumps(["export", name, values], sort_keys=True).encode()).hexdigest()
        answer = await self._repeats.once(key_of(request), digest, work)
        return Response(answer, 201, media_type="application/json")

    async def page(
        self, name: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Response:
        """The exports of an adapter, newest first, also of one that is deleted."""
        if f"{name}/exports" in self._registry:  # an adapter may be called that
            return _json(await asyncio.to_thread(self._adapters.one, f"{name}/exports"))
        found = self._exports.of(name, current_access())
        if not found:
            self._registry.get(name)
        start = 0 if after is None else 1 + found.index(self._get(name, after))
        page = [view(export) for export in found[start : start + limit]]
        answer = AdapterExportList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > start + limit,
        )
        return _json(answer)

    async def show(self, name: str, export_id: ExportId) -> Response:
        """One export, with its report when there is one."""
        return await self._answer(self._get(name, export_id))

    async def cancel(self, name: str, export_id: ExportId) -> Response:
        """Stop an export that waits or runs; what it had written is removed."""
        self._get(name, export_id)
        return await self._answer(await self._exports.cancel(name, export_id))

    async def delete(self, name: str, export_id: ExportId) -> Response:
        """Forget an export and remove its files."""
        self._get(name, export_id)
        await self._exports.delete(name, export_id)
        return _json(AdapterExportDeleted(export_id))

    async def events(
        self, name: str, export_id: ExportId, request: Request, stream: bool = False
    ) -> Response:
        """What happened so far; with `stream` also what happens from now on, and the progress."""
        export = self._get(name, export_id)
        if stream:
            return await EventStream.open(request.receive, self._follow(export), ExitStack(), {})
        events = [event_view(event) for event in export.job.events]
        return _json(AdapterExportEvents(events, events[0].id, events[-1].id))

    async def download(self, name: str, export_id: ExportId) -> Response:
        """The files of a finished export as a tar."""
        self._get(name, export_id)
        with ExitStack() as held:
            export = held.enter_context(self._exports.reading(name, export_id))
            files = await asyncio.to_thread(export.folder.files)
            return ExportDownload(export.job, files, held.pop_all())

    def _get(self, name: str, export_id: str) -> Export:
        """An export never changes hands, so that who may see it may go on to use its id."""
        return self._exports.get(name, export_id, current_access())

    async def _answer(self, export: Export) -> Response:
        return _json(view(export, await asyncio.to_thread(export.folder.report)))

    async def _follow(self, export: Export) -> AsyncGenerator[bytes, None]:
        said, clock = 0, asyncio.get_running_loop().time
        told = clock() - SECONDS_BETWEEN_PROGRESS
        async with aclosing(self._exports.watch(export)) as changes:
            async for _ in changes:
                events = export.job.events[said:]
                said += len(events)
                for event in events:
                    yield encode_event(event_view(event))
                if events or clock() - told >= SECONDS_BETWEEN_PROGRESS:
                    told = clock()
                    yield encode_event(progress_view(export))
        yield DONE

    def _merged(self, path_name: str, adapter: str, body: ExportBody) -> list[tuple[str, float]]:
        """Every adapter of the merge exists, is named once, and the path's is among them.

        As `name@generation`: between now and its lease a name may change hands, a generation of it cannot.
        """
        merged = body.merged(path_name)
        records = [self._resolved(index, item.name) for index, item in enumerate(merged)]
        names = [record.name for record in records]
        if adapter not in names:
            raise RequestError(
                f"adapters: '{adapter}', which the path names, must be among them", param="adapters"
            )
        if len(set(names)) < len(names):
            raise RequestError("adapters: an adapter is named twice; add up its weights", param="adapters")
        return [
            (f"{record.name}@{record.generation}", item.weight)
            for record, item in zip(records, merged, strict=True)
        ]

    def _resolved(self, index: int, name: str) -> AdapterRecord:
        try:
            return self._registry.resolve(name)
        except UnknownAdapter:
            param = f"adapters[{index}].name"
            raise UnknownAdapter(f"{param}: there is no adapter named {name[:200]!a}", param=param) from None


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), 200, media_type="application/json")
