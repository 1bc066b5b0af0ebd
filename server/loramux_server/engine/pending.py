"""What the front waits for from one worker, by id. Promises: whatever happens to the worker, each of it ends.

No HTTP, no torch, no socket: messages in, queues and futures out, on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from loramux_adapters.errors import EngineError, RequestTimeout
from loramux_server.engine.messages import (
    StepOutput,
    TokenOutput,
    TrainingEnded,
    TrainingEvent,
    Verified,
)


class Pending:
    """Streams of requests, answers to verifications, and events of training jobs."""

    def __init__(self) -> None:
        self.streams: dict[str, asyncio.Queue[TokenOutput]] = {}
        self.verifications: dict[str, asyncio.Future[Verified]] = {}
        self.training: dict[str, asyncio.Queue[TrainingEvent | EngineError]] = {}
        self._owed: set[str] = set()  # streams and jobs of which the worker has not said the last

    @contextmanager
    def stream(self, request_id: str, timeout: float | None) -> Iterator[asyncio.Queue[TokenOutput]]:
        """A request's outputs; after `timeout` seconds an error is the last of them."""
        outputs: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self.streams[request_id] = outputs
        self._owed.add(request_id)
        expiry = None
        if timeout is not None:
            message = f"the answer was not complete after {timeout:g} seconds, the server's --request-timeout"
            late = TokenOutput(request_id, [], "error", error=message, error_code=RequestTimeout.code)
            expiry = asyncio.get_running_loop().call_later(timeout, outputs.put_nowait, late)
        try:
            yield outputs
        finally:
            if expiry is not None:
                expiry.cancel()
            self.streams.pop(request_id, None)
            self._owed.discard(request_id)

    def train(self, job_id: str) -> asyncio.Queue[TrainingEvent | EngineError]:
        """A job's events; the caller removes it from `training`."""
        self.training[job_id] = asyncio.Queue()
        self._owed.add(job_id)
        return self.training[job_id]

    def owed(self) -> int:
        """How much the worker has still to answer. An answer that a slow client has not read is not among it."""
        return len(self._owed) + sum(not answer.done() for answer in self.verifications.values())

    def tokens(self, step: StepOutput) -> None:
        for output in step.outputs:
            stream = self.streams.get(output.id)
            if stream is not None:
                stream.put_nowait(output)
            if output.finish is not None:
                self._owed.discard(output.id)

    def verified(self, answer: Verified) -> None:
        waiting = self.verifications.get(answer.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def trained(self, event: TrainingEvent) -> None:
        events = self.training.get(event.id)
        if events is not None:
            events.put_nowait(event)
        if isinstance(event, TrainingEnded):
            self._owed.discard(event.id)

    def fail(self, message: str) -> None:
        """The worker is gone, and with it whatever it had under way."""
        self._owed.clear()
        for request_id, stream in self.streams.items():
            output = TokenOutput(request_id, [], "error", error=message, error_code=EngineError.code)
            stream.put_nowait(output)
        for verification_id in self.verifications:
            self.verified(Verified(verification_id, error=message))
        for events in self.training.values():
            events.put_nowait(EngineError(message))
