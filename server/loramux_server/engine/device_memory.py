"""How much CUDA memory the worker's allocator holds and how much is free: figures for /metrics, at most once a second."""

from __future__ import annotations

import time

import torch

_EVERY_S = 1.0


class DeviceMemory:
    """Asking the driver takes longer than some steps, so that the answer is kept for a second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = float("-inf")
        self._latest = (0, 0)

    def read(self) -> tuple[int, int]:
        """(held, free) in bytes; zeros where the device is the host."""
        if self._device.type == "cuda" and time.monotonic() - self._asked >= _EVERY_S:
            self._asked = time.monotonic()
            free, _ = torch.cuda.mem_get_info(self._device)
            self._latest = (torch.cuda.memory_reserved(self._device), free)
        return self._latest
