"""What is said about exports on the wire: the body of a new one, and the objects that tell of it.

The words of the body are the options of `loramux export`. Nothing names a path: adapters are named as everywhere in the API.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loramux_adapters.errors import RequestError
from loramux_adapters.prompts import PROMPTS
from loramux_server.api.adapter_wire import Body
from loramux_server.exports.jobs import ExportRequest, JobEvent, Level, Status
from loramux_server.exports.run import Export
from loramux_server.sizes import parse_bytes

MAX_PROMPTS = len(PROMPTS)  # the built-in ones; a client cannot bring a file
MAX_ADAPTERS = 16


def _size(value: object) -> object:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise PydanticCustomError("size", "{reason}", {"reason": str(error)}) from None


class WeightedName(Body):
    """An adapter of a linear merge: `name` or `name@generation`, and its factor."""

    name: str = Field(min_length=1, max_length=256)
    weight: float = 1.0


class ExportBody(Body):
    """POST /v1/adapters/{name}/exports. Without `adapters` it is the named adapter with weight 1."""

    format: Literal["bf16", "fp16", "fp32", "nf4"] = "bf16"
    onto: Literal["dequantized", "original"] = "dequantized"
    verify: int | None = Field(None, ge=0, le=MAX_PROMPTS)
    verify_tokens: int = Field(160, ge=2, le=4096)
    shard_size: Annotated[int, BeforeValidator(_size)] = Field(5 * 10**9, ge=1, le=10**12)
    compare: bool = False
    strict: bool = False
    adapters: list[WeightedName] | None = Field(None, min_length=1, max_length=MAX_ADAPTERS)

    def request(self) -> ExportRequest:
        return ExportRequest(
            format=self.format,
            onto=self.onto,
            shard_size=self.shard_size,
            verify=self.verify,
            verify_tokens=self.verify_tokens,
            compare=self.compare,
            strict=self.strict,
        )

    def merged(self, name: str) -> list[WeightedName]:
        """What is merged. Raises RequestError for a weight of 0."""
        adapters = self.adapters or [WeightedName(name=name)]
        for index, adapter in enumerate(adapters):
            if adapter.weight == 0:
                param = f"adapters[{index}].weight"
                raise RequestError(f"{param}: must be a number other than 0", param=param)
        return adapters


class MergedAdapterView(msgspec.Struct):
    name: str
    generation: str
    weight: float


class ExportFault(msgspec.Struct):
    message: str
    code: str
    param: str | None


class ExportProgressView(msgspec.Struct, tag_field="object", tag="adapter.export.progress"):
    """Bytes over all phases; `eta_seconds` is null until there is a rate."""

    phase: str
    bytes_done: int
    bytes_total: int
    fraction: float
    eta_seconds: float | None


class AdapterExport(msgspec.Struct, tag_field="object", tag="adapter.export"):
    """An export job. `report` is merge_report.json's content, null in lists and before there is one."""

    id: str
    adapter: str
    adapters: list[MergedAdapterView]
    status: Status
    format: str
    onto: str
    verify: int | None
    verify_tokens: int
    shard_size: int
    compare: bool
    strict: bool
    created: int
    started: int | None
    finished: int | None
    progress: ExportProgressView
    bytes: int | None
    error: ExportFault | None
    report: dict[str, Any] | None


class AdapterExportList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[AdapterExport]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterExportEvent(msgspec.Struct, tag_field="object", tag="adapter.export.event"):
    id: str
    created: int
    level: Level
    message: str


class AdapterExportEvents(msgspec.Struct, tag_field="object", tag="list"):
    """Oldest first, all of them."""

    data: list[AdapterExportEvent]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


class AdapterExportDeleted(msgspec.Struct, tag_field="object", tag="adapter.export.deleted"):
    id: str
    deleted: bool = True


def view(export: Export, report: dict[str, Any] | None = None) -> AdapterExport:
    job, request = export.job, export.job.request
    return AdapterExport(
        id=job.id,
        adapter=job.adapter,
        adapters=[MergedAdapterView(a.name, a.generation, a.weight) for a in job.adapters],
        status=job.status,
        format=request.format,
        onto=request.onto,
        verify=request.verify,
        verify_tokens=request.verify_tokens,
        shard_size=request.shard_size,
        compare=request.compare,
        strict=request.strict,
        created=int(job.created),
        started=None if job.started is None else int(job.started),
        finished=None if job.finished is None else int(job.finished),
        progress=progress_view(export),
        bytes=job.num_bytes,
        error=None if job.error is None else ExportFault(job.error.message, job.error.code, job.error.param),
        report=report,
    )


def progress_view(export: Export) -> ExportProgressView:
    job, progress = export.job, export.progress
    if job.status == "succeeded":
        size = job.num_bytes or 0
        return ExportProgressView("done", size, size, 1.0, 0.0)
    if progress is None or job.status == "queued":
        return ExportProgressView("queued" if not job.ended else job.status, 0, 0, 0.0, None)
    eta = None if job.ended else progress.eta_seconds
    return ExportProgressView(
        progress.phase,
        progress.done,
        progress.total,
        round(progress.fraction, 4),
        None if eta is None else round(eta, 1),
    )


def event_view(event: JobEvent) -> AdapterExportEvent:
    return AdapterExportEvent(event.id, int(event.created), event.level, event.message)
