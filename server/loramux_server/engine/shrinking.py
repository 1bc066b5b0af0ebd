"""A step that does not fit into memory is made smaller until it does; a request that does not fit alone fails alone.

Promises: every item that is given was run once, in whole or in its first part, or its sequence is among those that failed;
errors that are not about memory pass through. What was not run of a prompt is left to the next step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from loramux_server.engine.messages import TokenOutput
from loramux_server.engine.sequence import Scheduled, Sequence

logger = logging.getLogger(__name__)

Run = Callable[[list[Scheduled]], list[TokenOutput]]


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What came of a step."""

    outputs: list[TokenOutput] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Allocators without a class of their own: the CPU's, and cuBLAS' for its workspace.
    signs = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def run_within_memory(items: list[Scheduled], run: Run) -> Shrunk:
    """`run` must leave no trace when it raises."""
    done = Shrunk()
    _run_parts(items, run, done)
    if done.failed:
        logger.error("not enough memory: %d requests failed, the others go on", len(done.failed))
    return done


def _run_parts(items: list[Scheduled], run: Run, done: Shrunk) -> None:
    try:
        done.outputs.extend(run(items))
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: the error's traceback holds the tensors of the attempt.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    tokens = sum(item.count for item in items)
    logger.warning("not enough memory for a step of %d tokens; trying with less", tokens)
    if len(items) == 1:
        [item] = items
        smaller = item.smaller()
        if smaller is None:
            done.failed.append(item.sequence)
        else:
            _run_parts([smaller], run, done)
        return
    middle = _middle(items)
    _run_parts(items[:middle], run, done)
    _run_parts(items[middle:], run, done)


def _middle(items: list[Scheduled]) -> int:
    """Where the first half of the tokens ends; both parts have at least one item."""
    left = sum(item.count for item in items) / 2
    for place, item in enumerate(items[:-1], 1):
        left -= item.count
        if left <= 0:
            return place
    return len(items) - 1
