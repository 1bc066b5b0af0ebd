"""How the adapters of a recorded decoding step are found: at addresses that a recording can keep.

Either the active ones are copied into a stack (`loramux_adapters.stack`) and multiplied as one, foreign entries masked; or
each row is multiplied with its own factors where they lie in the pool, which never move, and what a step changes is a table
of which rows those are. CPUs with compiled kernels do the second, CUDA for each number of active rank rows what was faster
when it was tried (`loramux_adapters.row_choice`). A step is recorded once for a number of rows and for a *kind*: of the
stack how many rank rows, of the pool which linears; none is the base alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Sequence
from typing import Protocol

import torch

from loramux_adapters.bank import AdapterBank
from loramux_adapters.residency import Slot
from loramux_adapters.row_adapters import RowAdapters, Tiles, tiles_of
from loramux_adapters.row_choice import Seconds, choose_by_rows
from loramux_adapters.stack import AdapterStack
from loramux_adapters.transfer import sendable

Rows = Sequence[str | None]  # the generation of each

_TIMED_ROWS = 32


class RecordedAdapters(Protocol):
    def choose(self, rows: Rows) -> Hashable:
        """The kind of a step of these rows, whose adapters are where it will look for them. False if it has none."""
        ...

    def fill(self, rows: Rows, size: int, kind: Hashable) -> None:
        """The inputs of a step of `size` rows, of which those after `rows` are nobody's."""
        ...

    def select(self, size: int, kind: Hashable) -> None:
        """Make the next forward pass read those inputs."""
        ...

    def describe(self, kind: Hashable) -> str: ...


def doubling_up_to(most: int, least: int = 16) -> list[int]:
    """Numbers of rank rows that are recorded besides none."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


class StackedAdapters:
    """A kind is the number of rank rows in the stack."""

    def __init__(self, bank: AdapterBank, max_rows: int) -> None:
        self._bank = bank
        self.stack = AdapterStack(bank.pool)
        self.sizes = doubling_up_to(bank.tier.rows)
        self._foreign = torch.ones(max_rows * bank.tier.rows, dtype=torch.bool, device=bank.device)

    def choose(self, rows: Rows) -> int:
        """The stack's size as it is, if that is not far too large: to change it is to copy all that is active."""
        slots = self._bank.active(rows)
        if not slots:
            return 0
        size = self.size_for(slots)
        if size <= self.stack.rows <= 2 * size:
            size = self.stack.rows
        self.stack.arrange(slots, size)
        return size

    def size_for(self, slots: Sequence[Slot]) -> int:
        return self.sizes[bisect_left(self.sizes, sum(slot.rows for slot in slots))]

    def fill(self, rows: Rows, size: int, kind: Hashable) -> None:
        if kind:
            mask = self.stack.foreign([*rows, *[None] * (size - len(rows))])
            own = self._mask(size, kind)
            own.copy_(sendable(mask, own.device), non_blocking=True)

    def select(self, size: int, kind: Hashable) -> None:
        assert isinstance(kind, int)
        self.stack.select(kind, self._mask(size, kind))

    def describe(self, kind: Hashable) -> str:
        return f"{kind} rank rows"

    def _mask(self, size: int, ranks: Hashable) -> torch.Tensor:
        assert isinstance(ranks, int)
        return self._foreign[: size * ranks].view(size, ranks)


class PooledAdapters:
    """A kind is the linears that adapters target; after some kinds, all linears, whose factors are zero where not."""

    _MOST_KINDS = 4

    def __init__(self, bank: AdapterBank, by_rows: RowAdapters, max_rows: int) -> None:
        self._bank = bank
        self._by_rows = by_rows
        self._kinds: set[frozenset[str]] = set()
        self._tiles = torch.zeros(max_rows, 4, dtype=torch.int32, device=bank.device)
        self._order = torch.zeros(max_rows, dtype=torch.int32, device=bank.device)

    def choose(self, rows: Rows) -> frozenset[str]:
        targeted = self._bank.targeted(self._bank.active(rows))
        if targeted and targeted not in self._kinds:
            if len(self._kinds) >= self._MOST_KINDS:
                targeted = self._by_rows.names
            self._kinds.add(targeted)
        return targeted

    def fill(self, rows: Rows, size: int, kind: Hashable) -> None:
        found = tiles_of(rows, self._bank.active(rows), self._by_rows.tile).with_room(size)
        for own, new in ((self._tiles[:size], found.tiles), (self._order[:size], found.rows)):
            own.copy_(sendable(new, own.device), non_blocking=True)

    def select(self, size: int, kind: Hashable) -> None:
        assert isinstance(kind, frozenset)
        batch = self._bank.pool.batch
        if not kind:
            batch.select({}, {}, None)
            return
        self._by_rows.select_tiles(Tiles(self._tiles[:size], self._order[:size]), size, kind)
        batch.select_rows(self._by_rows)

    def describe(self, kind: Hashable) -> str:
        assert isinstance(kind, frozenset)
        return f"adapters of {len(kind)} linears" if kind else "the base alone"


class ChosenAdapters:
    """One of the two, by how large the stack would be: a kind of the pool's is a set, one of the stack's a number."""

    def __init__(
        self, bank: AdapterBank, stacked: StackedAdapters, pooled: PooledAdapters, sizes: Collection[int]
    ) -> None:
        """`sizes` of the stack with which the pool is used instead."""
        self._bank = bank
        self._stacked, self._pooled = stacked, pooled
        self._pooled_sizes = sizes

    def choose(self, rows: Rows) -> Hashable:
        slots = self._bank.active(rows)
        by_rows = slots and self._stacked.size_for(slots) in self._pooled_sizes
        return self._pooled.choose(rows) if by_rows else self._stacked.choose(rows)

    def fill(self, rows: Rows, size: int, kind: Hashable) -> None:
        self._of(kind).fill(rows, size, kind)

    def select(self, size: int, kind: Hashable) -> None:
        self._of(kind).select(size, kind)

    def describe(self, kind: Hashable) -> str:
        return self._of(kind).describe(kind)

    def _of(self, kind: Hashable) -> RecordedAdapters:
        return self._pooled if isinstance(kind, frozenset) else self._stacked


def recorded_adapters(bank: AdapterBank, max_rows: int, seconds: Seconds) -> RecordedAdapters:
    """`seconds` tells forms apart where there are several."""
    if bank.pool.by_rows is not None:
        return PooledAdapters(bank, bank.pool.by_rows, max_rows)
    stacked = StackedAdapters(bank, max_rows)
    found = choose_by_rows(bank.pool, stacked.stack, stacked.sizes, min(max_rows, _TIMED_ROWS), seconds)
    if found is None:
        return stacked
    return ChosenAdapters(bank, stacked, PooledAdapters(bank, found.adapters, max_rows), found.sizes)
