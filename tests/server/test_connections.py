"""Clients that hold a connection without using it: slow headers, floods, bodies nobody reads, answers nobody takes.

A client that is merely slow gets what it asked for, on either event loop that a server may have.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import pytest_asyncio
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from loramux_server.connections import BoundedProtocol

HEADERS_S = 0.3
WRITE_S = 0.5
LARGE = 24 * 2**20  # more than the kernel's buffers take
STEADY_BYTES = 16 * 2**10
GET = b"GET /answer HTTP/1.1\r\nhost: x\r\n\r\n"
PATIENCE_S = 60.0


class Quick(BoundedProtocol):
    headers_s = HEADERS_S
    write_s = WRITE_S
    refused_body_s = 0.6
    max_header_bytes = 100_000


class App:
    """What the paths do; `running` are the requests that have not ended."""

    running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            if scope["path"] == "/read":
                while (await receive()).get("more_body"):
                    pass
            elif scope["path"] == "/wait":
                while (await receive())["type"] != "http.disconnect":
                    pass
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == "/much":
                for _ in range(1000):
                    await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            elif scope["path"] == "/large":
                await send({"type": "http.response.body", "body": bytes(LARGE)})
                return
            await send({"type": "http.response.body", "body": b"ok"})
        finally:
            self.running -= 1


@pytest.fixture
def app() -> App:
    return App()


@asynccontextmanager
async def serving_at(app: App, **more: Any) -> AsyncIterator[int]:
    settings = uvicorn.Config(
        app, http=Quick, ws="none", lifespan="off", log_config=None, access_log=False, **more
    )
    server = uvicorn.Server(settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = server.force_exit = True
        await serving


@pytest_asyncio.fixture
async def port(app: App) -> AsyncIterator[int]:
    async with serving_at(app) as port:
        yield port


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def closed_after(reader: asyncio.StreamReader) -> tuple[float, bytes]:
    """Seconds until the server has closed, and what it said."""
    began, said = time.monotonic(), b""
    with suppress(ConnectionResetError):
        said = await asyncio.wait_for(reader.read(), PATIENCE_S)
    return time.monotonic() - began, said


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "half"])
async def test_headers_that_do_not_come(port: int, sent: bytes) -> None:
    async with connected(port) as (reader, writer):
        writer.write(sent)
        seconds, said = await closed_after(reader)
    assert HEADERS_S / 2 < seconds < PATIENCE_S
    assert said == b""


@pytest.mark.parametrize("begins_with", [b"", GET], ids=["first request", "second request"])
async def test_headers_that_come_a_byte_at_a_time(port: int, begins_with: bytes) -> None:
    async with connected(port) as (reader, writer):
        writer.write(begins_with)
        closing = asyncio.create_task(closed_after(reader))
        writer.write(b"GET / HTTP/1.1\r\nx-slow: ")
        while not closing.done():
            writer.write(b"a")
            await asyncio.sleep(0.05)
        seconds, said = await closing
    assert seconds < PATIENCE_S
    assert said.count(b"200 OK") == (1 if begins_with else 0)


async def test_headers_without_end_are_refused(port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n")
        for number in range(12):
            writer.write(b"x-%d: %s\r\n" % (number, b"a" * 10_000))
            await asyncio.sleep(0)
        _, said = await closed_after(reader)
    assert said.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_large"' in said


async def test_a_body_may_take_its_time(port: int) -> None:
    """How slow it may be is asked where it is read."""
    async with connected(port) as (reader, writer):
        writer.write(b"POST /read HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
        for _ in range(10):
            await asyncio.sleep(HEADERS_S / 4)
            writer.write(b"x")
        said = await asyncio.wait_for(reader.readline(), PATIENCE_S)
    assert said == b"HTTP/1.1 200 OK\r\n"


async def test_a_body_that_was_answered_already_is_not_waited_for(port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(b"POST /answer HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert await asyncio.wait_for(reader.readline(), PATIENCE_S) == b"HTTP/1.1 200 OK\r\n"
        closing = asyncio.create_task(closed_after(reader))
        while not closing.done():
            writer.write(b"x" * 100)
            await asyncio.sleep(0.05)
        seconds, _ = await closing
    assert seconds < PATIENCE_S


async def test_an_answer_that_nobody_takes(app: App, port: int) -> None:
    async with connected(port) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + PATIENCE_S
        started = False
        while app.running or not started:
            started = started or app.running > 0
            assert time.monotonic() < deadline, "the request is still there"
            await asyncio.sleep(0.01)


async def large_answer(header: bytes, before_s: float, pause_s: float, steadily: int = 0) -> int:
    """Bytes of it that a client gets who looks away for so long, first and then after every mebibyte.

    Before those mebibytes he takes so many small pieces, `STEADY_BYTES` in 20 ms.
    """
    got = 0
    # No keep-alive: when the answer is complete for uvicorn, nearly all of it is still to be sent.
    async with serving_at(App(), timeout_keep_alive=0) as port, connected(port) as (reader, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        # Else his system would take megabytes for him, and tell ours of it in large steps.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
        writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n")
        await asyncio.sleep(before_s)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        with suppress(ConnectionResetError, asyncio.IncompleteReadError):
            for _ in range(steadily):
                got += len(await asyncio.wait_for(reader.readexactly(STEADY_BYTES), PATIENCE_S))
                await asyncio.sleep(0.02)
            while True:
                got += len(await asyncio.wait_for(reader.readexactly(2**20), PATIENCE_S))
                await asyncio.sleep(pause_s)
    return got


Loop = Callable[[], asyncio.AbstractEventLoop]
# The loop that servers have, and the one without uvloop; a connection that is kept, and one that ends with its answer.
either_way = pytest.mark.parametrize(
    ("loop", "header"),
    [(uvloop.new_event_loop, b""), (asyncio.new_event_loop, b"connection: close\r\n")],
    ids=["uvloop kept", "asyncio closed"],
)


@either_way
def test_a_slow_client_gets_all_of_a_large_answer(loop: Loop, header: bytes) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        began = time.monotonic()
        assert runner.run(large_answer(header, before_s=0, pause_s=WRITE_S / 8)) == LARGE
        assert time.monotonic() - began > 2 * WRITE_S


@either_way
def test_a_steady_client_is_seen_to_take(loop: Loop, header: bytes) -> None:
    """What the system's buffers would take at a time is more than he takes in the time he has."""
    with asyncio.Runner(loop_factory=loop) as runner:
        steadily = 2**20 // STEADY_BYTES * 2
        assert runner.run(large_answer(header, before_s=0, pause_s=0, steadily=steadily)) == LARGE


@either_way
def test_a_large_answer_that_nobody_takes(loop: Loop, header: bytes) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(large_answer(header, before_s=3 * WRITE_S, pause_s=0)) < LARGE


async def test_a_half_closed_connection_is_a_client_that_left(app: App, port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
        while not app.running:
            await asyncio.sleep(0.01)
        writer.write_eof()
        seconds, _ = await closed_after(reader)
    assert seconds < PATIENCE_S
    while app.running:
        await asyncio.sleep(0.01)
