"""What the device could do at best, measured on it in the same call, and what a step needs at least.

A decode step must read every weight once, the active adapters once, and the keys and values of every stream once; a prefill
must multiply every weight with every token. Whatever else moves bytes or computes is what shares of these roofs show.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from loadtests.gpu.model import linear_bytes
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.runner import kv_bytes_per_token


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Of one call, the best of three groups of `repeats`."""
    work()
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / repeats)
    return best


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes a second, read and written, of copying a block much larger than any cache."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(device, lambda: target.copy_(source), repeats=10)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a square product, multiplication and addition counted as two."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / seconds(device, lambda: left @ right, repeats=10)


def decode_bytes(base: ResidentBase, streams: int, context: float, adapter_bytes: int) -> float:
    """That one step reads at least. Of the embedding one row a stream is read, which is left out."""
    head: torch.Tensor = base.model.get_output_embeddings().weight
    kv = streams * context * kv_bytes_per_token(base)
    return linear_bytes(base.model) + head.numel() * head.element_size() + adapter_bytes + kv


def prefill_operations(base: ResidentBase, tokens: int) -> float:
    """Of the linears; attention and the head, which computes one row, are left out."""
    return 2.0 * tokens * sum(rows * columns for rows, columns in base.geometry.linear_shapes.values())
