"""Server-sent events, and leaving when the client leaves.

Promises: the first event exists before the status line is sent, so a request that never starts answers with a
proper status; the generator of events and everything held for it are closed as soon as the client
disconnects, also while no event is due. Errors after the start are the middleware's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


def named_event(name: str, payload: bytes) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(payload)


def encode_event(payload: msgspec.Struct) -> bytes:
    return event(msgspec.json.encode(payload))


class EventStream(Response):
    """A response whose body is a generator of events. Make it with `open`."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], held: ExitStack, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._held = held

    @classmethod
    async def open(
        cls,
        receive: Receive,
        events: AsyncGenerator[bytes, None],
        held: ExitStack,
        headers: Mapping[str, str],
    ) -> EventStream:
        """Wait for the first event. From here on `held` belongs to the stream."""
        with ExitStack() as guard:
            guard.push(held)
            try:
                first = await unless_disconnected(receive, _next(events))
            except BaseException:
                await events.aclose()
                raise
            guard.pop_all()
        return cls(first, events, held, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            async with aclosing(self._rest):
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                await unless_disconnected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for item in self._rest:
            await send({"type": "http.response.body", "body": item, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves (then ClientDisconnect is raised).

    To be used once the request's body was read: what `receive` gives is dropped.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def send_pieces(pieces: Iterator[bytes], send: Send) -> None:
    """A body from an iterator that reads the disk: on a thread, which is out of it when this ends."""
    while True:
        reading = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
        try:
            piece = await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait((reading,))
            raise
        if piece is None:
            break
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
