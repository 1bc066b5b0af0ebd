"""Whether attention runs by a kernel of ours: it must exist, run and be right on the device, or the reason is logged.

`attention_kernels` gives a kernel only where it has just agreed with `reference`, in the cache's own dtype and head size:
on CUDA the Triton kernel, on CPUs the compiled ones where there are any. Prompts, for which torch has good kernels of its
own on CUDA and on CPUs with matrix tiles, use it there only if it was also faster than those on a chunk of each kind.
Everywhere else keys and values are gathered (`gathered_attention.py`). Triton is imported here at the earliest, and only
for CUDA; it compiles at run time, which needs a C compiler, and keeps what it compiled.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from loramux_adapters.native.library import Native
from loramux_adapters.nf4_rows import device_seconds
from loramux_server.engine.gathered_attention import attend_chunk
from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import AttentionKernel, AttentionKernels, Chunk, PagedBatch, Ragged

logger = logging.getLogger(__name__)

_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative errors that are rounding
_WORTH = 0.95  # of the gathered form's time: what is nearly equal is left to torch


@dataclass(frozen=True)
class AttentionShape:
    """What a kernel is compiled for."""

    block_size: int
    heads: int
    kv_heads: int
    head_dim: int


def attention_kernels(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape, native: Native | None = None
) -> AttentionKernels:
    """The kernels for a cache of this shape on `device`; none where there is none, or they are of no use."""
    if device.type == "cpu" and native is not None:
        return _on_cpu(native, device, dtype, shape)
    if device.type != "cuda":
        return AttentionKernels()
    try:
        from triton.errors import TritonError

        from loramux_server.engine.triton_attention import paged_attention
    except ImportError as error:
        logger.warning("attention gathers the KV cache: Triton cannot be imported (%s)", error)
        return AttentionKernels()
    bound = _BOUND[dtype]

    def is_right(what: str, sequences: Sequences) -> bool:
        distance = probe(paged_attention, device, dtype, shape, sequences)
        if distance <= bound:
            logger.info("%s: the Triton kernel is right here (relative error %.1g)", what, distance)
            return True
        logger.warning(
            "%s the gathered KV cache: the kernel is wrong here (relative error %.3g, at most %g is rounding)",
            what,
            distance,
            bound,
        )
        return False

    is_faster = partial(_is_faster, "Triton", paged_attention, device, dtype, shape)

    def holds(what: str, *checks: Callable[[], bool]) -> bool:
        try:
            return all(check() for check in checks)
        except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            logger.warning("%s the gathered KV cache: the kernel does not run here (%s)", what, reason)
            return False

    decode = holds(_DECODING, partial(is_right, _DECODING, DECODING))
    prefill = decode and holds(_PROMPTS, partial(is_right, _PROMPTS, PROMPTS), is_faster)
    return AttentionKernels(
        paged_attention if decode else None,
        paged_attention if prefill else None,
    )


def _is_faster(
    name: str, kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> bool:
    relative = prefill_time(kernel, device, dtype, shape)
    said = ", ".join(f"{one:.2f}" for one in relative)
    logger.info("prompts attend by the %s kernel if that is faster: its time over torch's is %s", name, said)
    return all(one <= _WORTH for one in relative)


def _on_cpu(
    native: Native, device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> AttentionKernels:
    if dtype != torch.bfloat16 or shape.head_dim % 32:
        return AttentionKernels()

    def checked(query: torch.Tensor, store: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if out.dtype != torch.bfloat16:
            raise RuntimeError(f"attention in {out.dtype} over a cache in bf16")
        sizes = (shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim)
        if (out.shape[1:], store.shape[3:]) != sizes:
            raise RuntimeError(
                f"attention of {tuple(out.shape[1:])} over a cache of {tuple(store.shape[3:])}"
            )
        # modeling code may lay heads before tokens
        return query if query.stride()[1:] == (query.shape[2], 1) else query.contiguous()

    def decode(
        query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
    ) -> None:
        native.attend(checked(query, store, out), store, rows, out, **options)

    def prefill(
        query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
    ) -> None:
        native.attend_prompts(checked(query, store, out), store, rows, out, **options)

    def is_right(what: str, kernel: AttentionKernel, sequences: Sequences) -> bool:
        distance = probe(kernel, device, dtype, shape, sequences)
        if not distance <= _BOUND[dtype]:
            logger.warning(
                "%s the gathered KV cache: the CPU kernel is wrong here (relative error %.3g)", what, distance
            )
        return distance <= _BOUND[dtype]

    def is_for_prompts() -> bool:
        """Where torch has matrix tiles its own attention may be faster; without them it is not."""
        if not is_right(_PROMPTS, prefill, PROMPTS):
            return False
        return native.products != "tiles" or _is_faster("CPU", prefill, device, dtype, shape)

    return AttentionKernels(
        decode if is_right(_DECODING, decode, DECODING) else None, prefill if is_for_prompts() else None
    )


# Of each sequence: its rows, and how many blocks the tokens fill that its last row sees.
Sequences = tuple[tuple[int, float], ...]
DECODING: Sequences = ((1, 0), (1, 1), (1, 2.1), (1, 4.9))
PROMPTS: Sequences = ((1, 0), (40, 2.5), (70, 5), (3, 4.9))
_DECODING, _PROMPTS = "decoding reads", "prompts read"


@torch.inference_mode()
def probe(
    kernel: AttentionKernel,
    device: torch.device,
    dtype: torch.dtype,
    shape: AttentionShape,
    sequences: Sequences,
) -> float:
    """The kernel's relative error on the worst of the sequences, in blocks that lie in disorder.

    With and without a window, with and without a cap: each is a kernel of its own, compiled before requests wait.
    """
    generator = torch.Generator().manual_seed(0)
    counts = [count for count, _ in sequences]
    lengths = torch.tensor([max(count, round(blocks * shape.block_size)) for count, blocks in sequences])
    width = -(-int(lengths.max()) // shape.block_size)
    table = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width)
    size = (table.numel(), shape.block_size, 2, shape.kv_heads, shape.head_dim)
    store = torch.randn(size, generator=generator).to(device, dtype)
    query = torch.randn(sum(counts), shape.heads, shape.head_dim, generator=generator).to(device, dtype)
    begins = torch.tensor([0, *counts]).cumsum(0)
    rows = Ragged(table.to(device), begins.to(device), lengths.to(device), max(counts))
    worst = torch.zeros((), device=device)
    caps = (None, 1.0)  # the second is one that such scores reach
    for window, softcap in product((None, shape.block_size + 3), caps):
        options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "window": window, "softcap": softcap}
        out = torch.full_like(query, float("nan"))
        kernel(query, store, rows, out, **options)
        expected = reference(query, store, rows, **options)
        errors = (out.float() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        worst = torch.maximum(worst, errors.max())  # NaN if any is
    return float(worst)


@torch.inference_mode()
def prefill_time(
    kernel: AttentionKernel,
    device: torch.device,
    dtype: torch.dtype,
    shape: AttentionShape,
    seconds: Callable[[torch.device, Callable[[], object]], float] = device_seconds,
    length: int = 512,
) -> list[float]:
    """The kernel's time over the gathered form's, for a chunk that begins a prompt and for one behind three like it."""
    found = []
    for context in (0, 3 * length):
        blocks = -(-(context + length) // shape.block_size)
        store = KVStore(1, blocks, shape.block_size, shape.kv_heads, shape.head_dim, dtype, device)
        query = torch.ones(length, shape.heads, shape.head_dim, dtype=dtype, device=device)
        chunk = Chunk(0, length, context, torch.arange(blocks, device=device))
        none = chunk.blocks[:0]
        batch = PagedBatch(none, none, 0, none.view(0, 0), none, [chunk], store)
        out = torch.empty_like(query)
        scale = shape.head_dim**-0.5
        ours = seconds(device, partial(kernel, query, store.layers[0], batch.prompts, out, scale=scale))
        gathered = partial(attend_chunk, query, store, 0, chunk, scale=scale, window=None, softcap=None)
        found.append(ours / seconds(device, gathered))
    return found


def reference(
    query: torch.Tensor,
    store: torch.Tensor,
    rows: Ragged,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """What the kernel computes, a token at a time in fp32: `[T, heads, dim]`."""
    block_size, kv_heads = store.shape[1], store.shape[3]
    results = []
    for number, (blocks, length) in enumerate(zip(rows.block_table, rows.lengths.tolist(), strict=True)):
        begin, end = rows.begins[number : number + 2].tolist()
        for row in range(begin, end):
            seen = length - (end - 1 - row)
            positions = torch.arange(
                0 if window is None else max(0, seen - window), seen, device=query.device
            )
            held = store[blocks[positions // block_size], positions % block_size].float()
            keys, values = held.unbind(1)  # [L, kv_heads, dim]
            one = query[row].float()
            scores = torch.einsum("hgd,lhd->hgl", one.view(kv_heads, -1, one.shape[-1]), keys) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            results.append(torch.einsum("hgl,lhd->hgd", scores.softmax(-1), values).reshape(one.shape))
    return torch.stack(results)
