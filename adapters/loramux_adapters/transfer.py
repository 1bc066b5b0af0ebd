"""Numbers of the host on the device, without waiting for what the device computes.

From ordinary memory CUDA may wait for the stream before it copies, from page-locked memory it does not:
https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html. Torch's allocator keeps that until the copy is done.
The other direction is not for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sendable(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host, in memory from which a copy to the device does not wait."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on the device."""
    return sendable(tensor, device).to(device, non_blocking=True)


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor of these numbers, or rows of numbers."""
    return sent(torch.tensor(values, dtype=dtype), device)
