"""Decoding steps that are recorded once, for a shape and a kind of adapters, and then replayed.

A 7B model launches more than a thousand kernels a step, each some microseconds of the host's time; with few rows the device
waits for them. A CUDA graph holds them all; on CPUs with compiled kernels a tape (`tape.py`) spares the Python between them.
A recording reads and writes fixed addresses: a step's tensors are copied into its inputs (`recorded_inputs.py`), filled up
to the next size with rows that belong to nobody, and its adapters are found as `recorded_adapters.py` says. Beside the rows
that decode there may be a small part of one prompt, which does not end with it.

Promises: a recording is used only after its first replay has given the logits that the same forward pass gives without one,
and written the same keys and values; whatever fails while one is made is logged once, and then steps run without. Steps with
other prompts, and with more rows than are recorded, are not for this. What records is an argument, so that all of this but
CUDA's own part runs on every device.
"""

from __future__ import annotations

import logging
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.nf4_rows import device_seconds
from loramux_adapters.row_choice import Seconds
from loramux_server.engine.paged_batch import PagedBatch
from loramux_server.engine.recorded_adapters import RecordedAdapters
from loramux_server.engine.recorded_inputs import RecordedInputs, Shape

logger = logging.getLogger(__name__)

# tokens [1, n], positions [1, n], rows whose logits are wanted [k], where the rows belong -> logits [k, vocab]
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch], torch.Tensor]


@dataclass(frozen=True)
class Recording:
    """`replay` computes `result` anew from what lies at the recorded addresses."""

    replay: Callable[[], object]
    result: torch.Tensor


MOST_ROWS = 256  # with more nothing waits for launches, and each size takes memory

Record = Callable[[Callable[[], torch.Tensor]], Recording]


class CudaRecorder:
    """All graphs of one recorder share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], torch.Tensor]) -> Recording:
        """`work` has run before, so that nothing is compiled or looked up for the first time while it is recorded."""
        self._refuse_waiting(work)
        stream = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # A pool ends with the last graph that uses it, and its name must not be used again.
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Loader threads copy adapters and pin memory meanwhile, which the default mode forbids to all threads.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a recording that is broken off leaves its own
            raise
        self._graphs.add(graph)
        return Recording(graph.replay, result)

    @staticmethod
    def _refuse_waiting(work: Callable[[], torch.Tensor]) -> None:
        """Raises RuntimeError if the host waits for the device in it, before the allocator is in a recording."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)


def replay_seconds(device: torch.device, record: Record) -> Seconds:
    """A clock for the device's work alone, without the host's that a recording spares."""

    def seconds(work: Callable[[], torch.Tensor]) -> float:
        work()
        return device_seconds(device, record(work).replay)

    return seconds


def sizes_up_to(most: int) -> list[int]:
    """Numbers of rows that are recorded: 1, 2, 4, and the multiples of 8."""
    return [*(size for size in (1, 2, 4) if size < most), *range(8, most, 8), most]


class DecodeGraphs:
    """What was recorded, and the inputs it reads."""

    def __init__(
        self,
        forward: Forward,
        adapters: RecordedAdapters,
        inputs: RecordedInputs,
        record: Record,
        *,
        max_rows: int,
        parts: Sequence[int] = (),
    ) -> None:
        """A step has at most `max_rows`, and those of a prompt are filled up to one of `parts`.

        Attention's kernels must be there: gathering depends on how long sequences are.
        """
        self._forward = forward
        self._adapters = adapters
        self._inputs = inputs
        self._record = record
        self._sizes = sizes_up_to(min(max_rows, MOST_ROWS))
        self._parts = parts
        self._logits: torch.Tensor | None = None  # [rows, vocab], of all sizes: one runs at a time
        self._recordings: dict[tuple[Shape, Hashable], Recording] = {}
        self._recorded_steps: list[Callable[[], torch.Tensor]] = []  # they hold tensors that a graph reads
        self.works = True

    def run(
        self, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[str | None], paged: PagedBatch
    ) -> torch.Tensor | None:
        """Logits `[decoding rows, vocab]` of a step of which only those sample, overwritten by the next.

        None if it must run without graphs. `paged` is the step's, on the CPU.
        """
        shape = self._shape_of(paged, len(rows)) if self.works else None
        if shape is None:
            return None
        count = paged.num_decodes
        kind = self._adapters.choose(rows)
        placed = [*rows[:count], *[None] * (shape.decoding - count), *rows[count:]]

        def fill() -> None:
            self._inputs.fill(shape, tokens, positions, paged)
            self._adapters.fill(placed, shape.rows, kind)

        fill()
        recording = self._recordings.get((shape, kind))
        if recording is None:
            recording = self._recorded(shape, kind, fill, count)
            if recording is None:
                return None
        recording.replay()
        return recording.result[:count]

    def _shape_of(self, paged: PagedBatch, rows: int) -> Shape | None:
        count, most = paged.num_decodes, self._sizes[-1]
        if not 0 < count <= most:
            return None
        decoding = self._sizes[bisect_left(self._sizes, count)]
        if not paged.chunks:
            return Shape(decoding, 0)
        parts = [part for part in self._parts if rows - count <= part <= most - decoding]
        return Shape(decoding, parts[0]) if parts and len(paged.chunks) == 1 else None

    def _recorded(
        self, shape: Shape, kind: Hashable, fill: Callable[[], None], count: int
    ) -> Recording | None:
        """Record one shape over other rows than those that lie in the inputs now, and prove it with these.

        `count` of them decode: what nobody's rows come to depends on what they find in nobody's block. None if these prove
        nothing; None, for good, if it does not work.
        """
        began = time.perf_counter()
        work = self._step_of(shape, kind)
        try:
            expected = self._results(work(), shape, count)
            self._inputs.fill_up(shape, 0, 0)
            self._adapters.fill((), shape.rows, kind)
            recording = self._record(work)
            fill()
            self._inputs.unwrite(shape)
            recording.replay()
            found = self._results(recording.result, shape, count)
            distances = [_distance(*both) for both in zip(found, expected, strict=True)]
        except RuntimeError as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            self._give_up(f"recording one failed ({reason})")
            return None
        bound = 1e-5 if expected[1].dtype == torch.float32 else 2e-2
        for distance in distances:
            if distance is not None and not distance <= bound:
                self._give_up(f"one is wrong (relative error {distance:.3g}, at most {bound:g} is rounding)")
                return None
        if None in distances:
            return None
        self._recordings[shape, kind] = recording
        self._recorded_steps.append(work)
        seconds = time.perf_counter() - began
        adapters = self._adapters.describe(kind)
        logger.info("recorded decoding of %s, %s, in %.2f s", shape, adapters, seconds)
        return recording

    def _results(self, logits: torch.Tensor, shape: Shape, count: int) -> list[torch.Tensor]:
        """Logits of the `count` rows that decode, what those wrote, and what the part's did; each `[n, numbers]`."""
        written = self._inputs.written(shape)
        parts = [written[count:]] if shape.part else []
        return [logits[:count].clone(), written[:count], *parts]

    def _give_up(self, reason: str) -> None:
        logger.warning("decoding runs without recorded steps: %s", reason)
        self.works = False
        self._recordings.clear()
        self._recorded_steps.clear()

    def _step_of(self, shape: Shape, kind: Hashable) -> Callable[[], torch.Tensor]:
        """The forward pass of one shape over the inputs."""
        paged = self._inputs.batch(shape)
        kept = torch.arange(shape.decoding, device=paged.slots.device)
        tokens = self._inputs.tokens[:, : shape.rows]
        positions = self._inputs.positions[:, : shape.rows]

        def work() -> torch.Tensor:
            self._adapters.select(shape.rows, kind)
            logits = self._forward(tokens, positions, kept, paged)
            if self._logits is None:
                self._logits = logits.new_empty(self._sizes[-1], logits.shape[-1])
            return self._logits[: shape.decoding].copy_(logits)

        return work


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Relative error over the rows that are finite as expected; None if there is none.

    An adapter that overflows fails its own request, and is no proof of anything.
    """
    rows = expected.isfinite().all(-1)
    expected, found = expected[rows].float(), found[rows].float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6)) if len(expected) else None
