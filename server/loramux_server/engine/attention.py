"""Attention over a block-based KV cache, as an attention function that transformers' own modeling code calls.

All tokens of a step travel as one row `[1, T]`; `PagedBatch` says which sequence each belongs to and where its keys and
values go. Layout follows PagedAttention (Kwon et al. 2023, https://arxiv.org/abs/2309.06180): a block holds
`block_size` tokens of one sequence. The decode part runs as one batch: a kernel reads the blocks where they lie, if there is
one (`decode_kernel.py`), or they are gathered; each prompt chunk runs on its own. Grouped-query heads, sliding windows and
score capping are honoured; any other argument an architecture passes (sinks, say) is refused by name, because ignoring it
would give wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from loramux_adapters.errors import BaseModelError
from loramux_adapters.kernels import zeros_on_demand
from loramux_server.engine.decode_kernel import DecodeKernel

NAME = "loramux_paged"

# Arguments transformers passes to every attention function that do not change what a causal decoder computes here:
# positions are in the batch, dropout is 0 in evaluation, the rest belongs to other attention functions.
_HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "past_key_values",
        "position_embeddings",
        "layer_idx",
    }
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of one sequence, at rows `start..` of the step, `context` tokens of it cached before them."""

    start: int
    length: int
    context: int
    blocks: torch.Tensor  # [ceil((context + length) / block_size)] int64


@dataclass(slots=True)
class PagedBatch:
    """Where the rows of one step belong. Decoding sequences are the first `num_decodes` rows."""

    slots: torch.Tensor  # [T] int64: flat cache position of each row
    begun: torch.Tensor  # [n] int64: blocks whose first rows come in this step, and whose last do not
    num_decodes: int
    block_table: torch.Tensor  # [num_decodes, max_blocks] int64
    lengths: torch.Tensor  # [num_decodes] int64: tokens each may attend to, its own included
    chunks: SequenceOf[Chunk]
    cache: KVCache
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`[num_decodes, 1, 1, L]` to add to the scores, -inf where a key may not be seen; one for all layers of a kind."""
        if window not in self._masks:
            padded = self.block_table.shape[1] * self.cache.block_size
            keys = torch.arange(padded, device=self.lengths.device)
            hidden = keys[None, :] >= self.lengths[:, None]
            if window is not None:
                hidden |= keys[None, :] < self.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


class KVCache:
    """Keys and values of every layer: per layer `[num_blocks, block_size, 2, kv_heads, head_dim]`."""

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: DecodeKernel | None = None,
    ) -> None:
        """`decode` attends for decoding sequences; without one their blocks are gathered."""
        self.block_size = block_size
        self.decode = decode
        shape = (num_blocks, block_size, 2, kv_heads, head_dim)
        self.layers = [zeros_on_demand(shape, dtype, device) for _ in range(layers)]

    def write(
        self, layer: int, slots: torch.Tensor, begun: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store `[T, kv_heads, head_dim]` keys and values at flat positions `slots [T]`.

        The blocks `begun` are cleared before: decoding reads them whole, and what their last owner left may be NaN,
        which no mask takes out of a sum.
        """
        if len(begun):
            self.layers[layer].index_fill_(0, begun, 0.0)
        flat = self.layers[layer].view(-1, 2, *self.layers[layer].shape[3:])
        flat[slots] = torch.stack((key, value), dim=1)

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `[..., n]` blocks as `[..., kv_heads, n * block_size, head_dim]` views of one copy."""
        store = self.layers[layer]
        picked = store.index_select(0, blocks.reshape(-1))
        picked = picked.view(*blocks.shape[:-1], -1, 2, *store.shape[3:])
        key, value = picked.unbind(-3)
        return key.transpose(-3, -2), value.transpose(-3, -2)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query `[1, heads, T, head_dim]`, key and value `[1, kv_heads, T, head_dim]` -> `[1, T, heads, head_dim]`."""
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None:
        named = ", ".join(unknown) or "attention_mask"
        raise BaseModelError(
            f"{type(module).__name__} passes '{named}' to attention, which loramux does not honour"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    cache = paged.cache
    cache.write(layer, paged.slots, paged.begun, key[0].transpose(0, 1), value[0].transpose(0, 1))
    out = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)
    n = paged.num_decodes
    if n and cache.decode is not None:
        cache.decode(
            query[0, :, :n].transpose(0, 1),
            cache.layers[layer],
            paged.block_table,
            paged.lengths,
            out[:n],
            scale=scale,
            window=sliding_window,
            softcap=softcap,
        )
    elif n:
        keys, values = cache.gather(layer, paged.block_table)
        # The query heads that share a KV head become query rows of it: no repeated keys.
        grouped = query[0, :, :n].transpose(0, 1).reshape(n, keys.shape[1], -1, query.shape[-1])
        mask = paged.decode_mask(sliding_window, query.dtype)
        out[:n] = _attend(grouped, keys, values, mask, scale, softcap).reshape(n, *out.shape[1:])
    for chunk in paged.chunks:
        rows = slice(chunk.start, chunk.start + chunk.length)
        out[rows] = _attend_chunk(query[:, :, rows], cache, layer, chunk, scale, sliding_window, softcap)
    return out[None], None


def _attend_chunk(
    query: torch.Tensor,
    cache: KVCache,
    layer: int,
    chunk: Chunk,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One prompt chunk against its own cached tokens: `[1, heads, t, d]` -> `[t, heads, d]`."""
    total = chunk.context + chunk.length
    keys, values = cache.gather(layer, chunk.blocks[None])
    keys, values = keys[:, :, :total], values[:, :, :total]
    repeats = query.shape[1] // keys.shape[1]
    if repeats > 1:
        keys = keys.repeat_interleave(repeats, dim=1)
        values = values.repeat_interleave(repeats, dim=1)
    windowed = window is not None and total > window
    if chunk.context == 0 and not windowed and softcap is None:
        out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    else:
        positions = torch.arange(chunk.context, total, device=query.device)
        seen = torch.arange(total, device=query.device)
        hidden = seen[None, :] > positions[:, None]
        if window is not None:
            hidden |= seen[None, :] <= positions[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(
            hidden, -torch.inf
        )
        out = _attend(query, keys, values, mask, scale, softcap)
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


AttentionInterface.register(NAME, paged_attention)
