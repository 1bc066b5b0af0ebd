"""The jobs that were sent, one under training, a slice at a time between engine steps.

Promises: the served model is not touched (see `loramux_adapters.training`); while requests decode a job takes what the
latency budget leaves (`budget.py`), and all of the time otherwise; a job that is asked to stop does so at the next slice,
whatever the budget; when one has ended its memory is free again. Does not order jobs: they are trained as they come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from loramux_server.base.loading import ResidentBase
from loramux_server.engine.budget import LatencyBudget
from loramux_server.engine.messages import (
    StartTraining,
    StopTraining,
    TrainingEnded,
    TrainingEvent,
    TrainingStep,
)
from loramux_server.engine.reading import Reading, TokenizerSource
from loramux_server.engine.training_job import Moment, Pending, ReadFiles, TrainingJob


class Training:
    """The jobs that were sent, one under training. All methods are for the thread that owns the device."""

    def __init__(
        self,
        base: ResidentBase,
        tokenizer: TokenizerSource,
        budget: LatencyBudget,
        *,
        read: ReadFiles = Reading,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._tokenizer = tokenizer
        self._budget = budget
        self._read = read
        self._clock = clock
        self._waiting: deque[TrainingJob] = deque()
        self._job: TrainingJob | None = None
        self._slices: Generator[Moment, None, TrainingEnded] | None = None
        self._pending: Pending | None = None
        self._looked = 0.0  # at the clock, when `advance` was left
        self._busy = 0.0  # seconds of slices since `_since`, when something was last said
        self._since = 0.0
        self._pace = _Pace(base.device)
        self._writer = ThreadPoolExecutor(
            1, "training-writer", initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def has_work(self) -> bool:
        return self._job is not None or bool(self._waiting)

    @property
    def is_waiting(self) -> bool:
        """Whether the next slice waits for files that are read or written elsewhere."""
        return self._pending is not None and not self._pending.done()

    def start(self, command: StartTraining) -> None:
        self._waiting.append(TrainingJob(command, self._base, self._tokenizer, self._read, self._writer))

    def stop(self, command: StopTraining) -> None:
        """Unknown ids are ignored: the job has ended."""
        for job in (self._job, *self._waiting):
            if job is not None and job.id == command.id:
                job.stop = command
        if not isinstance(self._pending, Future):
            self._pending = None  # files that are read are not waited for any more

    def advance(self, *, decoding: bool) -> list[TrainingEvent]:
        """One slice, or beside decoding as many as the budget allows; what there is to tell of them."""
        if decoding:
            self._budget.decoded(self._clock() - self._looked)
        told: list[TrainingEvent] = []
        while self._next() and not self.is_waiting and (not decoding or self._may_go_on()):
            event = self._slice(decoding)
            if event is not None:
                told.append(event)
            if not decoding:
                break
        self._looked = self._clock()
        return told

    def close(self) -> None:
        """Leave no child and no thread; what is being written is finished."""
        self._waiting.clear()
        self._end()
        self._writer.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> bool:
        """Whether there is a job to run a slice of."""
        if self._job is None and self._waiting:
            self._job = self._waiting.popleft()
            self._slices = self._job.slices()
            self._busy, self._since = 0.0, self._clock()
        return self._job is not None

    def _may_go_on(self) -> bool:
        assert self._job is not None
        return self._job.stop is not None or self._budget.allows(self._job.upcoming)

    def _slice(self, decoding: bool) -> TrainingEvent | None:
        assert self._slices is not None
        assert self._job is not None
        kind = self._job.upcoming
        began = self._clock()
        try:
            moment = next(self._slices)
        except StopIteration as end:
            ended: TrainingEnded = end.value
            self._end()
            return ended
        if moment is not None and not isinstance(moment, TrainingEvent):
            self._pending = moment
            return None
        self._pending = None
        self._pace.settle(lagging=not decoding)
        took = self._clock() - began
        self._busy += took
        self._budget.trained(kind, took, decoding=decoding)
        if moment is not None:
            self._note_times(moment)
        return moment

    def _note_times(self, event: TrainingEvent) -> None:
        """Of a step, with the device's own time in it; everything that is told begins a new count."""
        now = self._clock()
        if isinstance(event, TrainingStep):
            event.seconds = self._busy
            event.waited = max(0.0, now - self._since - self._busy)
        self._busy, self._since = 0.0, now

    def _end(self) -> None:
        if self._slices is not None:
            self._slices.close()
        self._job = self._slices = self._pending = None
        self._pace.forget()
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()


class _Pace:
    """Waits for what a slice has put on a GPU, so that slices are measured and never pile up before an engine step.

    Lagging, one slice may be under way while the next is prepared: nobody waits, and the device never does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: torch.cuda.Event | None = None

    def settle(self, *, lagging: bool) -> None:
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        waited_for = self._before if lagging else event
        self._before = event
        if waited_for is not None:
            waited_for.synchronize()

    def forget(self) -> None:
        self._before = None
