"""Where the rows of one step belong: which sequence, which blocks, how much of them each row may see.

All tokens of a step travel as one row `[1, T]`: decoding sequences first, a row for each of their tokens, then the chunks of
prompts, one after the other. What attention derives from that is derived once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from loramux_adapters.transfer import on_device, sent
from loramux_server.engine.kv_store import KVStore


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of one sequence, at rows `start..` of the step, `context` tokens of it cached before them."""

    start: int
    length: int
    context: int
    blocks: torch.Tensor  # [ceil((context + length) / block_size)] int64


@dataclass(frozen=True, slots=True)
class Ragged:
    """Neighbouring rows of a step as an attention kernel takes them: `n` sequences with some rows each."""

    block_table: torch.Tensor  # [n, max_blocks] int64
    begins: torch.Tensor  # [n + 1] int64: sequence i has rows begins[i] up to begins[i + 1]
    lengths: torch.Tensor  # [n] int64: tokens that its last row may attend to, its own included
    most: int  # rows of the longest


class AttentionKernel(Protocol):
    """Attention that reads the blocks where they lie, as `triton_attention.paged_attention`."""

    def __call__(
        self,
        query: torch.Tensor,
        store: torch.Tensor,
        rows: Ragged,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """What attends for decoding rows and for prompts; None: torch's operators over gathered keys and values."""

    decode: AttentionKernel | None = None
    prefill: AttentionKernel | None = None


@dataclass
class PagedBatch:
    """Decoding sequences are the first `num_decodes` rows."""

    slots: torch.Tensor  # [T] int64: flat cache position of each row
    begun: torch.Tensor  # [n] int64: blocks whose first rows come in this step, and whose last do not
    num_decodes: int
    block_table: torch.Tensor  # [num_decodes, max_blocks] int64
    lengths: torch.Tensor  # [num_decodes] int64: tokens each may attend to, its own included
    chunks: SequenceOf[Chunk]
    store: KVStore
    kernels: AttentionKernels = AttentionKernels()
    given_prompts: Ragged | None = (
        None  # where the prompts' rows are, if `chunks` only say that there are some
    )
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`[num_decodes, 1, 1, L]` to add to the scores, -inf where a key may not be seen; one for all layers of a kind."""
        if window not in self._masks:
            padded = self.block_table.shape[1] * self.store.block_size
            keys = torch.arange(padded, device=self.lengths.device)
            hidden = keys[None, :] >= self.lengths[:, None]
            if window is not None:
                hidden |= keys[None, :] < self.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]

    def to(self, device: torch.device) -> PagedBatch:
        return replace(
            self,
            slots=sent(self.slots, device),
            begun=sent(self.begun, device),
            block_table=sent(self.block_table, device),
            lengths=sent(self.lengths, device),
            chunks=[replace(chunk, blocks=sent(chunk.blocks, device)) for chunk in self.chunks],
            _masks={},
        )

    @cached_property
    def decoding(self) -> Ragged:
        begins = torch.arange(self.num_decodes + 1, device=self.lengths.device)
        return Ragged(self.block_table, begins, self.lengths, most=1)

    @cached_property
    def prompts(self) -> Ragged:
        if self.given_prompts is not None:
            return self.given_prompts
        width = max(len(chunk.blocks) for chunk in self.chunks)
        # A sequence's table is filled up with its own first block: what is masked must still be a number.
        table = [
            torch.cat([one.blocks, one.blocks[:1].expand(width - len(one.blocks))]) for one in self.chunks
        ]
        ends = [chunk.start + chunk.length for chunk in self.chunks]
        device = self.slots.device
        return Ragged(
            torch.stack(table),
            on_device([self.chunks[0].start, *ends], device),
            on_device([chunk.context + chunk.length for chunk in self.chunks], device),
            most=max(chunk.length for chunk in self.chunks),
        )
