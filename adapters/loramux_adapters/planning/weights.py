"""Bytes of a model's weights as they lie in memory: NF4 as quantized here, 16 or 32 bit, and the CPU's dense copy. No torch.

NF4 with double quantization (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): 4 bits a weight, an 8-bit scale for 64
weights, a 32-bit scale for 256 of those and one offset: about 0.516 bytes a weight. Embeddings, norms, biases and the
output head stay in the compute type.
"""

from __future__ import annotations

import math
from typing import Literal

from loramux_adapters.planning.shape import ModelShape

Device = Literal["cuda", "cpu"]
Quantization = Literal["nf4", "none"]

_BLOCK = 64
_NESTED_BLOCK = 256
_OFFSET = 4


def nf4_bytes(shape: tuple[int, int]) -> int:
    """Of one matrix, to the byte."""
    count = math.prod(shape)
    scales = -(-count // _BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // _NESTED_BLOCK) + _OFFSET


def resident_bytes(model: ModelShape, item: int, quantization: Quantization) -> int:
    """What a loaded base holds, `item` bytes a number; without the CPU's copies."""
    if quantization == "none":
        return model.parameters * item
    rest = model.parameters - model.linear_parameters
    return sum(nf4_bytes(shape) for shape in model.linears.values()) + rest * item


def copied_bytes(model: ModelShape, item: int, device: Device, quantization: Quantization) -> int:
    """The most a CPU takes: a dense copy of NF4 weights, which it multiplies where no compiled kernel does.

    16-bit weights, the head included, are multiplied reordered. In fp32 what is dense already is multiplied as it is.
    """
    if device == "cuda":
        return 0
    reordered = item == 2
    linears = model.linear_parameters * item if quantization == "nf4" or reordered else 0
    return linears + (model.head_parameters * item if reordered else 0)


def weight_bytes(model: ModelShape, item: int, device: Device, quantization: Quantization) -> int:
    return resident_bytes(model, item, quantization) + copied_bytes(model, item, device, quantization)
