"""The device tier's memory: rank rows of A and B for every linear, and the part of them a forward pass uses.

`fill` writes one adapter into its rows, from any thread, while other rows are in use. `select` cuts out the rows that
hold the active adapters, in pieces of neighbours; the cut is kept while they change little, and on CPUs its first
product is reordered for oneDNN once it has lasted. Which rows are whose is `residency.py`'s knowledge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from loramux_adapters.kernels import DenseKernel, zeros_on_demand
from loramux_adapters.layers import AdapterBatch, Expand, MultiLoraLinear, Part, Shrink
from loramux_adapters.residency import Slot

# Reordering costs about as much as it saves in five steps.
_STEADY_STEPS = 8

FactorMap = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


# A cut that was made for more adapters than are active now is kept while at least this share of its rows is theirs:
# masked rows cost arithmetic, a new cut costs a copy of it and, soon, another reordering.
_KEPT_SHARE = 0.5


# Rank rows of a piece on CPUs, where arithmetic for foreign rows takes longer than the calls it would spare. GPUs take
# all in one: reading the factors is what takes time there.
_CPU_PIECE_ROWS = 64


class _Piece:
    """Neighbouring adapters and the rank rows from the first's to the last's, ready to multiply with."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.start = slots[0].offset
        self.stop = slots[-1].offset + slots[-1].rows
        self.span = self.stop - self.start
        self.shrinks: dict[int, Shrink] = {}
        self.expands: dict[str, Expand] = {}

    def foreign(self, rows: Sequence[str | None]) -> torch.Tensor | None:
        """`[rows, span]` bool, True where the rank row is not the row's own adapter's; None if all are one adapter's."""
        if len(self.slots) == 1:
            return None
        table = torch.ones(len(self.slots), self.span, dtype=torch.bool)
        index: dict[str | None, int] = {}
        for number, slot in enumerate(self.slots):
            begin = slot.offset - self.start
            table[number, begin : begin + slot.rows] = False
            index[slot.generation] = number
        return table[torch.tensor([index[row] for row in rows])]


@dataclass
class _Cut:
    """The pieces that serve a pass, and the adapters that lay in them when they were made."""

    slots: tuple[Slot, ...]  # by offset
    pieces: list[_Piece]
    steps: int = 0  # passes it has served

    def __post_init__(self) -> None:
        self._places = {(slot.generation, slot.offset) for slot in self.slots}
        self._piece_of = {slot.generation: piece for piece in self.pieces for slot in piece.slots}

    def serves(self, active: Sequence[Slot]) -> bool:
        """True if every active adapter is in it, and not too much else."""
        if any((slot.generation, slot.offset) not in self._places for slot in active):
            return False
        return sum(slot.rows for slot in active) >= _KEPT_SHARE * sum(slot.rows for slot in self.slots)

    def parts(self, rows: Sequence[str | None], device: torch.device) -> list[Part]:
        """One for each run of rows of the same piece: rows in the order of `slots` make the fewest."""
        if len(self.slots) == 1 and None not in rows:
            return [Part(slice(None), self.pieces[0].shrinks, self.pieces[0].expands, None)]
        parts: list[Part] = []
        end = 0
        for piece, run in groupby(rows, lambda row: None if row is None else self._piece_of[row]):
            names = list(run)
            begin, end = end, end + len(names)
            if piece is not None:
                foreign = piece.foreign(names)
                if foreign is not None:
                    foreign = foreign.to(device, non_blocking=True)
                parts.append(Part(slice(begin, end), piece.shrinks, piece.expands, foreign))
        return parts


def _pieces(slots: Sequence[Slot], most: int | None) -> list[_Piece]:
    """Split after as many adapters as together span `most` rows; an adapter is never split."""
    pieces: list[list[Slot]] = []
    for slot in slots:
        if pieces and (most is None or slot.offset + slot.rows - pieces[-1][0].offset <= most):
            pieces[-1].append(slot)
        else:
            pieces.append([slot])
    return [_Piece(piece) for piece in pieces]


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
        self._cut: _Cut | None = None

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
        """Make the batch use `slots`, by offset, for the next pass; `rows` names each row's generation or None.

        The single name of one adapter that is alone stands for all rows.
        """
        if not slots:
            self._batch.select(())
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
        self._batch.select(cut.parts(rows, self.device))

    def _make_cut(self, slots: Sequence[Slot], targeted: Collection[str], *, prepack: bool) -> _Cut:
        pieces = _pieces(slots, _CPU_PIECE_ROWS if self.device.type == "cpu" else None)
        for piece in pieces:
            self._cut_out(piece, targeted, prepack=prepack)
        return _Cut(tuple(slots), pieces)

    def _cut_out(self, piece: _Piece, targeted: Collection[str], *, prepack: bool) -> None:
        for number, (group, pool) in enumerate(zip(self._groups, self._a, strict=True)):
            members = [member for member, name in enumerate(group) if name in targeted]
            if not members:
                continue
            parts = [pool[member, piece.start : piece.stop] for member in members]
            stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
            piece.shrinks[number] = Shrink(DenseKernel(stacked, prepack=prepack), len(members))
            for position, member in enumerate(members):
                columns = slice(position * piece.span, (position + 1) * piece.span)
                b = self._b[group[member]][piece.start : piece.stop]
                piece.expands[group[member]] = Expand(number, columns, b)
