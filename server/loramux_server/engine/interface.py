"""What the HTTP side needs of the engine and of the adapters, as protocols.

Routes and tests depend on these, never on the process behind them. Nothing here says how tokens are made, and
nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from loramux_adapters.access import Access
from loramux_adapters.probe import Probe
from loramux_adapters.verify_report import VerifyReport
from loramux_server.engine.messages import (
    AdapterRef,
    EngineStats,
    Ready,
    SamplingParams,
    StartTraining,
    StepOutput,
    TokenOutput,
    TrainingEvent,
)

EngineState = Literal["starting", "ready", "restarting", "draining", "dead"]


class EngineClient(Protocol):
    """The worker as seen from the front's event loop."""

    @property
    def ready(self) -> Ready:
        """Description of the resident base. Raises EngineError while there is none."""
        ...

    @property
    def state(self) -> EngineState: ...

    @property
    def stall(self) -> str | None:
        """In one sentence, that work is pending and the worker has not moved for long; None while all is well."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """State after the latest step; None before the first."""
        ...

    def check_room(self) -> None:
        """Raises QueueFull while as much runs and waits as may."""
        ...

    def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams, adapter: AdapterRef | None
    ) -> AsyncGenerator[TokenOutput, None]:
        """One request's tokens as they come; the last output carries `finish`.

        Closing the generator early aborts the request. Raises Overloaded or EngineError, before the first
        output, when the engine does not accept it.
        """
        ...

    async def pin(self, adapters: Sequence[AdapterRef]) -> None:
        """Keep exactly these adapters on the device, as room allows, across restarts of the worker too."""
        ...

    async def verify(self, adapter: AdapterRef, probe: Probe) -> VerifyReport:
        """Find out what a stored adapter does, between engine steps; they are verified one after another.

        Raises EngineError when there is no worker, when it dies meanwhile, or when it cannot find out.
        """
        ...

    def train(self, command: StartTraining) -> AsyncGenerator[TrainingEvent, None]:
        """A job's events as they come; the last is TrainingEnded. One job at a time.

        Closing the generator early stops the job. Raises EngineError when there is no worker, or when it dies: the same
        command then goes on from the last checkpoint.
        """
        ...

    async def stop_training(self, job_id: str, *, save: bool) -> None:
        """Ask the job to end, with a checkpoint if `save`; its TrainingEnded follows. Unknown ids are ignored."""
        ...

    def add_listener(self, listener: Callable[[StepOutput], None]) -> None:
        """Call `listener` on the event loop with every step's output."""
        ...


class AdapterView(Protocol):
    """What a name means at one moment."""

    @property
    def name(self) -> str: ...

    @property
    def generation(self) -> str: ...

    @property
    def created(self) -> float:
        """Unix seconds."""
        ...

    @property
    def default_sampling(self) -> Mapping[str, object]:
        """Values for fields of a request that does not name them."""
        ...

    @property
    def metadata(self) -> Mapping[str, object]:
        """Its owner's; `system_prompt` in it is used."""
        ...


class AdapterLease(Protocol):
    """A claim on a generation: it stays on disk until the lease is released. Releasing twice does nothing."""

    @property
    def record(self) -> AdapterView: ...

    def release(self) -> None: ...


class GenerationPaths(Protocol):
    def path(self, generation: str) -> Path: ...


class AdapterDirectory(Protocol):
    """Names of adapters, and leases on what they mean. AdapterRegistry is one. What `access` does not see is not there."""

    @property
    def store(self) -> GenerationPaths: ...

    def list(self, after: str | None, limit: int, access: Access) -> Sequence[AdapterView]:
        """Up to `limit` adapters in the order of their names, beginning behind the name `after`."""
        ...

    def resolve(self, model: str, access: Access) -> AdapterView:
        """What `name` or `name@generation-prefix` means. Raises UnknownAdapter."""
        ...

    def lease(self, model: str, access: Access) -> AdapterLease:
        """Resolve and claim in one step. Raises UnknownAdapter."""
        ...
