"""The device tier's memory: rank rows of A and B for every linear, and the part of them a forward pass uses.

`fill` writes one adapter into its rows, from any thread, while other rows are in use. `select` cuts out the span of rows
that holds the active adapters; the cut is kept while they change little, and on CPUs its first product is reordered for
oneDNN once it has lasted. With compiled kernels no pass needs a cut: each row reads the pool, and its result does not depend
on who else is in the pass. Which rows are whose is `residency.py`'s knowledge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loramux_adapters.kernels import DenseKernel, zeros_on_demand
from loramux_adapters.layers import AdapterBatch, Expand, MultiLoraLinear, Shrink
from loramux_adapters.native.library import Native
from loramux_adapters.native.row_adapters import row_adapters
from loramux_adapters.residency import Slot
from loramux_adapters.transfer import sent

# Reordering costs about as much as it saves in five steps.
_STEADY_STEPS = 8

FactorMap = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


# A cut that was made for more adapters than are active now is kept while at least this share of its rows is theirs:
# masked rows cost arithmetic, a new cut costs a copy of it and, soon, another reordering.
_KEPT_SHARE = 0.5


@dataclass
class _Cut:
    """A span of rank rows, ready to multiply with, and the adapters that lay in it when it was made."""

    slots: tuple[Slot, ...]  # by offset
    shrinks: dict[int, Shrink] = field(default_factory=dict)
    expands: dict[str, Expand] = field(default_factory=dict)
    steps: int = 0  # passes it has served

    def __post_init__(self) -> None:
        self.start = self.slots[0].offset
        self.stop = self.slots[-1].offset + self.slots[-1].rows
        self.span = self.stop - self.start
        self._places = {(slot.generation, slot.offset) for slot in self.slots}

    def serves(self, active: Sequence[Slot]) -> bool:
        """True if every active adapter is in it, and not too much else."""
        if any((slot.generation, slot.offset) not in self._places for slot in active):
            return False
        return sum(slot.rows for slot in active) >= _KEPT_SHARE * sum(slot.rows for slot in self.slots)


class DevicePool:
    """`a`: `[members, rows, in]` for each of `groups`, linears that share an input; `b`: `[rows, out]` for each linear."""

    def __init__(
        self,
        layers: Mapping[str, MultiLoraLinear],
        groups: Sequence[tuple[str, ...]],
        batch: AdapterBatch,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        native: Native | None = None,
    ) -> None:
        self.device = device
        self.groups = groups
        self.batch = batch
        self.a = [
            zeros_on_demand((len(group), rows, layers[group[0]].in_features), dtype, device)
            for group in groups
        ]
        self.b = {
            n: zeros_on_demand((rows, layer.out_features), dtype, device) for n, layer in layers.items()
        }
        self.row_bytes = (
            sum(layer.in_features + layer.out_features for layer in layers.values()) * dtype.itemsize
        )
        self.memory = {  # of each linear, A and B
            name: (pool[member], self.b[name])
            for group, pool in zip(groups, self.a, strict=True)
            for member, name in enumerate(group)
        }
        self.by_rows = row_adapters(native, self.memory)
        self._cut: _Cut | None = None

    def fill(self, slot: Slot, factors: FactorMap) -> None:
        """Write an adapter's A `[r, in]` and B `[r, out]` into its rows, zero where it has none."""
        begin, end = slot.offset, slot.offset + slot.rows
        for group, pool in zip(self.groups, self.a, strict=True):
            for member, name in enumerate(group):
                rows = pool[member, begin:end]
                if name not in factors:
                    rows.zero_()  # zero A makes the product zero, whatever B held before
                    continue
                a, b = factors[name]
                rows[: a.shape[0]].copy_(a, non_blocking=True)
                rows[a.shape[0] :].zero_()
                self.b[name][begin : begin + b.shape[0]].copy_(b, non_blocking=True)

    def select(self, rows: Sequence[str | None], slots: Sequence[Slot], targeted: Collection[str]) -> None:
        """Make the batch use `slots`, by offset, for the next pass; `rows` names each row's generation or None."""
        if not slots:
            self.batch.select({}, {}, None)
            return
        if self.by_rows is not None:
            self.by_rows.select(rows, slots, targeted)
            self.batch.select_rows(self.by_rows)
            return
        cut = self._cut
        if cut is None or not cut.serves(slots):
            self._cut = cut = self._make_cut(slots, targeted, prepack=False)
        elif self.device.type == "cpu":
            cut.steps += 1
            if cut.steps == _STEADY_STEPS:
                # Only of who is active now: an adapter that has left may have been overwritten in its rows.
                self._cut = cut = self._make_cut(slots, targeted, prepack=True)
                cut.steps = _STEADY_STEPS
        same = len(cut.slots) == 1 and None not in rows
        self.batch.select(cut.shrinks, cut.expands, None if same else self._foreign(rows, cut))

    def _make_cut(self, slots: Sequence[Slot], targeted: Collection[str], *, prepack: bool) -> _Cut:
        cut = _Cut(tuple(slots))
        for number, (group, pool) in enumerate(zip(self.groups, self.a, strict=True)):
            members = [member for member, name in enumerate(group) if name in targeted]
            if not members:
                continue
            parts = [pool[member, cut.start : cut.stop] for member in members]
            stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
            cut.shrinks[number] = Shrink(DenseKernel(stacked, prepack=prepack), len(members))
            for position, member in enumerate(members):
                columns = slice(position * cut.span, (position + 1) * cut.span)
                b = self.b[group[member]][cut.start : cut.stop]
                cut.expands[group[member]] = Expand(number, columns, b)
        return cut

    def _foreign(self, rows: Sequence[str | None], cut: _Cut) -> torch.Tensor:
        """`[rows, span]` bool, True where the rank row is not the row's own adapter's."""
        table = torch.ones(len(cut.slots) + 1, cut.span, dtype=torch.bool)
        index: dict[str | None, int] = {None: 0}
        for number, slot in enumerate(cut.slots, 1):
            begin = slot.offset - cut.start
            table[number, begin : begin + slot.rows] = False
            index[slot.generation] = number
        picks = torch.tensor([index[row] for row in rows])
        return sent(table[picks], self.device)
