"""Keeping resident memory near what is held.

glibc keeps freed blocks below its mmap threshold (which grows to 32 MiB) for later; when tensor after tensor of varying
size passes through, that reserve grows to the size of the model. Promises: `Trimmer` hands it back now and then, and is
a no-op where the C library has no `malloc_trim`. Does not measure anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

TRIM_EVERY = 128 * 2**20


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None
    return function


class Trimmer:
    """Counts freed bytes and gives memory back every TRIM_EVERY of them."""

    def __init__(self) -> None:
        self._freed = 0

    def freed(self, num_bytes: int) -> None:
        self._freed += num_bytes
        if self._freed >= TRIM_EVERY:
            self._freed = 0
            trim = _malloc_trim()
            if trim is not None:
                trim(0)
