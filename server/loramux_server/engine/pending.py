"""What the front waits for from one worker, by id. Promises: whatever happens to the worker, each of it ends.

No HTTP, no torch, no socket: messages in, queues and futures out, on one event loop.
"""

from __future__ import annotations

import asyncio

from loramux_adapters.errors import EngineError
from loramux_server.engine.messages import StepOutput, TokenOutput, TrainingEvent, Verified


class Pending:
    """Streams of requests, answers to verifications, and events of training jobs."""

    def __init__(self) -> None:
        self.streams: dict[str, asyncio.Queue[TokenOutput]] = {}
        self.verifications: dict[str, asyncio.Future[Verified]] = {}
        self.training: dict[str, asyncio.Queue[TrainingEvent | EngineError]] = {}

    def tokens(self, step: StepOutput) -> None:
        for output in step.outputs:
            stream = self.streams.get(output.id)
            if stream is not None:
                stream.put_nowait(output)

    def verified(self, answer: Verified) -> None:
        waiting = self.verifications.get(answer.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def trained(self, event: TrainingEvent) -> None:
        events = self.training.get(event.id)
        if events is not None:
            events.put_nowait(event)

    def fail(self, message: str) -> None:
        """The worker is gone, and with it whatever it had under way."""
        for request_id, stream in self.streams.items():
            output = TokenOutput(request_id, [], "error", error=message, error_code=EngineError.code)
            stream.put_nowait(output)
        for verification_id in self.verifications:
            self.verified(Verified(verification_id, error=message))
        for events in self.training.values():
            events.put_nowait(EngineError(message))
