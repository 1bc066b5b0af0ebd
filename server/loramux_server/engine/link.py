"""The front's end of the socket between it and the worker; it outlives workers. No torch."""

from __future__ import annotations

import asyncio
import shutil
import tempfile

import zmq
import zmq.asyncio

from loramux_adapters.errors import EngineError
from loramux_server.engine.messages import COMMAND_ENCODER, EVENT_DECODER, Command, Event

_LAST_WORDS_S = 0.3  # a worker's last message may be read after its end is noticed


class WorkerLink:
    """One socket in a directory that nobody else can read. All methods are for the event loop that called `open`."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="loramux-")  # mode 0700: nobody else reaches the socket
        self.address = f"ipc://{self._directory}/worker"
        self._socket: zmq.asyncio.Socket | None = None

    def open(self) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the client bounds what is sent; a send fails only if no worker is there
        self._socket.bind(self.address)

    async def send(self, command: Command) -> None:
        """Raises EngineError if there is no worker at the other end (its end is noticed in a moment)."""
        assert self._socket is not None
        try:
            await self._socket.send(COMMAND_ENCODER.encode(command), flags=zmq.NOBLOCK)
        except zmq.Again as error:
            raise EngineError("the engine is restarting; try again shortly") from error

    async def next_event(self, exited: asyncio.Task[int]) -> Event | None:
        """The worker's next message; None when it has `exited` and all it said has been read."""
        received = asyncio.create_task(self._receive())
        try:
            await asyncio.wait({exited, received}, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():
                await asyncio.wait({received}, timeout=_LAST_WORDS_S)
            return received.result() if received.done() else None
        finally:
            received.cancel()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _receive(self) -> Event:
        assert self._socket is not None
        event: Event = EVENT_DECODER.decode(await self._socket.recv())
        return event
