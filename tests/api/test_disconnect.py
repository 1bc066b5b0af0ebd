"""A client that leaves is noticed at once: the engine's request is closed, the adapter's lease given back."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import Message

from loramux_server.engine.messages import TokenOutput
from tests.api.conftest import Call, Stand


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def post(url: str, path: str, **body: Any) -> socket.socket:
    """A request on a raw socket, whose answer is not read yet."""
    address = urlsplit(url)
    raw = json.dumps(
        {"model": "pirate", "prompt": "hi", "messages": [{"role": "user", "content": "x"}]} | body
    )
    sock = socket.create_connection((address.hostname, address.port))
    head = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(raw)}"]
    sock.sendall("\r\n".join([f"POST {path} HTTP/1.1", *head, "", raw]).encode())
    return sock


def everything_is_closed(stand: Stand, calls: int) -> bool:
    made = stand.engine.calls
    return len(made) == calls and all(call.closed_early for call in made) and not stand.adapters.leased


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token(
    stand: Stand, server_url: str, path: str, n: int, stream: bool
) -> None:
    stand.engine.delay = 60
    with post(server_url, path, stream=stream, n=n):
        until(lambda: len(stand.engine.calls) == n)
        assert stand.adapters.leased == ["a1b2c3d4e5f60718"]
    until(lambda: everything_is_closed(stand, n))


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_between_two_tokens(stand: Stand, server_url: str, n: int) -> None:
    stand.engine.script = first_token_then_silence
    with post(server_url, "/v1/completions", stream=True, n=n) as sock:
        assert b"200 OK" in sock.recv(100)
        until(lambda: [call.outputs for call in stand.engine.calls] == [1] * n)
        assert stand.adapters.leased == ["a1b2c3d4e5f60718"]
    until(lambda: everything_is_closed(stand, n))


def first_token_then_silence(call: Call) -> list[TokenOutput | Exception | float]:
    return [TokenOutput(call.request_id, [40]), 60.0]


def endless(call: Call) -> Iterator[TokenOutput]:
    while True:
        yield TokenOutput(call.request_id, [40] * 50)


def test_a_reader_that_stalls_holds_only_itself(stand: Stand, server_url: str) -> None:
    stand.engine.script = endless
    with post(server_url, "/v1/completions", stream=True) as stalled:
        stalled.recv(100)
        last = -1
        while stand.engine.calls[0].outputs != last:  # until the socket's buffers are full
            last = stand.engine.calls[0].outputs
            time.sleep(0.2)
        with post(server_url, "/v1/completions", stream=True) as other:
            assert b"200 OK" in other.recv(100)
    until(lambda: everything_is_closed(stand, 2))


async def test_leaving_while_sending_is_noticed_by_any_server(stand: Stand) -> None:
    """Without uvicorn: `send` blocks, `receive` says that the client left."""
    stand.engine.script = first_token_then_silence
    blocked, left = asyncio.Event(), asyncio.Event()
    body = json.dumps({"model": "pirate", "prompt": "hi", "stream": True}).encode()
    asked = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            blocked.set()
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    running = asyncio.create_task(stand.app(scope, receive, send))
    await asyncio.wait_for(blocked.wait(), 60)
    left.set()
    await asyncio.wait_for(running, 60)
    assert everything_is_closed(stand, 1)
