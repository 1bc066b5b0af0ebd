"""Attention of a training batch, whose samples lie end to end in one row: each attends to itself alone.

An attention function that transformers' own modeling code calls. There is no padding and no mask over the whole row:
every sample is a causal product of its own, so one cannot see another. A row comes in pieces (`pieces.py`); part of a cut
sample also attends to the parts before it. Grouped-query heads, sliding windows and score capping are honoured; any
other argument an architecture passes is refused by name. Differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from loramux_adapters.errors import BaseModelError
from loramux_adapters.training.pieces import Piece

NAME = "loramux_training"

# Arguments that change nothing here: positions are in the rotary embedding, dropout is 0 in evaluation mode.
_HARMLESS = frozenset(
    {
        *("dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"),
        *("output_hidden_states", "return_dict", "past_key_values", "position_embeddings", "layer_idx"),
    }
)


def segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    piece: Piece,
    computed_in: torch.dtype,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query `[1, heads, T, d]`, key and value `[1, kv_heads, T, d]` -> `[1, T, heads, d]`."""
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None:
        named = ", ".join(unknown) or "attention_mask"
        raise BaseModelError(
            f"{type(module).__name__} passes '{named}' to attention, which training does not honour"
        )
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    parts = []
    for start, length in piece.segments:
        q, k, v = (tensor[:, :, start : start + length].to(computed_in) for tensor in (query, key, value))
        if piece.carried is not None:
            k, v = piece.carried.extend(k, v)
        parts.append(_attend(q, k, v, scale, sliding_window, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """The last positions of one sample, `[1, heads, t, d]`, with all of it so far."""
    length = k.shape[2]
    windowed = window is not None and length > window
    repeats = q.shape[1] // k.shape[1]
    if softcap is None and not windowed and q.shape[2] == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=repeats > 1)
    positions = torch.arange(length, device=q.device)
    distance = positions[length - q.shape[2] :, None] - positions[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=repeats > 1)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(q.float(), k.float().transpose(-2, -1)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.matmul(weights, v.float()).to(q.dtype)


AttentionInterface.register(NAME, segmented_attention)
