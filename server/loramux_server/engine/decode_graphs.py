"""Decoding steps that are recorded once, for a number of rows and a kind of adapters, and then replayed.

A 7B model launches more than a thousand kernels a step, each some microseconds of the host's time; with few rows the device
waits for them. A CUDA graph holds them all; on CPUs with compiled kernels a tape (`tape.py`) spares the Python between them.
A recording reads and writes fixed addresses: a step's tensors are copied into its inputs, filled up to the next size with
rows that belong to nobody, and its adapters are found as `recorded_adapters.py` says.

Promises: a recording is used only after its first replay has given what the same forward pass gives without one; whatever
fails while one is made is logged once, and then steps run without. Steps with prompts, and with more rows than are recorded,
are not for this. What records is an argument, so that all of this but CUDA's own part runs on every device.
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
from loramux_adapters.transfer import sendable
from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import AttentionKernels, PagedBatch
from loramux_server.engine.recorded_adapters import RecordedAdapters

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
    """Fixed inputs, and what was recorded of them."""

    def __init__(
        self,
        forward: Forward,
        adapters: RecordedAdapters,
        store: KVStore,
        kernels: AttentionKernels,
        record: Record,
        *,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        """`max_blocks` of one sequence. `kernels.decode` must be there: gathering depends on how long sequences are."""
        self._forward = forward
        self._adapters = adapters
        self._store = store
        self._kernels = kernels
        self._record = record
        self._sizes = sizes_up_to(min(max_rows, MOST_ROWS))
        device = store.layers[0].device
        self._tokens = torch.zeros(1, max_rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(1, max_rows, dtype=torch.long, device=device)
        self._slots = torch.zeros(max_rows, dtype=torch.long, device=device)
        self._lengths = torch.ones(max_rows, dtype=torch.long, device=device)
        self._table = torch.zeros(max_rows, max_blocks, dtype=torch.long, device=device)
        self._logits: torch.Tensor | None = None  # [rows, vocab], of all sizes: one runs at a time
        self._recordings: dict[tuple[int, Hashable], Recording] = {}
        self._recorded_steps: list[Callable[[], torch.Tensor]] = []  # they hold tensors that a graph reads
        self.works = True

    def run(
        self, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[str | None], paged: PagedBatch
    ) -> torch.Tensor | None:
        """Logits `[rows, vocab]` of a step that only decodes, overwritten by the next; None if it must run without graphs.

        `paged` is the step's, on the CPU.
        """
        if not self.works or len(rows) > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        kind = self._adapters.choose(rows)

        def fill() -> None:
            self._fill(tokens, positions, paged)
            self._fill_up(len(rows), size)
            self._adapters.fill(rows, size, kind)

        fill()
        recording = self._recordings.get((size, kind))
        if recording is None:
            recording = self._recorded(size, kind, fill)
            if recording is None:
                return None
        recording.replay()
        return recording.result[: len(rows)]

    def _fill(self, tokens: Sequence[int], positions: Sequence[int], paged: PagedBatch) -> None:
        count, width = paged.block_table.shape
        for own, new in (
            (self._tokens[0, :count], torch.tensor(tokens)),
            (self._positions[0, :count], torch.tensor(positions)),
            (self._slots[:count], paged.slots),
            (self._lengths[:count], paged.lengths),
            (self._table[:count, :width], paged.block_table),
        ):
            own.copy_(sendable(new, own.device), non_blocking=True)

    def _fill_up(self, count: int, size: int) -> None:
        """From row `count` on, rows of one token in nobody's block."""
        nobodys = self._store.nobodys
        self._tokens[0, count:size] = 0
        self._positions[0, count:size] = 0
        self._slots[count:size] = nobodys * self._store.block_size
        self._lengths[count:size] = 1
        self._table[count:size] = nobodys

    def _recorded(self, size: int, kind: Hashable, fill: Callable[[], None]) -> Recording | None:
        """Record one size over other rows than those that lie in the inputs now, and prove it with these.

        None if these prove nothing; None, for good, if it does not work.
        """
        began = time.perf_counter()
        work = self._step_of(size, kind)
        try:
            expected = work().float().clone()
            self._fill_up(0, size)
            self._adapters.fill((), size, kind)
            recording = self._record(work)
            fill()
            recording.replay()
            # An adapter that overflows fails its own request, and is no proof of anything.
            rows = expected.isfinite().all(-1)
            expected, found = expected[rows], recording.result.float()[rows]
            distance = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
            proven = bool(rows.any())
        except RuntimeError as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            self._give_up(f"recording one failed ({reason})")
            return None
        bound = 1e-5 if self._store.layers[0].dtype == torch.float32 else 2e-2
        if not distance <= bound:
            self._give_up(f"one is wrong (relative error {distance:.3g}, at most {bound:g} is rounding)")
            return None
        if not proven:
            return None
        self._recordings[size, kind] = recording
        self._recorded_steps.append(work)
        seconds = time.perf_counter() - began
        logger.info(
            "recorded decoding of %d rows, %s, in %.2f s", size, self._adapters.describe(kind), seconds
        )
        return recording

    def _give_up(self, reason: str) -> None:
        logger.warning("decoding runs without recorded steps: %s", reason)
        self.works = False
        self._recordings.clear()
        self._recorded_steps.clear()

    def _step_of(self, size: int, kind: Hashable) -> Callable[[], torch.Tensor]:
        """The forward pass of one size over the inputs."""
        none = self._slots[:0]
        paged = PagedBatch(
            slots=self._slots[:size],
            begun=none,
            num_decodes=size,
            block_table=self._table[:size],
            lengths=self._lengths[:size],
            chunks=[],
            store=self._store,
            kernels=self._kernels,
        )
        kept = torch.arange(size, device=none.device)
        tokens, positions = self._tokens[:, :size], self._positions[:, :size]

        def work() -> torch.Tensor:
            self._adapters.select(size, kind)
            logits = self._forward(tokens, positions, kept, paged)
            if self._logits is None:
                self._logits = logits.new_empty(self._sizes[-1], logits.shape[-1])
            return self._logits[:size].copy_(logits)

        return work
