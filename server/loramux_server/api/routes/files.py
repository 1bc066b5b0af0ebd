"""/v1/files: training data in, result files out, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import Overloaded, RequestError
from loramux_server.api.errors import unsupported
from loramux_server.api.file_download import FileDownload
from loramux_server.api.file_wire import FileDeleted, FileList, FileObject, file_list, file_view
from loramux_server.api.idempotency import Idempotency, key_of
from loramux_server.api.methods import refuse_others
from loramux_server.api.openapi import describe_answer, describe_download
from loramux_server.api.uploads import (
    MAX_FIELD_BYTES,
    MAX_FRAMING_BYTES,
    Form,
    Upload,
    is_multipart,
    receive_form,
)
from loramux_server.catalog import AdapterCatalog
from loramux_server.keys.principal import current_access
from loramux_server.training.database import Order
from loramux_server.training.files import MAX_FILE_BYTES
from loramux_server.training.manager import JobManager
from loramux_server.training.records import Purpose

FILE_ANSWERS: list[type[msgspec.Struct]] = [FileObject, FileList, FileDeleted]

MAX_UPLOADS = 16  # at once
MAX_FILENAME = 255
PURPOSE: Purpose = "fine-tune"

_REFUSED = ("expires_after[anchor]", "expires_after[seconds]")
_FIELDS = ("purpose", *_REFUSED)
_FORM = Form(
    files={"file": MAX_FILE_BYTES},
    fields=_FIELDS,
    max_bytes=MAX_FILE_BYTES + len(_FIELDS) * MAX_FIELD_BYTES + MAX_FRAMING_BYTES,
)


def files_router(catalog: AdapterCatalog, jobs: JobManager) -> APIRouter:
    router = APIRouter()
    routes = FileRoutes(catalog, jobs)
    every, one = "/v1/files", "/v1/files/{file_id}"
    for method, path, endpoint, extra in (
        ("POST", every, routes.create, _describe_create()),
        ("GET", every, routes.page, describe_answer(FileList)),
        ("GET", one, routes.show, describe_answer(FileObject)),
        ("DELETE", one, routes.delete, describe_answer(FileDeleted)),
        ("GET", f"{one}/content", routes.content, describe_download(FileDownload)),
    ):
        router.add_api_route(path, endpoint, methods=[method], openapi_extra=extra, response_class=Response)
    refuse_others(router, every, {"GET", "POST"})
    refuse_others(router, one, {"GET", "DELETE"})
    refuse_others(router, f"{one}/content", {"GET"})
    return router


class FileRoutes:
    def __init__(self, catalog: AdapterCatalog, jobs: JobManager) -> None:
        self._staging = catalog.staging
        self._files = jobs.files
        self._repeats = Idempotency()
        self._uploads = 0

    async def create(self, request: Request) -> Response:
        """Upload training data as multipart/form-data: `file` and `purpose`."""
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are being received already; try again shortly")
        if not is_multipart(request):
            raise RequestError("a file is sent as multipart/form-data, with the parts file and purpose")
        key = key_of(request)
        self._uploads += 1
        try:
            async with receive_form(request, self._staging, _FORM) as upload:
                filename = _checked(upload)

                async def work() -> bytes:
                    source = upload.directory / "file"
                    owner = current_access().owner
                    file = await asyncio.to_thread(self._files.add, source, filename, PURPOSE, owner)
                    return msgspec.json.encode(file_view(file))

                digest = hashlib.sha256(f"{filename}\0{upload.digest}".encode()).hexdigest()
                answer = await self._repeats.once(key, digest, work)
        finally:
            self._uploads -= 1
        return Response(answer, media_type="application/json")

    async def page(
        self,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Order = "desc",
    ) -> Response:
        """The files by age, newest first unless `order` is asc."""
        files, has_more = await asyncio.to_thread(
            self._files.page,
            purpose=purpose,
            after=after,
            limit=limit,
            order=order,
            access=current_access(),
        )
        return _json(file_list(files, has_more))

    async def show(self, file_id: str) -> Response:
        """One file."""
        return _json(file_view(await asyncio.to_thread(self._files.get, file_id, current_access())))

    async def delete(self, file_id: str) -> Response:
        """Forget a file. A job that needs it has its own hold on the data."""
        await asyncio.to_thread(self._files.delete, file_id, current_access())
        return _json(FileDeleted(file_id))

    async def content(self, file_id: str) -> Response:
        """The file's bytes."""
        return FileDownload(*await asyncio.to_thread(self._files.open, file_id, current_access()))


def _checked(upload: Upload) -> str:
    """The file's name. Raises RequestError for what is missing or not served."""
    for name in _REFUSED:
        if name in upload.fields:
            raise unsupported(
                "expires_after", "'expires_after' is not supported by this server; leave it out"
            )
    purpose = upload.fields.get("purpose")
    if purpose != PURPOSE:
        given = "is missing" if purpose is None else f"is {purpose[:64]!a}"
        raise RequestError(f"purpose: {given}, this server takes files for '{PURPOSE}' only", param="purpose")
    if "file" not in upload.files:
        raise RequestError("file: is missing", param="file")
    if not (upload.directory / "file").stat().st_size:
        raise RequestError("file: is empty", param="file")
    name = upload.files["file"].replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in name if character.isprintable())
    return printable[:MAX_FILENAME] or "file"


def _describe_create() -> dict[str, Any]:
    extra = describe_answer(FileObject)
    properties = {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
    }
    schema = {"type": "object", "required": ["file", "purpose"], "properties": properties}
    extra["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return extra


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
