"""The outermost layer of every request: its id, its headers, and where exceptions become answers.

Plain ASGI, because a stream must pass through untouched. Promises: every response has x-request-id; an
exception before the response started becomes OpenAI's envelope, one after it becomes an error event if the
response is an event stream; only faults of our own are logged with a traceback. When a request has ended it is
counted, logged in one line and, if there is tracing, traced.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux_server.api.body import HeadersTooLarge
from loramux_server.api.errors import ErrorReply, reply_to
from loramux_server.api.stream import event
from loramux_server.logs import log_access
from loramux_server.metrics import Metrics
from loramux_server.observed import UNMATCHED, ObservedRequest, observing
from loramux_server.tracing import Tracing

_log = logging.getLogger(__name__)
MAX_HEADER_BYTES = 64 * 1024
# In the scope of a request: how its stream says that it failed, where that is not OpenAI's common way.
FAILURE_EVENT = "loramux.failure_event"
# In the scope of a request: headers that its answer gets, also when it is an error.
EXTRA_HEADERS = "loramux.extra_headers"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Envelope:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = ObservedRequest(_request_id(scope), scope["method"])
        self._metrics.http.began()
        with observing(request):
            try:
                await self._answer(request, scope, receive, send)
            finally:
                self._observe(request, scope)

    def _observe(self, request: ObservedRequest, scope: Scope) -> None:
        request.ended = time.perf_counter()
        request.route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.http.ended(request)
        log_access(request)
        if self._tracing is not None:
            self._tracing.record(request, _trace_headers(scope))

    async def _answer(self, request: ObservedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(request, scope, receive, send)
        try:
            _check_headers(scope)
            await self._app(scope, receive, reply.send)
        except ClientDisconnect:
            _log.debug("request %s: the client left", reply.request_id)
        # The last resort of the whole application: whatever went wrong, the caller gets the envelope.
        except Exception as error:  # noqa: BLE001
            answer = reply_to(error, reply.request_id)
            request.error_code = answer.error.code or "other"
            request.failed = answer.status >= 500
            self._metrics.request_failed(request.error_code)
            if answer.status == 500:
                _log.exception("request %s failed", reply.request_id)
            elif answer.status > 500:
                _log.warning("request %s: %s", reply.request_id, answer.error.message)
            await reply.end_with(answer)


class _Reply:
    """What was sent so far."""

    def __init__(self, request: ObservedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        self._request = request
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = False
        self._is_stream = False
        self.request_id = request.id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = MutableHeaders(scope=message)
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(round(self._request.seconds * 1000))
            self._request.status = message["status"]
            self._request.generation = headers.get("x-adapter-generation")
            headers["openai-version"] = "2020-10-01"
            headers.update(self._scope.get(EXTRA_HEADERS, {}))
        await self._send(message)

    async def end_with(self, answer: ErrorReply) -> None:
        if not self._started:
            await answer.response()(self._scope, self._receive, self.send)
            return
        # A broken JSON body cannot be mended: leaving it unfinished makes the server cut the connection.
        if self._is_stream:
            told: Callable[[ErrorReply], bytes] = self._scope.get(FAILURE_EVENT, _error_event)
            await self._send({"type": "http.response.body", "body": told(answer), "more_body": True})
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _error_event(answer: ErrorReply) -> bytes:
    return event(answer.body)


def _check_headers(scope: Scope) -> None:
    """The parser of the HTTP server has no bound of its own."""
    size = len(scope.get("query_string", b"")) + sum(
        len(name) + len(value) for name, value in scope["headers"]
    )
    if size > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"the request's headers and query are larger than {MAX_HEADER_BYTES} bytes")


def _trace_headers(scope: Scope) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in (b"traceparent", b"tracestate")
    }


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(given := value.decode("latin-1")):
            return str(given)
    return f"req_{uuid4().hex}"
