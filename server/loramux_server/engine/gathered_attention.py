"""Attention by torch's own operators over keys and values that were gathered from their blocks: runs on every device.

The decoding rows are one batch; each prompt chunk runs on its own. Where a kernel that reads the blocks in place has proven
itself (`attention_kernels.py`) it takes the place of one or both.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import Chunk, PagedBatch


def attend_decodes(
    query: torch.Tensor,
    paged: PagedBatch,
    layer: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One token per sequence over its cached keys and values: `[n, heads, d]` -> `[n, heads, d]`."""
    keys, values = paged.store.gather(layer, paged.block_table)
    # The query heads that share a KV head become query rows of it: no repeated keys.
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
    mask = paged.decode_mask(window, query.dtype)
    return _attend(grouped, keys, values, mask, scale, softcap).reshape(query.shape)


def attend_chunk(
    query: torch.Tensor,
    store: KVStore,
    layer: int,
    chunk: Chunk,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One prompt chunk against its own cached tokens: `[t, heads, d]` -> `[t, heads, d]`."""
    total = chunk.context + chunk.length
    keys, values = store.gather(layer, chunk.blocks[None])
    keys, values = keys[:, :, :total], values[:, :, :total]
    rows = query.transpose(0, 1)[None]
    repeats = rows.shape[1] // keys.shape[1]
    if repeats > 1:
        keys = keys.repeat_interleave(repeats, dim=1)
        values = values.repeat_interleave(repeats, dim=1)
    windowed = window is not None and total > window
    if chunk.context == 0 and not windowed and softcap is None:
        out = F.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=scale)
    else:
        positions = torch.arange(chunk.context, total, device=query.device)
        seen = torch.arange(total, device=query.device)
        hidden = seen[None, :] > positions[:, None]
        if window is not None:
            hidden |= seen[None, :] <= positions[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(
            hidden, -torch.inf
        )
        out = _attend(rows, keys, values, mask, scale, softcap)
    return out[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """`[b, h, q, d]` against `[b, h, L, d]`, `mask` is added; `softcap` squashes the scores to +-softcap (Gemma 2)."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(query.float(), keys.float().transpose(-2, -1)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), values.float()).to(query.dtype)
