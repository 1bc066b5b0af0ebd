"""The port from the first moment to the last: 503 while the base is loading, the application, and a drain at the end.

Promises: from its start on every request is answered, `GET /health` with 200; `drain` refuses what is new with 503 and gives
what was accepted one period of grace, and ends at once when it is asked to a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from typing import Protocol

import msgspec
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux_adapters.errors import EngineError
from loramux_server.api.middleware import Envelope
from loramux_server.api.wire import Health
from loramux_server.connections import BoundedProtocol
from loramux_server.metrics import Metrics
from loramux_server.tracing import Tracing

logger = logging.getLogger("loramux")

FLUSH_S = 1.0  # for the last bytes of answers


class Engine(Protocol):
    """What of the worker's client a drain needs."""

    @property
    def in_flight(self) -> int: ...

    def drain(self) -> None: ...

    async def wait_idle(self, timeout: float) -> bool: ...


class Exports(Protocol):
    async def close(self) -> None: ...


class Jobs(Protocol):
    async def stop(self, grace: float) -> None: ...


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class FrontDoor:
    """One listening socket and what answers behind it. All methods are for one event loop."""

    def __init__(self, listener: socket.socket, metrics: Metrics, tracing: Tracing | None = None) -> None:
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._listener = listener
        self._app: ASGIApp = Envelope(_starting, metrics, tracing)
        settings = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http=BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            server_header=False,
        )
        self._server = _Server(settings)
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen. The answers are 503 until there is an application."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))

    def open(self, app: ASGIApp) -> None:
        """From the next request on."""
        self._app = app

    async def close(self, timeout: float = FLUSH_S, hurry: asyncio.Task[bool] | None = None) -> None:
        """Stop listening; answers under way get up to `timeout` seconds, or until `hurry` is done."""
        if self._serving is None:
            return
        self._server.should_exit = True
        urgent = {self._serving} if hurry is None else {self._serving, hurry}
        await asyncio.wait(urgent, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._server.force_exit = True
        serving, self._serving = self._serving, None
        await serving

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def drain(
    door: FrontDoor, engine: Engine, exports: Exports, jobs: Jobs, *, grace: float, again: asyncio.Event
) -> None:
    """Accept nothing new, and finish what was accepted in `grace` seconds; at once when `again` is set."""
    logger.info("draining: %d requests in flight, at most %g s", engine.in_flight, grace)
    engine.drain()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    hurry = asyncio.create_task(again.wait())
    done = [
        asyncio.create_task(exports.close()),
        asyncio.create_task(jobs.stop(grace)),
        asyncio.create_task(engine.wait_idle(grace)),
    ]
    try:
        for task in done:
            await asyncio.wait({task, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if again.is_set():
            logger.warning("stopping at once: %d requests are cut off", engine.in_flight)
        # What still runs ends with an error event when the worker is stopped: until then the door stays open.
        if not engine.in_flight:
            await door.close(max(FLUSH_S, deadline - loop.time()), hurry)
    finally:
        for task in (*done, hurry):
            task.cancel()
        results = await asyncio.gather(*done, hurry, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            logger.error("draining: %s", result, exc_info=result)


async def _starting(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] != "/health":
        raise EngineError("the server is starting: the base model is loading; try again shortly")
    answer = Response(msgspec.json.encode(Health()), media_type="application/json")
    await answer(scope, receive, send)
