"""Memory of `loramux serve` beside the weights: KV cache and device slots of adapters, by the flags' names. No torch.

The server gives the KV cache whatever is free, and lets requests wait when it is full; so the figure for every
sequence at full length is what is needed for none ever to wait, not what is needed to start.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux_adapters.planning.shape import ModelShape
from loramux_adapters.planning.weights import Device, Quantization, weight_bytes

_PLANNED_RANK = 16  # of an adapter in a slot on CUDA, where rows are allocated at start


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """As the flags of `loramux serve` are called."""

    max_loras: int = 8
    max_lora_rank: int = 64
    max_num_seqs: int = 64
    max_model_len: int = 4096
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    quantization: Quantization = "nf4"


@dataclass(frozen=True, slots=True)
class ServingMemory:
    """Bytes."""

    weights: int
    kv_per_token: int
    kv_sequence: int  # one sequence of max_model_len tokens
    kv_cache: int  # max_num_seqs of them
    adapter_slots: int

    @property
    def least(self) -> int:
        """What starts: one sequence at full length."""
        return self.weights + self.adapter_slots + self.kv_sequence

    @property
    def total(self) -> int:
        return self.weights + self.adapter_slots + self.kv_cache


def kv_bytes_per_token(model: ModelShape, item: int) -> int:
    """Keys and values of one token in all layers."""
    return model.decoder.layers * 2 * model.decoder.kv_width * item


def slot_rows(options: ServingOptions, device: Device) -> int:
    """Rank rows of all slots. On CPUs each may hold the largest rank: rows that are not used cost nothing there."""
    if device == "cpu":
        return options.max_loras * options.max_lora_rank
    return max(options.max_lora_rank, options.max_loras * min(_PLANNED_RANK, options.max_lora_rank))


def serving_memory(model: ModelShape, options: ServingOptions, device: Device, item: int) -> ServingMemory:
    """With `item` bytes a number of the compute type."""
    row = sum(sum(shape) for shape in model.linears.values()) * item
    token = kv_bytes_per_token(model, item)
    sequence = -(-options.max_model_len // options.block_size) * options.block_size * token
    return ServingMemory(
        weights=weight_bytes(model, item, device, options.quantization),
        kv_per_token=token,
        kv_sequence=sequence,
        kv_cache=options.max_num_seqs * sequence,
        adapter_slots=slot_rows(options, device) * row,
    )
