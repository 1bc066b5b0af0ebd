"""The fixed addresses at which a recorded step finds its rows: tokens, places in the cache, and what each may see.

Rows lie as in a step (`paged_batch.py`): those that decode, and behind them, if the step has one, a part of a prompt. Both
are filled up to a size with rows of one token in nobody's block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.transfer import sendable
from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import AttentionKernels, Chunk, PagedBatch, Ragged


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a recorded step: so many that decode, then so many of one prompt."""

    decoding: int
    part: int

    def __str__(self) -> str:
        beside = f" beside {self.part} of a prompt" if self.part else ""
        return f"{self.decoding} rows{beside}"

    @property
    def rows(self) -> int:
        return self.decoding + self.part


class RecordedInputs:
    def __init__(self, store: KVStore, kernels: AttentionKernels, *, max_rows: int, max_blocks: int) -> None:
        """`max_blocks` of one sequence."""
        self._store = store
        self._kernels = kernels
        self._nobodys_slot = store.nobodys * store.block_size
        device = store.layers[0].device
        self.tokens = torch.zeros(1, max_rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(1, max_rows, dtype=torch.long, device=device)
        self.slots = torch.zeros(max_rows, dtype=torch.long, device=device)
        self._lengths = torch.ones(max_rows, dtype=torch.long, device=device)
        self._table = torch.zeros(max_rows, max_blocks, dtype=torch.long, device=device)
        self._part = Ragged(
            torch.zeros(1, max_blocks, dtype=torch.long, device=device),
            torch.zeros(2, dtype=torch.long, device=device),
            torch.ones(1, dtype=torch.long, device=device),
            most=0,
        )

    def fill(self, shape: Shape, tokens: Sequence[int], positions: Sequence[int], paged: PagedBatch) -> None:
        """With a step's, which is on the CPU, and from there on with nobody's."""
        count, width = paged.block_table.shape
        self._fill_rows(0, tokens[:count], positions[:count], paged.slots[:count])
        _put(self._lengths[:count], paged.lengths)
        _put(self._table[:count, :width], paged.block_table)
        for chunk in paged.chunks:
            self._fill_rows(shape.decoding, tokens[count:], positions[count:], paged.slots[count:])
            _put(self._part.block_table[0, : len(chunk.blocks)], chunk.blocks)
            _put(self._part.lengths, torch.tensor([chunk.context + chunk.length]))
        self.fill_up(shape, count, len(tokens) - count)

    def fill_up(self, shape: Shape, count: int, length: int) -> None:
        """With nobody's rows behind `count` that decode and `length` of a part."""
        self._lengths[count : shape.decoding] = 1
        self._table[count : shape.decoding] = self._store.nobodys
        self._nobodys_rows(slice(count, shape.decoding))
        if shape.part:
            end = shape.decoding + length
            self._nobodys_rows(slice(end, shape.rows))
            _put(self._part.begins, torch.tensor([shape.decoding, end]))

    def _fill_rows(
        self, begin: int, tokens: Sequence[int], positions: Sequence[int], slots: torch.Tensor
    ) -> None:
        rows = slice(begin, begin + len(tokens))
        _put(self.tokens[0, rows], torch.tensor(tokens))
        _put(self.positions[0, rows], torch.tensor(positions))
        _put(self.slots[rows], slots)

    def _nobodys_rows(self, rows: slice) -> None:
        self.tokens[0, rows] = 0
        self.positions[0, rows] = 0
        self.slots[rows] = self._nobodys_slot

    def batch(self, shape: Shape) -> PagedBatch:
        """That reads what `fill` wrote."""
        part = Ragged(self._part.block_table, self._part.begins, self._part.lengths, most=shape.part)
        return PagedBatch(
            slots=self.slots[: shape.rows],
            begun=self.slots[:0],
            num_decodes=shape.decoding,
            block_table=self._table[: shape.decoding],
            lengths=self._lengths[: shape.decoding],
            chunks=[Chunk(shape.decoding, shape.part, 0, part.block_table[0])] if shape.part else [],
            store=self._store,
            kernels=self._kernels,
            given_prompts=part,
        )

    def written(self, shape: Shape) -> torch.Tensor:
        """`[n, numbers]`: the last layer's keys and values of all rows that are somebody's."""
        cache, places = self._last_layer(shape)
        return cache[places]

    def unwrite(self, shape: Shape) -> None:
        cache, places = self._last_layer(shape)
        cache[places] = 0

    def _last_layer(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        slots, last = self.slots[: shape.rows], self._store.layers[-1]
        return last.flatten(0, 1).flatten(1), slots[slots != self._nobodys_slot]


def _put(own: torch.Tensor, new: torch.Tensor) -> None:
    own.copy_(sendable(new, own.device), non_blocking=True)
