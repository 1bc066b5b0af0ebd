"""The device tier's memory: rank rows of A and B for every linear, and the part of them a forward pass uses.

`fill` writes one adapter into its rows, from any thread, while other rows are in use. `select` cuts out the span of rows
that holds the active adapters; the cut is kept for as long as the same adapters are active, and on CPUs its first
product is reordered for oneDNN once it has lasted. Which rows are whose is `residency.py`'s knowledge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from loramux_adapters.kernels import DenseKernel, zeros_on_demand
from loramux_adapters.layers import AdapterBatch, Expand, MultiLoraLinear, Shrink
from loramux_adapters.residency import Slot

# Reordering costs about as much as it saves in five steps.
_STEADY_STEPS = 8

FactorMap = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class DevicePool:
    """A `[members, rows, in]` per group of linears that share an input, B `[rows, out]` per linear."""

    def __init__(
        self,
        layers: Mapping[str, MultiLoraLinear],
        groups: Sequence[tuple[str, ...]],
        batch: AdapterBatch,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        self._groups = groups
        self._batch = batch
        self._a = [
            zeros_on_demand((len(group), rows, layers[group[0]].in_features), dtype, device)
            for group in groups
        ]
        self._b = {
            n: zeros_on_demand((rows, layer.out_features), dtype, device) for n, layer in layers.items()
        }
        self.row_bytes = (
            sum(layer.in_features + layer.out_features for layer in layers.values()) * dtype.itemsize
        )
        self._key: tuple[tuple[str, int], ...] = ()
        self._steady = 0
        self._start = 0
        self._shrinks: dict[int, Shrink] = {}
        self._expands: dict[str, Expand] = {}

    def fill(self, slot: Slot, factors: FactorMap) -> None:
        """Write an adapter's A `[r, in]` and B `[r, out]` into its rows, zero where it has none."""
        begin, end = slot.offset, slot.offset + slot.rows
        for group, pool in zip(self._groups, self._a, strict=True):
            for member, name in enumerate(group):
                rows = pool[member, begin:end]
                if name not in factors:
                    rows.zero_()  # zero A makes the product zero, whatever B held before
                    continue
                a, b = factors[name]
                rows[: a.shape[0]].copy_(a, non_blocking=True)
                rows[a.shape[0] :].zero_()
                self._b[name][begin : begin + b.shape[0]].copy_(b, non_blocking=True)

    def select(self, rows: Sequence[str | None], slots: Sequence[Slot], targeted: Collection[str]) -> None:
        """Make the batch use `slots`, by offset, for the next pass; `rows` names each row's generation or None."""
        if not slots:
            self._batch.select({}, {}, None)
            return
        key = tuple((slot.generation, slot.offset) for slot in slots)
        if key != self._key:
            self._key, self._steady = key, 0
            self._cut(slots[0].offset, slots[-1].offset + slots[-1].rows, targeted, prepack=False)
        elif self.device.type == "cpu":
            self._steady += 1
            if self._steady == _STEADY_STEPS:
                self._cut(slots[0].offset, slots[-1].offset + slots[-1].rows, targeted, prepack=True)
        same = len(slots) == 1 and None not in rows
        self._batch.select(self._shrinks, self._expands, None if same else self._foreign(rows, slots))

    def _cut(self, start: int, stop: int, targeted: Collection[str], *, prepack: bool) -> None:
        self._start = start
        self._shrinks, self._expands = {}, {}
        span = stop - start
        for number, (group, pool) in enumerate(zip(self._groups, self._a, strict=True)):
            members = [member for member, name in enumerate(group) if name in targeted]
            if not members:
                continue
            parts = [pool[member, start:stop] for member in members]
            stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._shrinks[number] = Shrink(DenseKernel(stacked, prepack=prepack), len(members))
            for position, member in enumerate(members):
                columns = slice(position * span, (position + 1) * span)
                self._expands[group[member]] = Expand(number, columns, self._b[group[member]][start:stop])

    def _foreign(self, rows: Sequence[str | None], slots: Sequence[Slot]) -> torch.Tensor:
        """`[rows, R]` bool, True where the rank row is not the row's own adapter's."""
        table = torch.ones(len(slots) + 1, slots[-1].offset + slots[-1].rows - self._start, dtype=torch.bool)
        index: dict[str | None, int] = {None: 0}
        for number, slot in enumerate(slots, 1):
            begin = slot.offset - self._start
            table[number, begin : begin + slot.rows] = False
            index[slot.generation] = number
        picks = torch.tensor([index[row] for row in rows])
        return table[picks].to(self.device, non_blocking=True)
