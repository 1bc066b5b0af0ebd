"""Whether decoding attends by the Triton kernel: it must exist, run and be right on the device, or the reason is logged.

`decode_kernel` gives the kernel only for a CUDA device on which it has just agreed with `reference`, in the cache's own
dtype and head size. Everywhere else it gives None and the cache is gathered (`attention.py`). Triton is imported
here at the earliest, and only for CUDA; it compiles at run time, which needs a C compiler, and keeps what it compiled.
"""

from __future__ import annotations

import logging
import subprocess
from itertools import product
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


class DecodeKernel(Protocol):
    """`triton_attention.paged_decode`."""

    def __call__(
        self,
        query: torch.Tensor,
        store: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None: ...


def decode_kernel(
    device: torch.device, dtype: torch.dtype, *, block_size: int, heads: int, kv_heads: int, head_dim: int
) -> DecodeKernel | None:
    """The kernel for `heads` query heads over a cache of this shape on `device`.

    None if that is not a CUDA device, or the kernel is of no use there.
    """
    if device.type != "cuda":
        return None
    try:
        from triton.errors import TritonError

        from loramux_server.engine.triton_attention import paged_decode
    except ImportError as error:
        logger.warning("decoding gathers the KV cache: Triton cannot be imported (%s)", error)
        return None
    try:
        distance = probe(paged_decode, device, dtype, block_size, heads, kv_heads, head_dim)
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("decoding gathers the KV cache: the attention kernel does not run here (%s)", reason)
        return None
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    if not distance <= bound:
        logger.warning(
            "decoding gathers the KV cache: the attention kernel is wrong here (relative error %.3g, at most %g is "
            "rounding)",
            distance,
            bound,
        )
        return None
    logger.info("decoding attends by the Triton kernel (relative error %.1g on a probe)", distance)
    return paged_decode


@torch.inference_mode()
def probe(
    kernel: DecodeKernel,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> float:
    """The kernel's relative error on the worst of several sequences, in blocks that lie in disorder.

    With and without a window, with and without a cap: each is a kernel of its own, compiled before requests wait.
    """
    lengths = torch.tensor([1, block_size, 2 * block_size + 1, 5 * block_size - 1])
    width = 5
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width)
    shape = (table.numel(), block_size, 2, kv_heads, head_dim)
    store = torch.randn(shape, generator=generator).to(device, dtype)
    query = torch.randn(len(lengths), heads, head_dim, generator=generator).to(device, dtype)
    table, lengths = table.to(device), lengths.to(device)
    scale = head_dim**-0.5
    worst = torch.zeros((), device=device)
    for window, softcap in product((None, block_size + 3), (None, 1.0)):  # a cap that such scores reach
        out = torch.full_like(query, float("nan"))
        kernel(query, store, table, lengths, out, scale=scale, window=window, softcap=softcap)
        expected = reference(query, store, table, lengths, scale=scale, window=window, softcap=softcap)
        errors = (out.float() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        worst = torch.maximum(worst, errors.max())  # NaN if any is
    return float(worst)


def reference(
    query: torch.Tensor,
    store: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """What the kernel computes, a sequence at a time in fp32: `[n, heads, dim]`."""
    block_size, kv_heads = store.shape[1], store.shape[3]
    rows = []
    for one, blocks, length in zip(query.float(), block_table, lengths.tolist(), strict=True):
        positions = torch.arange(
            0 if window is None else max(0, length - window), length, device=query.device
        )
        held = store[blocks[positions // block_size], positions % block_size].float()
        keys, values = held.unbind(1)  # [L, kv_heads, dim]
        scores = torch.einsum("hgd,lhd->hgl", one.view(kv_heads, -1, one.shape[-1]), keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows.append(torch.einsum("hgl,lhd->hgd", scores.softmax(-1), values).reshape(one.shape))
    return torch.stack(rows)
