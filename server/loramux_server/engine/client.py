"""The worker as the front's event loop sees it: start it, stream from it, restart it when it dies.

Promises: every accepted request ends, with tokens or with an error output, whatever happens to the worker; a worker that
dies after it once was ready is started again with the same options. No HTTP and no torch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from uuid import uuid4

import msgspec
import zmq
import zmq.asyncio

from loramux_adapters.errors import BaseModelError, EngineError, Overloaded
from loramux_adapters.probe import Probe
from loramux_adapters.verify_report import VerifyReport
from loramux_server.engine.interface import EngineState
from loramux_server.engine.messages import (
    COMMAND_ENCODER,
    EVENT_DECODER,
    AbortRequest,
    AdapterRef,
    AddRequest,
    Command,
    EngineStats,
    Event,
    Fatal,
    PinAdapters,
    Ready,
    SamplingParams,
    Shutdown,
    StepOutput,
    TokenOutput,
    Verified,
    VerifyAdapter,
)
from loramux_server.engine.options import WorkerOptions

logger = logging.getLogger(__name__)

_RESTART_DELAY_S = (0.0, 1.0, 5.0, 15.0)  # the last one repeats
_STOP_WAIT_S = 10.0
_LAST_WORDS_S = 0.3  # a worker's last message may be read after its end is noticed


class WorkerClient:
    """One worker process behind one socket. All methods are for the event loop that called `start`."""

    def __init__(self, options: WorkerOptions, *, max_queued: int = 1024) -> None:
        """`options.address` and `options.parent_pid` are filled in here."""
        self._directory = tempfile.mkdtemp(prefix="loramux-")  # mode 0700: nobody else reaches the socket
        address = f"ipc://{self._directory}/worker"
        self._options = msgspec.structs.replace(options, address=address, parent_pid=os.getpid())
        self._max_queued = max_queued
        self._state: EngineState = "starting"
        self._ready: Ready | None = None
        self._stats: EngineStats | None = None
        self._draining = False
        self._failure = ""
        self._restarts = 0
        self._streams: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._verifications: dict[str, asyncio.Future[Verified]] = {}
        self._pinned: list[AdapterRef] = []
        self._listeners: list[Callable[[StepOutput], None]] = []
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    # --- what routes use ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def ready(self) -> Ready:
        if self._ready is None:
            raise EngineError("the base model is still loading")
        return self._ready

    @property
    def stats(self) -> EngineStats | None:
        return self._stats

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    @property
    def restarts(self) -> int:
        return self._restarts

    @property
    def worker_pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def add_listener(self, listener: Callable[[StepOutput], None]) -> None:
        self._listeners.append(listener)

    async def pin(self, adapters: Sequence[AdapterRef]) -> None:
        self._pinned = list(adapters)
        if self._state in ("ready", "draining"):
            with contextlib.suppress(EngineError):  # the next worker is told when it is ready
                await self._send(PinAdapters(self._pinned))

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams, adapter: AdapterRef | None
    ) -> AsyncGenerator[TokenOutput, None]:
        if self._state != "ready":
            raise EngineError(f"the engine is {self._state}; try again shortly")
        if len(self._streams) >= self._max_queued:
            raise Overloaded(f"{self._max_queued} requests are being served already; try again shortly")
        outputs: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._streams[request_id] = outputs
        finished = False
        try:
            await self._send(AddRequest(request_id, prompt, params, adapter))
            while not finished:
                output = await outputs.get()
                finished = output.finish is not None
                yield output
        finally:
            self._streams.pop(request_id, None)
            if not finished and self._state in ("ready", "draining"):
                with contextlib.suppress(EngineError):
                    await self._send(AbortRequest(request_id))

    async def verify(self, adapter: AdapterRef, probe: Probe) -> VerifyReport:
        if self._state not in ("ready", "draining"):
            raise EngineError(f"the engine is {self._state}; try again shortly")
        answer = self._verifications[verification_id := uuid4().hex] = asyncio.Future[Verified]()
        try:
            await self._send(VerifyAdapter(verification_id, adapter, probe))
            verified = await answer
        finally:
            del self._verifications[verification_id]
            if answer.cancelled() and self._state in ("ready", "draining"):
                with contextlib.suppress(EngineError):
                    await self._send(AbortRequest(verification_id))
        if verified.report is None:
            raise EngineError(f"the adapter could not be verified: {verified.error}")
        return verified.report

    # --- life and death ----------------------------------------------------------------------------------------------

    async def start(self) -> Ready:
        """Start the worker and wait until the base is resident. Raises BaseModelError if it cannot be."""
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)  # `max_queued` is the bound; a send fails only if no worker is there
        self._socket.bind(self._options.address)
        ready = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise())
        return ready

    def drain(self) -> None:
        """Accept nothing new, after a restart neither; what runs goes on."""
        self._draining = True
        self._state = "draining"

    async def wait_idle(self, timeout: float) -> bool:
        """True once no request is in flight."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return not self._streams

    async def close(self) -> None:
        """Stop the worker, at once if it is still loading; requests in flight end with an error output."""
        serving = self._state in ("ready", "draining")
        self._state = "dead"
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_all("the server is shutting down")
        process = self._process
        if process is not None and process.returncode is None:
            if serving:
                with contextlib.suppress(EngineError, TimeoutError):
                    await self._send(Shutdown())
                    await asyncio.wait_for(process.wait(), _STOP_WAIT_S)
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._socket is not None:
            self._socket.close(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _launch(self) -> Ready:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loramux_server.engine.worker", stdin=asyncio.subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._options))
        self._process.stdin.close()
        exited = asyncio.create_task(self._process.wait())
        try:
            while True:
                event = await self._next_event(exited)
                if event is None:
                    raise BaseModelError(f"the worker ended while loading, with exit code {exited.result()}")
                if isinstance(event, Fatal):
                    raise BaseModelError(event.message)
                if isinstance(event, Ready):
                    self._ready = event
                    self._stats = None
                    self._state = "draining" if self._draining else "ready"
                    if self._pinned:
                        await self._send(PinAdapters(self._pinned))
                    return event
        finally:
            exited.cancel()

    async def _supervise(self) -> None:
        """Read events for as long as the worker lives; when it dies, fail what ran and start another."""
        while True:
            await self._serve()
            if self._state == "dead":
                return
            self._state = "restarting"
            reason = self._failure or "the worker ended unexpectedly"
            logger.error("%s; starting it again", reason)
            self._fail_all(f"the engine failed ({reason}) and is restarting")
            await self._relaunch()

    async def _relaunch(self) -> None:
        while True:
            await asyncio.sleep(_RESTART_DELAY_S[min(self._restarts, len(_RESTART_DELAY_S) - 1)])
            self._restarts += 1
            self._failure = ""
            try:
                await self._launch()
                return
            except (BaseModelError, OSError) as error:
                logger.error("the worker did not come back: %s", error)

    async def _serve(self) -> None:
        assert self._process is not None
        exited = asyncio.create_task(self._process.wait())
        while (event := await self._next_event(exited)) is not None:
            if isinstance(event, StepOutput):
                self._dispatch(event)
            elif isinstance(event, Verified):
                self._answer(event)
            elif isinstance(event, Fatal):
                self._failure = event.message

    def _dispatch(self, step: StepOutput) -> None:
        self._stats = step.stats
        for output in step.outputs:
            stream = self._streams.get(output.id)
            if stream is not None:
                stream.put_nowait(output)
        for listener in self._listeners:
            listener(step)

    def _fail_all(self, message: str) -> None:
        for request_id, stream in self._streams.items():
            output = TokenOutput(request_id, [], "error", error=message, error_code=EngineError.code)
            stream.put_nowait(output)
        for verification_id in self._verifications:
            self._answer(Verified(verification_id, error=message))

    def _answer(self, verified: Verified) -> None:
        waiting = self._verifications.get(verified.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(verified)

    async def _next_event(self, exited: asyncio.Task[int]) -> Event | None:
        """The worker's next message; None when it has ended and all it said has been read."""
        received = asyncio.create_task(self._receive())
        try:
            await asyncio.wait({exited, received}, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():
                await asyncio.wait({received}, timeout=_LAST_WORDS_S)
            return received.result() if received.done() else None
        finally:
            received.cancel()

    async def _receive(self) -> Event:
        assert self._socket is not None
        event: Event = EVENT_DECODER.decode(await self._socket.recv())
        return event

    async def _send(self, command: Command) -> None:
        """Raises EngineError if there is no worker at the other end (its end is noticed in a moment)."""
        assert self._socket is not None
        try:
            await self._socket.send(COMMAND_ENCODER.encode(command), flags=zmq.NOBLOCK)
        except zmq.Again as error:
            raise EngineError("the engine is restarting; try again shortly") from error
