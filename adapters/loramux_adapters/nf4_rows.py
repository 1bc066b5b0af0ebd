"""For which numbers of rows our Triton product multiplies NF4 weights: where it was right and faster when it was tried.

`choose_few_rows` runs once, while a base is loaded: each shape of weight, for 8, 16, 32 and 64 rows, over all layers of that
shape in turn, so that none is served from a cache. What it finds is written to the layers (`NF4Linear.few_rows`) and to the
log, with its figures. On anything but CUDA, and where Triton is missing, does not run or is wrong, nothing changes.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from loramux_adapters.nf4 import ROUNDING, MatMul, NF4Linear, cuda_matmul, distance_of

logger = logging.getLogger(__name__)

ROWS = (8, 16, 32, 64)
_WORTH = 0.95  # of the other product's time: what is nearly equal is left to it
_ROUNDS = 3

Seconds = Callable[[Callable[[], object]], float]


def choose_few_rows(model: nn.Module, dtype: torch.dtype) -> None:
    """Decide for every NF4 linear of a loaded model."""
    linears = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if not linears:
        return
    device = _device_of(linears[0])
    if device.type != "cuda":
        return
    try:
        from triton.errors import TritonError

        from loramux_adapters.triton_nf4 import few_rows_matmul, takes
    except ImportError as error:
        logger.warning("NF4: bitsandbytes' product for all rows; Triton cannot be imported (%s)", error)
        return
    try:
        distance = distance_of(few_rows_matmul, device, dtype, (1, 9, 31, 64))
        if not distance <= ROUNDING[dtype]:
            logger.warning(
                "NF4: bitsandbytes' product for all rows; ours is wrong here (relative error %.3g)", distance
            )
            return
        taken = [one for one in linears if takes(one.quantized)]
        choose(taken, few_rows_matmul, cuda_matmul(device, dtype), partial(device_seconds, device))
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        for linear in linears:
            linear.few_rows = frozenset()
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("NF4: bitsandbytes' product for all rows; ours does not run here (%s)", reason)


def _device_of(linear: NF4Linear) -> torch.device:
    return linear.weight.device


@torch.no_grad()
def choose(linears: Sequence[NF4Linear], ours: MatMul, theirs: MatMul, seconds: Seconds) -> None:
    """Time both on every shape and give each linear the numbers of rows for which ours took less."""
    by_shape: dict[tuple[int, int], list[NF4Linear]] = {}
    for linear in linears:
        by_shape.setdefault(linear.quantized.shape, []).append(linear)
    for shape, same in by_shape.items():
        won: set[int] = set()
        figures = []
        for below, rows in zip((ROWS[0] - 1, *ROWS), ROWS, strict=False):
            x = torch.ones(rows, shape[1], dtype=same[0].compute_dtype, device=same[0].weight.device)
            took = [seconds(partial(_each, product, same, x)) for product in (ours, theirs)]
            figures.append(f"{rows}: {took[0] / took[1]:.2f}")
            if took[0] <= _WORTH * took[1]:
                won |= set(range(below + 1, rows + 1))
        for linear in same:
            linear.few_rows, linear.few_rows_matmul = frozenset(won), ours
        logger.info(
            "NF4 %d x %d: our product for %s rows (its time over bitsandbytes', by rows: %s)",
            *shape,
            f"{min(won)} to {max(won)}" if won else "no number of",
            ", ".join(figures),
        )


def _each(product: MatMul, linears: Sequence[NF4Linear], x: torch.Tensor) -> None:
    for linear in linears:
        product(x, linear.quantized, linear.bias)


def device_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The best of a few rounds, after one that compiles."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(_ROUNDS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
