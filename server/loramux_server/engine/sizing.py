"""How many KV blocks, how long a context and how many rank rows fit beside a loaded base.

Everything is either asked for (and refused with figures if it cannot be) or derived from the memory that is free.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from loramux_adapters.errors import ConfigError
from loramux_adapters.host_memory import available_bytes
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.options import WorkerOptions

logger = logging.getLogger(__name__)

GIB = 1024**3
_CPU_KV_DEFAULT = 4 * GIB  # committed by the operating system only as it is used


@dataclass(frozen=True, slots=True)
class Sizes:
    num_blocks: int
    max_model_len: int
    lora_rows: int


def plan_sizes(options: WorkerOptions, base: ResidentBase, kv_token_bytes: int) -> Sizes:
    """Raises ConfigError, naming the flag, if what was asked for does not fit."""
    lora_rows = _lora_rows(options, base)
    # What CUDA graphs read is a copy of the active adapters.
    copies = 2 if base.device.type == "cuda" and not options.enforce_eager else 1
    reserved = copies * lora_rows * _row_bytes(base)
    budget = options.kv_cache_bytes or _free_bytes(options, base.device, reserved)
    num_blocks = budget // (kv_token_bytes * options.block_size)
    capacity = num_blocks * options.block_size
    if capacity < 2 * options.block_size:
        raise ConfigError(
            f"{budget / GIB:.2f} GiB are left for the KV cache, which holds {capacity} tokens of "
            f"{kv_token_bytes / 1024:.0f} KiB each; free some memory, lower --max-loras or choose a smaller model",
            param="kv_cache_memory",
        )
    max_model_len = _max_model_len(options, base, capacity)
    # More blocks than every running sequence at full length can use would only be bookkeeping.
    useful = options.max_num_seqs * -(-max_model_len // options.block_size)
    return Sizes(min(num_blocks, useful), max_model_len, lora_rows)


def _max_model_len(options: WorkerOptions, base: ResidentBase, capacity: int) -> int:
    asked = options.max_model_len
    if asked is None:
        return min(base.max_position, capacity)
    if asked > base.max_position:
        raise ConfigError(
            f"--max-model-len {asked} is longer than the {base.max_position} positions of the model",
            param="max_model_len",
        )
    if asked > capacity:
        raise ConfigError(
            f"--max-model-len {asked} does not fit the KV cache, which holds {capacity} tokens; raise --kv-cache-memory",
            param="max_model_len",
        )
    return asked


def _row_bytes(base: ResidentBase) -> int:
    """Bytes of one rank row of A and B over all linears."""
    return sum(sum(shape) for shape in base.geometry.linear_shapes.values()) * base.dtype.itemsize


def _lora_rows(options: WorkerOptions, base: ResidentBase) -> int:
    """On CPUs every slot may hold the largest rank, as unused rows cost nothing; on GPUs rank 16 is planned for."""
    if base.device.type == "cpu":
        return options.max_loras * options.max_lora_rank
    return max(options.max_lora_rank, options.max_loras * min(16, options.max_lora_rank))


def _free_bytes(options: WorkerOptions, device: torch.device, reserved: int) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What a step allocates for activations and logits comes out of the share left unused.
        return max(0, int(free - (1 - options.gpu_memory_utilization) * total) - reserved)
    return min(_CPU_KV_DEFAULT, max(0, available_bytes() // 2 - reserved))
