"""Whether a CPU multiplies adapters row by row (`../row_adapters.py`): where the compiled kernel is for them, and right."""

from __future__ import annotations

import logging

import torch

from loramux_adapters.native.library import Native
from loramux_adapters.row_adapters import FactorMemory, RowAdapters, probe

logger = logging.getLogger(__name__)

TILE = 4  # rows that are multiplied together, as in lora.c
_BOUND = 1e-2  # relative error that is rounding to bf16


def row_adapters(native: Native | None, memory: FactorMemory) -> RowAdapters | None:
    """None where the kernel is not for these factors, or wrong on a probe, which the log says."""
    if native is None or not all(
        factor.dtype == torch.bfloat16 and factor.device.type == "cpu" and factor.shape[1] % 32 == 0
        for factors in memory.values()
        for factor in factors
    ):
        return None
    distance = probe(native.lora, TILE, torch.bfloat16, torch.device("cpu"))
    if not distance <= _BOUND:
        logger.warning(
            "adapters multiply by torch: the CPU kernel is wrong here (relative error %.3g)", distance
        )
        return None
    return RowAdapters(native.lora, memory, tile=TILE)
