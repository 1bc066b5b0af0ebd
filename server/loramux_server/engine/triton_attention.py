"""Decode attention that reads the block-paged KV cache where it lies: one Triton kernel, for CUDA devices.

The gathered form in `attention.py` copies every key and value of every decoding sequence once a layer, up to the longest of
them; this reads each once and copies none. One program per sequence and KV head: it walks over the sequence's own
positions, keeps a running maximum and sum (online softmax, Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867),
and accumulates in fp32. The query heads that share a KV head are rows of one product.

Promises: the same result as the gathered form up to rounding; a sequence's result does not depend on the batch it shares
(nothing is split over programs); what lies in a block behind a sequence's end, or before its window, is in no sum; no host
synchronization. Does not write the cache and does not compute prompt chunks. Importing this module needs Triton, which a
torch built for CUDA on Linux brings along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# Tensor cores multiply at least 16 rows; unused ones cost arithmetic of which decoding has plenty, and no memory traffic.
_MIN_ROWS = 16
# Of keys, and as many of values, in shared memory at once, twice over while the next are on their way: fits every card.
_TILE_BYTES = 16 * 1024


# A stride or a window that becomes a multiple of 16 must not compile the kernel again while requests wait.
@triton.jit(
    do_not_specialize=[
        "table_stride",
        "query_stride_row",
        "query_stride_head",
        "out_stride_row",
        "out_stride_head",
        "window",
        "group",
    ]
)
def _decode(
    query,  # [n, heads, dim], the last dimension contiguous
    store,  # [blocks, block_size, 2, kv_heads, dim], contiguous
    table,  # [n, width] of block numbers
    lengths,  # [n]
    out,  # as query
    table_stride,
    query_stride_row,
    query_stride_head,
    out_stride_row,
    out_stride_head,
    scale,
    softcap,
    window,
    group,
    block_size: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    padded_group: tl.constexpr,
    padded_dim: tl.constexpr,
    keys_at_once: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    members = tl.arange(0, padded_group)
    dims = tl.arange(0, padded_dim)
    places = tl.arange(0, keys_at_once)
    heads = kv_head * group + members
    held = (members < group)[:, None] & (dims < dim)[None, :]
    q = tl.load(
        query + row * query_stride_row + heads[:, None] * query_stride_head + dims[None, :],
        mask=held,
        other=0.0,
    )
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if windowed:
        first = tl.maximum(length - window, 0)

    # The first key of the first round is always seen, so the maximum is a number from there on.
    maximum = tl.full([padded_group], float("-inf"), dtype=tl.float32)
    total = tl.zeros([padded_group], dtype=tl.float32)
    result = tl.zeros([padded_group, padded_dim], dtype=tl.float32)
    for start in range(first, length, keys_at_once):
        positions = start + places
        seen = positions < length
        blocks = tl.load(table + row * table_stride + positions // block_size, mask=seen, other=0).to(
            tl.int64
        )
        slots = blocks * block_size + positions % block_size
        # Keys and values of one position lie beside each other: [2, kv_heads, dim].
        keys = store + (slots * (2 * kv_heads) + kv_head) * dim
        inside = seen[:, None] & (dims < dim)[None, :]
        k = tl.load(keys[:, None] + dims[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if capped:
            # tanh, of which Triton's language has none: 1 - 2 / (e^2x + 1) is right at both infinities.
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
        scores = tl.where(seen[None, :], scores, float("-inf")) * _LOG2_E
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - highest[:, None])
        kept = tl.exp2(maximum - highest)
        v = tl.load(keys[:, None] + (kv_heads * dim + dims)[None, :], mask=inside, other=0.0)
        total = total * kept + tl.sum(weights, axis=1)
        result = result * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = highest
    result = result / total[:, None]
    tl.store(
        out + row * out_stride_row + heads[:, None] * out_stride_head + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=held,
    )


def paged_decode(
    query: torch.Tensor,
    store: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write to `out` the attention of one token per sequence over its cached keys and values, its own included.

    `query` and `out` are `[n, heads, dim]`, `store` one layer of the cache `[blocks, block_size, 2, kv_heads, dim]`,
    `block_table` `[n, width]` and `lengths` `[n]` are integers; every length is at least 1.
    """
    sequences, heads, dim = query.shape
    _, block_size, _, kv_heads, _ = store.shape
    group = heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device_of(query):
        _decode[(sequences, kv_heads)](
            query,
            store,
            block_table,
            lengths,
            out,
            block_table.stride(0),
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
            scale,
            softcap or 1.0,
            window or 0,
            group,
            block_size=block_size,
            kv_heads=kv_heads,
            dim=dim,
            padded_group=max(_MIN_ROWS, triton.next_power_of_2(group)),
            padded_dim=padded_dim,
            keys_at_once=max(16, min(64, _TILE_BYTES // (padded_dim * store.itemsize))),
            capped=softcap is not None,
            windowed=window is not None,
            num_stages=2,
        )
