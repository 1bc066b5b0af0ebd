"""With how many active rank rows CUDA multiplies adapters row by row: where that was right and faster when it was tried.

The dense form multiplies every row with every active factor, in two products that tensor cores do fast, and masks what is
foreign: its work grows with a step's rows times its adapters. That of `triton_lora.py` grows with the rows alone, but is cut
into small pieces. Which is faster depends on the device, so both are timed when an engine starts, over all linears of the
model in turn and as a recorded step runs them. What is found is written to the log with its figures. On anything but CUDA,
and where Triton is missing, does not run or is wrong, the dense form is used.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.nf4 import ROUNDING
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import Slot
from loramux_adapters.row_adapters import RowAdapters, probe, tiles_of
from loramux_adapters.spec import MAX_RANK
from loramux_adapters.stack import AdapterStack
from loramux_adapters.transfer import sent

logger = logging.getLogger(__name__)

# Of some work on the device, as a recorded step does it.
Seconds = Callable[[Callable[[], torch.Tensor]], float]

_WORTH = 0.95  # of the dense form's time: what is nearly equal is left to it
_RANK = 16  # of the adapters that are timed, where so many rows have one each


@dataclass(frozen=True)
class ByRows:
    """How to multiply row by row, and for which sizes of the stack to do so."""

    adapters: RowAdapters
    sizes: frozenset[int]


def choose_by_rows(
    pool: DevicePool, stack: AdapterStack, sizes: Sequence[int], rows: int, seconds: Seconds
) -> ByRows | None:
    """Time steps of `rows` rows for each of the stack's `sizes`. None if no size is better off. `pool` is not in use yet."""
    if pool.device.type != "cuda":
        return None
    try:
        from triton.errors import TritonError

        from loramux_adapters import triton_lora
    except ImportError as error:
        logger.warning("adapters multiply as one; Triton cannot be imported (%s)", error)
        return None
    try:
        dtype = next(iter(pool.memory.values()))[0].dtype
        distance = probe(triton_lora.lora, triton_lora.TILE, dtype, pool.device)
        if not distance <= ROUNDING[dtype]:
            logger.warning(
                "adapters multiply as one; row by row is wrong here (relative error %.3g)", distance
            )
            return None
        by_rows = RowAdapters(triton_lora.lora, pool.memory, tile=triton_lora.TILE)
        relative = relative_times(pool, stack, by_rows, sizes, rows, seconds)
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("adapters multiply as one; row by row does not run here (%s)", reason)
        return None
    return chosen(by_rows, relative)


def chosen(by_rows: RowAdapters, relative: dict[int, float]) -> ByRows | None:
    """What to make of the figures, which it logs."""
    won = frozenset(size for size, one in relative.items() if one <= _WORTH)
    logger.info(
        "adapters multiply row by row with %s active rank rows (its time over one product's, by rank rows: %s)",
        ", ".join(map(str, sorted(won))) or "no number of",
        ", ".join(f"{size}: {one:.2f}" for size, one in relative.items()),
    )
    return ByRows(by_rows, won) if won else None


@torch.inference_mode()
def relative_times(
    pool: DevicePool,
    stack: AdapterStack,
    by_rows: RowAdapters,
    sizes: Sequence[int],
    rows: int,
    seconds: Seconds,
) -> dict[int, float]:
    """The time of row by row over the dense form's, for each number of active rank rows."""
    device = pool.device
    x = {
        a.shape[1]: torch.ones(rows, a.shape[1], dtype=a.dtype, device=device)
        for a, _ in pool.memory.values()
    }
    y = {
        b.shape[1]: torch.zeros(rows, b.shape[1], dtype=b.dtype, device=device)
        for _, b in pool.memory.values()
    }

    def every_linear() -> torch.Tensor:
        for name, (a, b) in pool.memory.items():
            pool.batch.add(name, x[a.shape[1]], y[b.shape[1]])
        return y[b.shape[1]]

    def forms(size: int) -> list[Callable[[], torch.Tensor]]:
        count = min(rows, max(1, size // _RANK))
        rank = min(size // count, MAX_RANK)
        slots = [Slot(str(number), number * rank, rank) for number in range(count)]
        who = [str(row % count) for row in range(rows)]
        tiles = tiles_of(who, slots, by_rows.tile).with_room(rows).on(device)
        number = torch.arange(size) // rank
        foreign = sent(number != (torch.arange(rows) % count)[:, None], device)

        def ours() -> torch.Tensor:
            by_rows.select_tiles(tiles, rows, by_rows.names)
            pool.batch.select_rows(by_rows)
            return every_linear()

        def dense() -> torch.Tensor:
            stack.select(size, foreign)
            return every_linear()

        return [ours, dense]

    relative = {}
    try:
        for size in sizes:
            ours, dense = (seconds(form) for form in forms(size))
            relative[size] = ours / dense
    finally:
        pool.batch.select({}, {}, None)
    return relative
