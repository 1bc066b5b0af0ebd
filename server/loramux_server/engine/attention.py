"""Attention over a block-based KV cache, as an attention function that transformers' own modeling code calls.

A step's keys and values are written to their blocks, then the decoding rows and the prompts' attend, each by the kernel
that has proven itself on the device (`attention_kernels.py`) or else by torch's operators (`gathered_attention.py`).
Grouped-query heads, sliding windows and score capping are honoured; any other argument an architecture passes (sinks,
say) is refused by name, because ignoring it would give wrong answers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AttentionInterface

from loramux_adapters.errors import BaseModelError
from loramux_server.engine.gathered_attention import attend_chunk, attend_decodes
from loramux_server.engine.paged_batch import PagedBatch

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
    store, kernels, n = paged.store, paged.kernels, paged.num_decodes
    store.write(layer, paged.slots, paged.begun, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    options: dict[str, Any] = {"scale": scale, "window": sliding_window, "softcap": softcap}
    if n and kernels.decode is not None:
        kernels.decode(rows, store.layers[layer], paged.decoding, out, **options)
    elif n:
        out[:n] = attend_decodes(rows[:n], paged, layer, **options)
    if paged.chunks and kernels.prefill is not None:
        kernels.prefill(rows, store.layers[layer], paged.prompts, out, **options)
    else:
        for chunk in paged.chunks:
            own = slice(chunk.start, chunk.start + chunk.length)
            out[own] = attend_chunk(rows[own], store, layer, chunk, **options)
    return out[None], None


AttentionInterface.register(NAME, paged_attention)
