"""What each exception becomes on the wire: one table, one envelope.

`reply_to` is the only place that turns an exception into a status. Errors that are not in the table are ours,
not the caller's: they answer 500 without their text, which may hold paths or addresses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec
from fastapi.exceptions import RequestValidationError
from msgspec import UNSET, UnsetType
from starlette.exceptions import HTTPException
from starlette.responses import Response

from loramux_adapters.errors import (
    AccessDenied,
    AdapterConflict,
    AdapterUnavailable,
    ContextLengthExceeded,
    EngineError,
    ExportError,
    InvalidAdapter,
    LoramuxError,
    NameTaken,
    Overloaded,
    QueueFull,
    RequestError,
    RequestTimeout,
    StorageFull,
    TrainingError,
    UnknownAdapter,
    UnknownExport,
    UnknownFile,
    UnknownJob,
)
from loramux_server.api.body import BodyTooLarge, HeadersTooLarge, UnsupportedMediaType
from loramux_server.api.idempotency import KeyReused
from loramux_server.api.pace import BodyTimeout
from loramux_server.api.responses_store import UnknownResponse
from loramux_server.api.uploads import CrossOrigin
from loramux_server.keys.limits import RateLimited
from loramux_server.keys.store import UnknownKey


class NotServed(RequestError):
    """A route that clients know from elsewhere."""

    code = "not_found"


class InvalidKey(RequestError):
    """No key, or one that opens nothing."""

    code = "invalid_api_key"


# The most specific class wins. Clients retry 409, unless told not to (FINAL): our conflicts are permanent.
STATUSES: dict[type[LoramuxError], tuple[int, str]] = {
    RequestError: (400, "invalid_request_error"),
    KeyReused: (400, "invalid_request_error"),
    InvalidKey: (401, "invalid_request_error"),
    CrossOrigin: (403, "invalid_request_error"),
    AccessDenied: (403, "invalid_request_error"),
    RateLimited: (429, "rate_limit_error"),
    BodyTimeout: (408, "invalid_request_error"),
    NotServed: (404, "invalid_request_error"),
    UnknownResponse: (404, "invalid_request_error"),
    UnknownKey: (404, "invalid_request_error"),
    HeadersTooLarge: (431, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    UnsupportedMediaType: (415, "invalid_request_error"),
    UnknownAdapter: (404, "invalid_request_error"),
    InvalidAdapter: (400, "invalid_request_error"),
    AdapterConflict: (400, "invalid_request_error"),
    NameTaken: (409, "invalid_request_error"),
    TrainingError: (400, "invalid_request_error"),
    ExportError: (400, "invalid_request_error"),
    UnknownExport: (404, "invalid_request_error"),
    UnknownFile: (404, "invalid_request_error"),
    UnknownJob: (404, "invalid_request_error"),
    AdapterUnavailable: (503, "server_error"),
    EngineError: (503, "server_error"),
    Overloaded: (429, "rate_limit_error"),
    QueueFull: (503, "server_error"),
    RequestTimeout: (504, "server_error"),
    StorageFull: (507, "server_error"),
}
RETRY_AFTER_SECONDS = {429: 1, 503: 5}
# Clients repeat 408 and 5xx by themselves unless told not to: these do not get better by it.
FINAL = (KeyReused, NameTaken, StorageFull, RequestTimeout)

# What a request may fail with after the engine took it; it arrives as a code, not as an exception.
_ENGINE_CODES: dict[str, type[LoramuxError]] = {
    error.code: error
    for error in (
        AdapterUnavailable,
        UnknownAdapter,
        Overloaded,
        RequestError,
        ContextLengthExceeded,
        RequestTimeout,
    )
}


class FaultBody(msgspec.Struct):
    """One thing wrong with an adapter: `where` names the config field, tensor or file."""

    where: str
    problem: str


class ErrorBody(msgspec.Struct):
    """The first four keys are always there; `faults` when an adapter's files were refused."""

    message: str
    type: str
    param: str | None
    code: str | None
    faults: list[FaultBody] | UnsetType = UNSET


class ErrorEnvelope(msgspec.Struct):
    error: ErrorBody


@dataclass(frozen=True)
class ErrorReply:
    status: int
    error: ErrorBody
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorEnvelope(self.error))

    def response(self) -> Response:
        return Response(self.body, self.status, dict(self.headers), media_type="application/json")


def reply_to(error: Exception, request_id: str) -> ErrorReply:
    """The answer to any exception that ends a request."""
    if isinstance(error, HTTPException):
        return _http_reply(error)
    if isinstance(error, RequestValidationError):
        return _validation_reply(error)
    if isinstance(error, LoramuxError):
        for cls in type(error).__mro__:
            if cls in STATUSES:
                return _table_reply(error, *STATUSES[cls])
    message = f"internal error; the server's log has the details under request id {request_id}"
    return ErrorReply(500, ErrorBody(message, "server_error", None, "internal_error"))


def engine_failure(message: str | None, code: str | None) -> LoramuxError:
    """The exception for a sequence that the engine ended with an error."""
    cls = _ENGINE_CODES.get(code or "", EngineError)
    return cls(message or "the engine could not finish this request", code=code)


def unsupported(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="unsupported_parameter")


def _table_reply(error: LoramuxError, status: int, kind: str) -> ErrorReply:
    headers = {}
    if status in RETRY_AFTER_SECONDS:
        hint = getattr(error, "retry_after", None)
        headers["retry-after"] = str(math.ceil(hint) if hint else RETRY_AFTER_SECONDS[status])
    if isinstance(error, InvalidKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, FINAL):
        headers["x-should-retry"] = "false"
    body = ErrorBody(error.message, kind, error.param, error.code)
    if isinstance(error, InvalidAdapter):
        body.faults = [FaultBody(fault.where, fault.problem) for fault in error.faults]
    return ErrorReply(status, body, headers)


def _validation_reply(error: RequestValidationError) -> ErrorReply:
    """A query or path parameter that FastAPI read itself; its own answer would repeat the input."""
    fault = error.errors()[0]
    path = ".".join(str(part) for part in fault["loc"][1:])
    body = ErrorBody(f"{path}: {fault['msg']}", "invalid_request_error", path, "invalid_request")
    return ErrorReply(400, body)


def _http_reply(error: HTTPException) -> ErrorReply:
    phrase = HTTPStatus(error.status_code).phrase.lower()
    messages = {
        404: "no such route; GET /openapi.json lists them",
        405: "this route does not answer that method; the Allow header lists those it does",
    }
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = ErrorBody(messages.get(error.status_code, phrase), kind, None, phrase.replace(" ", "_"))
    return ErrorReply(error.status_code, body, error.headers or {})
