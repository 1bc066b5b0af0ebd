"""NF4 on disk and in bounded memory: how a linear gets its served codes, and how codes are stored.

The on-disk layout is bitsandbytes': `X.weight` holds packed codes, and beside it lie scales, tables and a
JSON blob (`X.weight.quant_state.bitsandbytes__nf4`). Promises: `quantize` gives byte for byte what
`NF4Weight.quantize` gives, with a few times the piece instead of fourteen bytes a weight of working memory.
Does not decide which linears are NF4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch

from loramux_adapters.errors import BaseModelError
from loramux_adapters.export.checkpoint import Checkpoint, StoredTensor
from loramux_adapters.nf4 import BLOCKSIZE, NF4Weight

NESTED_BLOCKSIZE = 256
STATE_KEY = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256  # the JSON blob is padded with spaces, so that sizes are known before anything is quantized
PIECE = 4 * 2**20  # weights quantized at a time; a multiple of the block size

_PART_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be stored: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def quantize(weight: torch.Tensor, device: str = "cpu") -> NF4Weight:
    """NF4 with double quantization of `[N, K]` in F16, BF16 or F32 (arXiv 2305.14314, section 3).

    The codes are computed on `device` and given back on the CPU.
    """
    if device == "cpu":
        return _quantize(weight)
    codes = _quantize(weight.to(device))
    codes.state.to("cpu")
    return NF4Weight(codes.packed.cpu(), codes.state, codes.shape)


def _quantize(weight: torch.Tensor) -> NF4Weight:
    """Blocks of 64 are independent, so they are quantized piece by piece; the second level needs all scales."""
    shape = (weight.shape[0], weight.shape[1])
    flat = weight.reshape(-1)
    if flat.numel() <= PIECE:
        return NF4Weight.quantize(weight)
    packed: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    state: Any = None
    for start in range(0, flat.numel(), PIECE):
        codes, state = bnb.quantize_4bit(
            flat[start : start + PIECE], blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=False
        )
        packed.append(codes)
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    offset = absmax.mean()
    codes_of_scales, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    full = bnb.QuantState(
        absmax=codes_of_scales,
        shape=torch.Size(shape),
        dtype=weight.dtype,
        blocksize=BLOCKSIZE,
        code=state.code,
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    return NF4Weight(torch.cat(packed), full, shape)


def is_packed(checkpoint: Checkpoint, weight_name: str) -> bool:
    """True if the checkpoint holds this linear as bitsandbytes 4-bit codes."""
    prefix = f"{weight_name}.quant_state.bitsandbytes__"
    return any(f"{prefix}{kind}" in checkpoint.tensors for kind in ("nf4", "fp4"))


def packed_shape_fits(stored: StoredTensor, shape: tuple[int, ...]) -> bool:
    return stored.dtype == "U8" and stored.numel == -(-shape[0] * shape[1] // 2)


def packed_parts(checkpoint: Checkpoint, weight_name: str) -> tuple[StoredTensor, ...]:
    """The tensors beside the codes, in the checkpoint's order."""
    prefix = f"{weight_name}."
    return tuple(
        tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix) and name.removeprefix(prefix) in _PART_SUFFIXES
    )


def read_packed(checkpoint: Checkpoint, weight_name: str) -> NF4Weight:
    """A linear's codes as the checkpoint brought them. Raises BaseModelError for fp4 or an unreadable state."""
    if f"{weight_name}.{STATE_KEY}" not in checkpoint.tensors:
        raise BaseModelError(f"{weight_name} is not quantized as nf4", param="model")
    parts = {part.name: checkpoint.read(part.name) for part in packed_parts(checkpoint, weight_name)}
    try:
        state = bnb.QuantState.from_dict(
            {name.removeprefix(f"{weight_name}."): tensor for name, tensor in parts.items()},
            device=torch.device("cpu"),
        )
    except (ValueError, KeyError, AssertionError, AttributeError) as error:
        raise BaseModelError(f"{weight_name} has an unreadable quantization state", param="model") from error
    return NF4Weight.from_bitsandbytes(checkpoint.read(weight_name).reshape(-1, 1), state, weight_name)


def output_tensors(weight_name: str, shape: tuple[int, int]) -> tuple[OutputTensor, ...]:
    """What `encode` will give for a matrix of this shape."""
    blocks = -(-shape[0] * shape[1] // BLOCKSIZE)
    return (
        OutputTensor(weight_name, "U8", (-(-shape[0] * shape[1] // 2), 1)),
        OutputTensor(f"{weight_name}.absmax", "U8", (blocks,)),
        OutputTensor(f"{weight_name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCKSIZE),)),
        OutputTensor(f"{weight_name}.nested_quant_map", "F32", (256,)),
        OutputTensor(f"{weight_name}.quant_map", "F32", (16,)),
        OutputTensor(f"{weight_name}.{STATE_KEY}", "U8", (STATE_BYTES,)),
    )


def encode(weight: NF4Weight, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensors of a doubly quantized weight in the order of `output_tensors`; `dtype` is what readers
    restore.
    """
    state = weight.state
    described = {
        "quant_type": "nf4",
        "blocksize": state.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": state.state2.blocksize,
        "nested_dtype": str(state.state2.dtype).removeprefix("torch."),
        "nested_offset": state.offset.item(),
    }
    blob = json.dumps(described).encode("ascii").ljust(STATE_BYTES)
    yield weight.packed
    yield state.absmax
    yield state.state2.absmax
    yield state.state2.code
    yield state.code
    yield torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def quantization_config(compute_dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of such a checkpoint; transformers 4.x and 5.x and vLLM read it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
