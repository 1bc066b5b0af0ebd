"""The port from start to end: 503 before there is an application, a drain that loses nothing, and one that is cut short."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from starlette.types import Receive, Scope, Send

from loramux_server.front_door import FrontDoor, drain
from loramux_server.metrics import Metrics


class Work:
    """Requests, exports and a job, as far as a drain asks for them."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.draining = False
        self.saved = False
        self.exports_closed = False
        self.finish = asyncio.Event()  # what runs
        self.fault: Exception | None = None

    def drain(self) -> None:
        self.draining = True

    async def wait_idle(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(self.finish.wait(), timeout)
        except TimeoutError:
            return False
        self.in_flight = 0
        return True

    async def close(self) -> None:
        self.exports_closed = True
        if self.fault:
            raise self.fault

    async def stop(self, grace: float) -> None:
        await asyncio.sleep(0.05)
        self.saved = True


@pytest.fixture
def work() -> Work:
    return Work()


@pytest_asyncio.fixture
async def door() -> AsyncIterator[FrontDoor]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        made = FrontDoor(listener, Metrics(max_loras=1))
        made.start()
        yield made
        await made.close(0.1)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers after the seconds that the path names."""
    await asyncio.sleep(float(scope["path"][1:]))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_while_the_base_loads_everything_is_answered(door: FrontDoor) -> None:
    async with httpx.AsyncClient(base_url=door.url) as client:
        assert (await client.get("/health")).json() == {"status": "live"}
        for path in ("/ready", "/v1/models", "/metrics"):
            early = await client.get(path)
            assert (early.status_code, early.headers["retry-after"]) == (503, "5")
            assert "the base model is loading" in early.json()["error"]["message"]
            assert "x-request-id" in early.headers
        door.open(app)
        assert (await client.get("/0")).text == "ok"


async def test_what_was_accepted_is_finished(door: FrontDoor, work: Work) -> None:
    door.open(app)
    work.in_flight = 1
    async with httpx.AsyncClient(base_url=door.url) as client:
        upload = asyncio.create_task(client.get("/0.6"))  # nothing the engine knows of
        draining = asyncio.create_task(drain(door, work, work, work, grace=20, again=asyncio.Event()))
        await asyncio.sleep(0.2)
        assert work.draining
        assert not draining.done()
        assert (await client.get("/0")).text == "ok", "the door was closed before the work was done"
        work.finish.set()
        assert (await upload).text == "ok"
        await asyncio.wait_for(draining, 60)
    assert work.saved
    assert work.exports_closed
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2])))


@pytest.mark.parametrize("second_signal", [True, False])
async def test_a_second_signal_or_the_end_of_the_grace_ends_it(
    door: FrontDoor, work: Work, second_signal: bool
) -> None:
    door.open(app)
    work.in_flight = 1
    again = asyncio.Event()
    grace = 600 if second_signal else 0.3
    draining = asyncio.create_task(drain(door, work, work, work, grace=grace, again=again))
    await asyncio.sleep(0.1)
    assert not draining.done()
    if second_signal:
        again.set()
    await asyncio.wait_for(draining, 60)
    async with httpx.AsyncClient(
        base_url=door.url
    ) as client:  # open, until the streams have their error event
        assert (await client.get("/0")).text == "ok"


async def test_a_fault_on_the_way_out_is_logged_and_stops_nothing(
    door: FrontDoor, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    work.fault = OSError("the disk is gone")
    work.finish.set()
    await asyncio.wait_for(drain(door, work, work, work, grace=5, again=asyncio.Event()), 60)
    assert work.saved
    assert "the disk is gone" in caplog.text
