"""Attention that reads the block-paged KV cache where it lies: one Triton kernel, for CUDA devices.

The gathered form (`gathered_attention.py`) copies every key and value of every sequence once a layer; this reads each where
it is and copies none. One program per sequence, KV head and tile of the sequence's tokens: it walks over the positions
that its tokens may see, keeps a running maximum and sum (online softmax, Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867; tiles as in FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691), and accumulates
in fp32. The query heads that share a KV head are rows of one product, token after token.

Promises: the same result as the gathered form up to rounding; a sequence's result does not depend on the batch it shares
(nothing is split over programs); what lies in a block behind a sequence's end, or before its window, is in no sum; no host
synchronization. Does not write the cache. Importing this module needs Triton, which a torch built for CUDA on Linux
brings along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_server.engine.paged_batch import Ragged

_LOG2_E = tl.constexpr(1.4426950408889634)
# Tensor cores multiply at least 16 rows; unused ones cost arithmetic of which decoding has plenty, and no memory traffic.
_MIN_ROWS = 16
# Of a prompt's tile, all heads of a KV head together: as many as fill a program, no more than its registers hold.
_PROMPT_ROWS = 64
# Of keys, and as many of values, in shared memory at once, twice over while the next are on their way: fits every card.
_TILE_BYTES = 16 * 1024


@triton.jit
def _log2_scores(scores, seen, softcap, capped: tl.constexpr):
    """What `exp2` makes softmax's weights of: capped, minus infinity where a token does not see a key."""
    if capped:
        # tanh, of which Triton's language has none: 1 - 2 / (e^2x + 1) is right at both infinities.
        scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
    return tl.where(seen, scores, float("-inf")) * _LOG2_E


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
def _attend(
    query,  # [T, heads, dim], the last dimension contiguous
    store,  # [blocks, block_size, 2, kv_heads, dim], contiguous
    table,  # [n, width] of block numbers
    begins,  # [n + 1]
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
    tokens_at_once: tl.constexpr,
    padded_group: tl.constexpr,
    padded_dim: tl.constexpr,
    keys_at_once: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    begin = tl.load(begins + sequence)
    count = (tl.load(begins + sequence + 1) - begin).to(tl.int32)
    first_token = tl.program_id(2) * tokens_at_once
    if first_token >= count:
        return
    length = tl.load(lengths + sequence).to(tl.int32)
    members = tl.arange(0, tokens_at_once * padded_group)
    tokens = first_token + members // padded_group
    heads = kv_head * group + members % padded_group
    dims = tl.arange(0, padded_dim)
    places = tl.arange(0, keys_at_once)
    held = ((members % padded_group < group) & (tokens < count))[:, None] & (dims < dim)[None, :]
    rows = begin + tokens
    q = tl.load(
        query + rows[:, None] * query_stride_row + heads[:, None] * query_stride_head + dims[None, :],
        mask=held,
        other=0.0,
    )
    own = length - count + tokens  # each token's own position, the last that it sees
    first = 0
    if windowed:
        first = tl.maximum(length - count + first_token + 1 - window, 0)
    last = tl.minimum(length, length - count + first_token + tokens_at_once)

    maximum = tl.full([tokens_at_once * padded_group], float("-inf"), dtype=tl.float32)
    total = tl.zeros([tokens_at_once * padded_group], dtype=tl.float32)
    result = tl.zeros([tokens_at_once * padded_group, padded_dim], dtype=tl.float32)
    for start in range(first, last, keys_at_once):
        positions = start + places
        inside = positions < last
        blocks = tl.load(table + sequence * table_stride + positions // block_size, mask=inside, other=0).to(
            tl.int64
        )
        slots = blocks * block_size + positions % block_size
        # Keys and values of one position lie beside each other: [2, kv_heads, dim].
        keys = store + (slots * (2 * kv_heads) + kv_head) * dim
        loaded = inside[:, None] & (dims < dim)[None, :]
        k = tl.load(keys[:, None] + dims[None, :], mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = inside[None, :] & (positions[None, :] <= own[:, None])
        if windowed:
            seen = seen & (positions[None, :] > own[:, None] - window)
        scores = _log2_scores(scores, seen, softcap, capped)
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        # A token whose window begins later has seen nothing yet.
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - level[:, None])
        kept = tl.exp2(maximum - level)
        v = tl.load(keys[:, None] + (kv_heads * dim + dims)[None, :], mask=loaded, other=0.0)
        total = total * kept + tl.sum(weights, axis=1)
        result = result * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = highest
    result = result / total[:, None]
    tl.store(
        out + rows[:, None] * out_stride_row + heads[:, None] * out_stride_head + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=held,
    )


def paged_attention(
    query: torch.Tensor,
    store: torch.Tensor,
    rows: Ragged,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write to `out` the causal attention of the sequences' rows over their cached keys and values, their own included.

    `query` and `out` are `[T, heads, dim]`, `store` is one layer of the cache `[blocks, block_size, 2, kv_heads, dim]`;
    every sequence has at least one row, and no other row of `out` is written.
    """
    _, heads, dim = query.shape
    _, block_size, _, kv_heads, _ = store.shape
    group = heads // kv_heads
    padded_group = triton.next_power_of_2(group)
    if rows.most == 1:
        tokens_at_once, padded_group = 1, max(_MIN_ROWS, padded_group)
    else:
        tokens_at_once = max(1, _PROMPT_ROWS // padded_group)
        padded_group = max(_MIN_ROWS // tokens_at_once, padded_group)
    padded_dim = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device_of(query):
        _attend[(len(rows.lengths), kv_heads, triton.cdiv(rows.most, tokens_at_once))](
            query,
            store,
            rows.block_table,
            rows.begins,
            rows.lengths,
            out,
            rows.block_table.stride(0),
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
            tokens_at_once=tokens_at_once,
            padded_group=padded_group,
            padded_dim=padded_dim,
            keys_at_once=max(16, min(64, _TILE_BYTES // (padded_dim * store.itemsize))),
            capped=softcap is not None,
            windowed=window is not None,
            num_stages=2,
        )
