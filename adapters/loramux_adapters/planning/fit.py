"""What fits a GPU, and if not, which change of a flag would make it fit. No torch.

A change is only proposed after its own figure has been computed and fits. What CUDA itself takes is an assumption,
`CUDA_CONTEXT`; fragmentation is not foreseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loramux_adapters.planning.serving import ServingMemory, ServingOptions, slot_rows
from loramux_adapters.planning.training import TrainingOptions
from loramux_adapters.training.recipe import Optimizer

CUDA_CONTEXT = (
    600_000_000  # bytes a process with torch takes before its first tensor; 0.4 to 0.6 GB are usual
)
SHORTEST_ROW = 128  # tokens; nobody wants to be told that 8 would fit
SHORTEST_CONTEXT = 256
SMALL_OPTIMIZER: Optimizer = "adamw_8bit"


@dataclass(frozen=True, slots=True)
class Fit:
    """`left` is negative by how much is missing. Each of `changes` is enough by itself; it may be several flags together."""

    left: int
    changes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.left >= 0


@dataclass(frozen=True, slots=True)
class ServingFit:
    """`fit` is for one sequence at full length, which is what starts; the rest says what more the KV cache holds.

    `length_for_all` is the --max-model-len at which max_num_seqs never wait for room; None: it would be too short to use.
    """

    fit: Fit
    kv_tokens: int  # that the KV cache has room for
    sequences: int  # of max_model_len
    length_for_all: int | None


def fit_method(total: int, memory: int) -> Fit:
    return Fit(memory - CUDA_CONTEXT - total)


def fit_qlora(options: TrainingOptions, total: Callable[[TrainingOptions], int], memory: int) -> Fit:
    """`total` gives the bytes for other options."""
    budget = memory - CUDA_CONTEXT
    left = budget - total(options)
    if left >= 0:
        return Fit(left)

    def fits(other: TrainingOptions) -> bool:
        return total(other) <= budget

    small = replace(options, optimizer=SMALL_OPTIMIZER) if options.optimizer == "adamw" else options
    smaller = [] if small is options else [f"--optimizer {SMALL_OPTIMIZER}"]
    changes = [
        *_largest("--max-seq-length", options, "max_seq_length", SHORTEST_ROW, fits),
        *_largest("--batch-size", options, "batch_size", 1, fits),
        *(smaller if fits(small) else []),
    ]
    if not changes:
        least = replace(small, batch_size=1)
        single = ["--batch-size 1"] if options.batch_size > 1 else []
        together = _largest("--max-seq-length", least, "max_seq_length", SHORTEST_ROW, fits, itself=True)
        changes = [" ".join([*single, *smaller, length]) for length in together]
    return Fit(left, tuple(changes))


def fit_serving(served: ServingMemory, options: ServingOptions, memory: int) -> ServingFit:
    """The server takes `gpu_memory_utilization` of the memory, its weights and adapter slots included."""
    share = int(memory * options.gpu_memory_utilization) - CUDA_CONTEXT
    room = share - served.weights - served.adapter_slots
    tokens = max(0, room) // served.kv_per_token // options.block_size * options.block_size
    left = share - served.least
    changes: list[str] = []
    if left < 0:
        if tokens >= SHORTEST_CONTEXT:
            changes.append(f"--max-model-len {tokens}")
        fewer = _loras_that_fit(served, options, share)
        if fewer is not None:
            changes.append(f"--max-loras {fewer}")
    each = tokens // options.max_num_seqs // options.block_size * options.block_size
    return ServingFit(
        fit=Fit(left, tuple(changes)),
        kv_tokens=tokens,
        sequences=max(0, room) // served.kv_sequence,
        length_for_all=min(each, options.max_model_len) if each >= SHORTEST_CONTEXT else None,
    )


def kv_room_beside(training: int, served: ServingMemory, options: ServingOptions, memory: int) -> int:
    """Bytes of KV cache that leave `training` bytes free for a job of the same server; negative if there is no room."""
    taken = served.weights + served.adapter_slots + CUDA_CONTEXT
    share = int(memory * options.gpu_memory_utilization)
    return min(share, memory - training) - taken


def _largest(
    flag: str,
    options: TrainingOptions,
    field: str,
    least: int,
    fits: Callable[[TrainingOptions], bool],
    *,
    itself: bool = False,
) -> list[str]:
    """`flag` with the largest multiple of `least` below the field's value (or the value `itself`) that fits, if any does."""
    value: int = getattr(options, field)
    if itself and fits(options):
        return [f"{flag} {value}"]
    low, high = 0, (value - 1) // least  # in units of `least`; memory grows with either
    while low < high:
        middle = (low + high + 1) // 2
        if fits(_with(options, field, middle * least)):
            low = middle
        else:
            high = middle - 1
    return [f"{flag} {low * least}"] if low else []


def _with(options: TrainingOptions, field: str, value: int) -> TrainingOptions:
    changed: dict[str, Any] = {field: value}
    return replace(options, **changed)


def _loras_that_fit(served: ServingMemory, options: ServingOptions, share: int) -> int | None:
    """The most slots with which one sequence at full length fits."""
    row = served.adapter_slots // slot_rows(options, "cuda")
    for loras in range(options.max_loras - 1, 0, -1):
        slots = row * slot_rows(replace(options, max_loras=loras), "cuda")
        if served.weights + slots + served.kv_sequence <= share:
            return loras
    return None
