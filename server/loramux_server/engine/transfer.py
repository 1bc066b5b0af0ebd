"""Numbers of the host on the device, without waiting for what the device computes.

CUDA copies what lies in ordinary memory aside before the call returns, so it may be freed at once:
https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html. The other direction is not for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor of these numbers, or rows of numbers."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
