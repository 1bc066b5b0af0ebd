"""Adapters under verification, one at a time and a slice at a time, on the thread that owns the device.

Promises: the served model is not touched (see `loramux_adapters.verify`); files are read on a thread of their own; while
requests run a verification gets a quarter of the time, and all of it otherwise; whatever an adapter does in it is an
answer and not the worker's end, unless the device may be poisoned. What a report means for an upload is the front's
business.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from loramux_adapters.errors import AdapterUnavailable, LoramuxError
from loramux_adapters.verify import Progress, VerifyReport, verification_steps
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.messages import AdapterRef, Verified, VerifyAdapter
from loramux_server.engine.shrinking import is_out_of_memory

logger = logging.getLogger(__name__)

_SHARE = 1 / 3  # of the time that decoding takes, verification may take besides

_Steps = Generator[Progress, None, VerifyReport]


class Verifications:
    """The queue and the one that is under way. All methods are for the thread that owns the device."""

    def __init__(self, base: ResidentBase, clock: Callable[[], float] = time.monotonic) -> None:
        self._base = base
        self._clock = clock
        self._waiting: deque[VerifyAdapter] = deque()
        self._current: VerifyAdapter | None = None
        self._reading: Future[LoraWeights] | None = None
        self._steps: _Steps | None = None
        self._credit = 0.0  # seconds that slices may take now; below zero, decoding goes on alone
        self._looked = 0.0  # at the clock
        self._reader = ThreadPoolExecutor(
            1, "verification-reader", initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def has_work(self) -> bool:
        return self._current is not None or bool(self._waiting)

    @property
    def is_waiting(self) -> bool:
        """Whether the next slice waits for files."""
        return self._reading is not None and not self._reading.done()

    def add(self, command: VerifyAdapter) -> None:
        self._waiting.append(command)

    def abort(self, verification_id: str) -> None:
        """Drop a verification nobody waits for any more. Unknown ids are ignored."""
        self._waiting = deque(one for one in self._waiting if one.id != verification_id)
        if self._current is not None and self._current.id == verification_id:
            self._end()

    def advance(self, *, decoding: bool) -> Verified | None:
        """One slice, or beside decoding as many as its share allows; the answer, when one of them was the last."""
        if self._current is None:
            if not self._waiting:
                return None
            self._current = self._waiting.popleft()
            self._reading = self._reader.submit(self._read, self._current.adapter)
            self._credit, self._looked = 0.0, self._clock()
        earned = _SHARE * self._passed()
        if self.is_waiting:
            return None
        # What was taken too much is paid back; what was not taken is not saved up for a long pause of everybody else.
        self._credit = min(self._credit, 0.0) + earned
        while not decoding or self._credit > 0:
            answer = self._attempt(self._current)
            self._credit -= self._passed()
            if answer is not None:
                self._end()
            if answer is not None or not decoding:
                return answer
        return None

    def _passed(self) -> float:
        """Seconds since the last call."""
        before, self._looked = self._looked, self._clock()
        return self._looked - before

    def close(self) -> None:
        self._end()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _attempt(self, command: VerifyAdapter) -> Verified | None:
        try:
            report = self._slice(command)
        except LoramuxError as error:
            return Verified(command.id, error=error.message)
        except Exception as error:
            if is_out_of_memory(error):
                reason = str(error).partition("\n")[0]
                return Verified(command.id, error=f"not enough memory to verify it ({reason})")
            if isinstance(error, RuntimeError) and self._base.device.type != "cpu":
                raise  # it may come from the device, of which nothing can be trusted then
            logger.exception("the verification of adapter %s failed", command.adapter.generation[:12])
            return Verified(command.id, error=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None if report is None else Verified(command.id, report)

    def _slice(self, command: VerifyAdapter) -> VerifyReport | None:
        if self._reading is not None:
            weights, self._reading = self._reading.result(), None
            self._steps = verification_steps(self._base.model, self._base.geometry, weights, command.probe)
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration as end:
            report: VerifyReport = end.value
            return report
        return None

    def _end(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._steps is not None:
            self._steps.close()
        self._current = self._reading = self._steps = None

    def _read(self, adapter: AdapterRef) -> LoraWeights:
        """On the reader's thread. The gate once more: what is verified is what the generation is."""
        importlib.import_module("peft")  # takes seconds the first time, here where nobody waits for it
        try:
            weights = LoraWeights.read(Path(adapter.path), self._base.geometry)
        except (OSError, MemoryError) as error:
            raise AdapterUnavailable(f"its files cannot be read: {error}") from error
        if weights.generation != adapter.generation:
            raise AdapterUnavailable("its files are damaged: their hash differs")
        return weights
