"""The rows of the active adapters side by side, in memory that never moves: what a recorded forward pass reads.

A CUDA graph replays kernels with the addresses they were recorded with. The pool's cuts come and go, so a graph reads a
stack: `arrange` copies into its first rows what is not there yet, and `select` makes the next forward pass, recorded or not,
multiply with those rows. Adapters that left keep theirs until others need them: their columns are masked, as are rows that
hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.kernels import DenseKernel
from loramux_adapters.layers import Expand, Shrink
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import RowPool, Slot


class AdapterStack:
    """As large as the pool that it copies from. Only the thread that owns the device uses it."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self._a = [torch.zeros(a.numel(), dtype=a.dtype, device=a.device) for a in pool.a]
        self._b = {name: torch.zeros_like(b) for name, b in pool.b.items()}
        self._rows = 0  # of the stack, in use
        self._free = RowPool(0)
        self._places: dict[str, tuple[int, int]] = {}  # generation -> first row, rows
        self._selections: dict[int, tuple[dict[int, Shrink], dict[str, Expand]]] = {}

    @property
    def rows(self) -> int:
        """Of the latest arrangement."""
        return self._rows

    def arrange(self, slots: Sequence[Slot], rows: int) -> None:
        """Have all of `slots` within the first `rows` rows, which they must fit. What lies there already stays."""
        if rows != self._rows:
            self._clear(rows)
        missing = [slot for slot in slots if slot.generation not in self._places]
        if not missing:
            return
        wanted = {slot.generation for slot in slots}
        for generation in [one for one in self._places if one not in wanted]:
            self._free.release(*self._places.pop(generation))
        if not all(self._place(slot) for slot in missing):  # there is room, but not in one place
            self._clear(rows)
            if not all(self._place(slot) for slot in slots):
                raise AssertionError(f"{sum(slot.rows for slot in slots)} rank rows do not fit {rows}")

    def select(self, rows: int, foreign: torch.Tensor | None) -> None:
        """Make the batch use the first `rows` rows and the mask `foreign` `[tokens, rows]`; the base alone if 0."""
        if not rows:
            self._pool.batch.select({}, {}, None)
            return
        if rows not in self._selections:
            self._selections[rows] = self._selection(rows)
        self._pool.batch.select(*self._selections[rows], foreign)

    def foreign(self, generations: Sequence[str | None]) -> torch.Tensor:
        """`[tokens, rows]` bool on the CPU, True where a rank row is not the token's own adapter's."""
        mask = torch.ones(len(generations), self._rows, dtype=torch.bool)
        for token, generation in enumerate(generations):
            if generation is not None:
                offset, count = self._places[generation]
                mask[token, offset : offset + count] = False
        return mask

    def _clear(self, rows: int) -> None:
        self._rows, self._free = rows, RowPool(rows)
        self._places.clear()

    def _place(self, slot: Slot) -> bool:
        """Copy an adapter to where there is room for it; False if there is none."""
        offset = self._free.allocate(slot.rows)
        if offset is None:
            return False
        source = slice(slot.offset, slot.offset + slot.rows)
        target = slice(offset, offset + slot.rows)
        for a, pool in zip(self._views(self._rows), self._pool.a, strict=True):
            a[:, target].copy_(pool[:, source])
        for name, pool in self._pool.b.items():
            self._b[name][target].copy_(pool[source])
        self._places[slot.generation] = (offset, slot.rows)
        return True

    def _views(self, rows: int) -> list[torch.Tensor]:
        """A of each group, `[members, rows, in]`, from the beginning of its memory."""
        return [
            flat[: pool.shape[0] * rows * pool.shape[2]].view(pool.shape[0], rows, pool.shape[2])
            for flat, pool in zip(self._a, self._pool.a, strict=True)
        ]

    def _selection(self, rows: int) -> tuple[dict[int, Shrink], dict[str, Expand]]:
        shrinks: dict[int, Shrink] = {}
        expands: dict[str, Expand] = {}
        for number, (group, a) in enumerate(zip(self._pool.groups, self._views(rows), strict=True)):
            shrinks[number] = Shrink(DenseKernel(a.flatten(0, 1), prepack=False), len(group))
            for member, name in enumerate(group):
                columns = slice(member * rows, (member + 1) * rows)
                expands[name] = Expand(number, columns, self._b[name][:rows])
        return shrinks, expands
