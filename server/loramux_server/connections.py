"""Connections of the HTTP server that nobody can hold for ever: uvicorn's own protocol, with clocks and a bound.

Promises: headers that are not complete in time, or larger than any request needs, end the connection; so does a client that
takes next to nothing of its answer, while one that is merely slow gets all of it, however large. How slow a body may come is
asked where it is read (`api/pace.py`). Clocks are the event loop's, which no change of the date moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 30.0  # from the first byte, or from the connection, to the end of the headers
WRITE_S = 60.0  # after which a client that is sent more than the buffers hold is asked how much of it he took
MIN_RATE = 1024  # bytes a second that he has to take
# Bytes that the system takes from us before the client took those before: unbounded it takes megabytes at a time, and a slow
# client seems to take nothing for minutes.
UNSENT_BYTES = 32 * 1024
REFUSED_BODY_S = 300.0  # in which the rest of a body may come that was answered already
MAX_RAW_HEADER_BYTES = 256 * 1024  # above the bound that is answered in words (`api/middleware.py`)

_TOO_LARGE = (
    b'{"error":{"message":"the request\'s headers are larger than any request needs","type":"invalid_request_error",'
    b'"param":null,"code":"headers_too_large"}}'
)
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_TOO_LARGE), _TOO_LARGE)
)

_Part = Literal["none", "headers", "body", "refused"]


class _Clock:
    """Calls once when it is over, unless it is stopped before."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float) -> None:
        self.stop()
        self._handle = asyncio.get_running_loop().call_later(seconds, self._over)

    def _over(self) -> None:
        self._handle = None
        self._then()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    headers_s = HEADERS_S
    write_s = WRITE_S
    refused_body_s = REFUSED_BODY_S
    max_header_bytes = MAX_RAW_HEADER_BYTES

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        taking = transport.get_extra_info("socket")
        if taking is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):  # not a TCP socket: a path in the file system, say
                taking.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._part: _Part = "none"  # of a request, that is being read
        self._header_bytes = 0
        self._reading = _Clock(transport.abort)
        self._writing = _Clock(self._look_at_writing)
        self._unsent = 0  # when the clock was started
        self._reading.start(self.headers_s)

    def data_received(self, data: bytes) -> None:
        if self._part == "refused":
            return
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._part == "headers":
            self._header_bytes += len(data)
            if self._header_bytes > self.max_header_bytes:
                self._refuse()
                return
        if self.cycle is not None and not self.cycle.response_complete:
            self._reading.stop()  # somebody reads, at a pace of his own
        elif not self._reading.runs:
            self._reading.start(self.refused_body_s if self._part == "body" else self.headers_s)

    def _refuse(self) -> None:
        """What is still coming is dropped for a while: to close on it at once would take the answer back."""
        self._part = "refused"
        self.transport.write(_REFUSAL)
        self.transport.write_eof()
        self._reading.start(self.headers_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._reading.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._part = "headers"
        self._header_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._part = "body"
        self._reading.stop()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._part = "none"
        self._reading.stop()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():  # then what is left has to be taken, too
            self._writing.stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Closes after what was answered has been sent, for which the client has the same time as ever."""
        super().timeout_keep_alive_handler()
        self._watch_rest()

    def _watch_rest(self) -> None:
        """Less than makes the server pause is watched only when the connection ends with it."""
        if self.transport.get_write_buffer_size() and not self._writing.runs:
            self._watch_writing()

    def _watch_writing(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._writing.start(self.write_s)

    def _look_at_writing(self) -> None:
        """Nothing is written while the clock runs: uvicorn waits, or the answer is complete."""
        left = self.transport.get_write_buffer_size()
        if left and self._unsent - left < MIN_RATE * self.write_s:
            self.transport.abort()
        elif left:
            self._watch_writing()
