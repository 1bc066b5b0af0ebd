"""The worker as the front's event loop sees it: start it, stream from it, restart it when it dies.

Promises: every accepted request ends, with tokens or with an error output, whatever happens to the worker; a worker that
dies after it once was ready is started again with the same options. No HTTP and no torch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from uuid import uuid4

import msgspec

from loramux_adapters.errors import BaseModelError, EngineError, QueueFull, RequestTimeout
from loramux_adapters.probe import Probe
from loramux_adapters.verify_report import VerifyReport
from loramux_server.engine.interface import EngineState
from loramux_server.engine.link import WorkerLink
from loramux_server.engine.messages import (
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
    StartTraining,
    StepOutput,
    StopTraining,
    TokenOutput,
    TrainingEnded,
    TrainingEvent,
    Verified,
    VerifyAdapter,
)
from loramux_server.engine.options import WorkerOptions
from loramux_server.engine.pending import Pending
from loramux_server.engine.process import start_worker, stop_worker
from loramux_server.engine.restarts import Restarts
from loramux_server.engine.watch import Watch, end_hanging

logger = logging.getLogger(__name__)


class WorkerClient:
    """One worker process behind one socket. All methods are for the event loop that called `start`."""

    def __init__(
        self,
        options: WorkerOptions,
        *,
        max_queued: int = 1024,
        request_timeout: float | None = None,
        hang_timeout: float = 300.0,
    ) -> None:
        """`options.address` and `options.parent_pid` are filled in here. Timeouts are in seconds."""
        self._link = WorkerLink()
        self._options = msgspec.structs.replace(options, address=self._link.address, parent_pid=os.getpid())
        self._max_queued = max_queued
        self._request_timeout = request_timeout
        self._watch = Watch(hang_timeout)
        self._state: EngineState = "starting"
        self._ready: Ready | None = None
        self._stats: EngineStats | None = None
        self._draining = False
        self._failure = ""
        self._restarts = Restarts()
        self._pending = Pending()
        self._pinned: list[AdapterRef] = []
        self._listeners: list[Callable[[StepOutput], None]] = []
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

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
    def stall(self) -> str | None:
        return self._watch.stall

    @property
    def stats(self) -> EngineStats | None:
        return self._stats

    @property
    def in_flight(self) -> int:
        return len(self._pending.streams)

    @property
    def restarts(self) -> int:
        return self._restarts.total

    @property
    def worker_pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def add_listener(self, listener: Callable[[StepOutput], None]) -> None:
        self._listeners.append(listener)

    async def pin(self, adapters: Sequence[AdapterRef]) -> None:
        self._pinned = list(adapters)
        await self._tell(PinAdapters(self._pinned))  # the next worker is told when it is ready

    def check_room(self) -> None:
        if self.in_flight >= self._max_queued:
            raise QueueFull(f"{self._max_queued} requests are being served already; try again shortly")

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams, adapter: AdapterRef | None
    ) -> AsyncGenerator[TokenOutput, None]:
        if self._state != "ready":
            raise EngineError(f"the engine is {self._state}; try again shortly")
        self.check_room()
        output: TokenOutput | None = None
        with self._pending.stream(request_id, self._request_timeout) as outputs:
            try:
                await self._link.send(AddRequest(request_id, prompt, params, adapter))
                while output is None or output.finish is None:
                    output = await outputs.get()
                    yield output
            finally:
                if output is None or output.finish is None or output.error_code == RequestTimeout.code:
                    await self._tell(AbortRequest(request_id))

    async def verify(self, adapter: AdapterRef, probe: Probe) -> VerifyReport:
        if self._state not in ("ready", "draining"):
            raise EngineError(f"the engine is {self._state}; try again shortly")
        verification_id = uuid4().hex
        answer = self._pending.verifications[verification_id] = asyncio.Future[Verified]()
        try:
            await self._link.send(VerifyAdapter(verification_id, adapter, probe))
            verified = await answer
        finally:
            del self._pending.verifications[verification_id]
            if answer.cancelled():
                await self._tell(AbortRequest(verification_id))
        if verified.report is None:
            raise EngineError(f"the adapter could not be verified: {verified.error}")
        return verified.report

    async def train(self, command: StartTraining) -> AsyncGenerator[TrainingEvent, None]:
        if self._state != "ready":
            raise EngineError(f"the engine is {self._state}; try again shortly")
        if self._pending.training:
            raise EngineError("another job is under training")
        events = self._pending.train(command.id)
        ended = False
        try:
            await self._link.send(command)
            while not ended:
                event = await events.get()
                if isinstance(event, EngineError):
                    ended = True
                    raise event
                ended = isinstance(event, TrainingEnded)
                yield event
        finally:
            del self._pending.training[command.id]
            if not ended:
                await self._tell(StopTraining(command.id, save=False))

    async def stop_training(self, job_id: str, *, save: bool) -> None:
        await self._tell(StopTraining(job_id, save))

    # --- life and death ----------------------------------------------------------------------------------------------

    async def start(self) -> Ready:
        """Start the worker and wait until the base is resident. Raises BaseModelError if it cannot be."""
        self._link.open()
        ready = await self._launch()
        watching = self._watch.run(self._pending.owed, self._end_hanging)
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(watching)]
        return ready

    def drain(self) -> None:
        """Accept nothing new, after a restart neither; what runs goes on."""
        self._draining = True
        self._state = "draining"

    async def wait_idle(self, timeout: float) -> bool:
        """True once no request is in flight."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._pending.streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return not self._pending.streams

    async def close(self) -> None:
        """Stop the worker, at once if it is still loading; requests in flight end with an error output."""
        serving = self._state in ("ready", "draining")
        self._state = "dead"
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("watching the worker failed: %s", result, exc_info=result)
        self._pending.fail("the server is shutting down")
        if self._process is not None:
            farewell = partial(self._link.send, Shutdown())
            await stop_worker(self._process, farewell if serving else None)
        self._link.close()

    async def _launch(self) -> Ready:
        self._process = await start_worker(self._options)
        exited = asyncio.create_task(self._process.wait())
        try:
            while True:
                event = await self._link.next_event(exited)
                if event is None:
                    raise BaseModelError(f"the worker ended while loading, with exit code {exited.result()}")
                if isinstance(event, Fatal):
                    raise BaseModelError(event.message)
                if isinstance(event, Ready):
                    self._ready = event
                    self._stats = None
                    self._state = "draining" if self._draining else "ready"
                    if self._pinned:
                        await self._link.send(PinAdapters(self._pinned))
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
            self._pending.fail(f"the engine failed ({reason}) and is restarting")
            await self._relaunch()

    async def _relaunch(self) -> None:
        while True:
            await asyncio.sleep(self._restarts.delay())
            self._restarts.count()
            self._failure = ""
            try:
                await self._launch()
                return
            except (BaseModelError, OSError) as error:
                logger.error("the worker did not come back: %s", error)

    async def _serve(self) -> None:
        assert self._process is not None
        exited = asyncio.create_task(self._process.wait())
        while (event := await self._link.next_event(exited)) is not None:
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        self._watch.heard()
        if isinstance(event, StepOutput):
            self._stats = event.stats
            self._pending.tokens(event)
            for listener in self._listeners:
                listener(event)
        elif isinstance(event, Verified):
            self._pending.verified(event)
        elif isinstance(event, TrainingEvent):
            self._pending.trained(event)
        elif isinstance(event, Fatal):
            self._failure = event.message

    async def _end_hanging(self, reason: str) -> None:
        """The supervisor sees the end of the worker, and starts another."""
        if self._process is not None and self._state in ("ready", "draining"):
            logger.error("%s; its stacks follow, then it is killed", reason)
            self._failure = reason
            await end_hanging(self._process)

    async def _tell(self, command: Command) -> None:
        """Send what means nothing to a worker that is gone."""
        if self._state in ("ready", "draining"):
            with contextlib.suppress(EngineError):
                await self._link.send(command)
