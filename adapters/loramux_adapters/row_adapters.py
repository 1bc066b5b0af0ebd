"""Adapters' products row by row: each row times the factors of its own adapter, read where they lie in the pool.

The dense form (`layers.py`) multiplies every row with every active adapter and masks what is foreign; this saves the
arithmetic and most of the calls. Nothing is cut out of the pool, so nothing is copied when who is active changes.

Promises, with the CPU's product (`native/lora.c`) and with CUDA's (`triton_lora.py`): rows without an adapter are not
touched, and a row's result does not depend on which rows are beside it. Does not decide when it is used.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.residency import Slot
from loramux_adapters.transfer import sent

FactorMemory = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Tiles:
    """Rows by adapter: `tiles` int32 `[n, 4]` are (first of `rows`, how many, rank row it begins at, rank)."""

    tiles: torch.Tensor
    rows: torch.Tensor

    @property
    def count(self) -> int:
        return self.tiles.shape[0]

    @classmethod
    def empty(cls) -> Tiles:
        return cls(torch.empty((0, 4), dtype=torch.int32), torch.empty(0, dtype=torch.int32))

    def with_room(self, rows: int) -> Tiles:
        """As many tiles as there are rows, the last ones of none; and rows to match."""
        tiles, order = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        tiles[: self.count] = self.tiles
        order[: len(self.rows)] = self.rows
        return Tiles(tiles, order)

    def on(self, device: torch.device) -> Tiles:
        """The same there, without waiting for it."""
        return Tiles(sent(self.tiles, device), sent(self.rows, device))


# A `[R, in]`, B `[R, out]`, x `[rows, in]`, y `[rows, out]`, to which it adds; a tile has at most `tile` rows, or none
RowProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Tiles], None]


class RowAdapters:
    """Over `memory[name]` = A `[R, in]`, B `[R, out]` of every linear, all of one dtype and device."""

    def __init__(self, product: RowProduct, memory: FactorMemory, *, tile: int) -> None:
        """`tile`: the most rows that `product` takes at once."""
        self._product = product
        self._memory = memory
        self.tile = tile
        first = next(iter(memory.values()))[0]
        self.dtype, self.device = first.dtype, first.device
        self._targeted: Collection[str] = ()
        self._count = 0
        self._tiles = Tiles.empty()

    def select(self, rows: Sequence[str | None], slots: Sequence[Slot], targeted: Collection[str]) -> None:
        """For the next pass: `rows` names each row's generation, `slots` where those lie."""
        self.select_tiles(tiles_of(rows, slots, self.tile).on(self.device), len(rows), targeted)

    def select_tiles(self, tiles: Tiles, rows: int, targeted: Collection[str]) -> None:
        """For the next pass of that many rows; tiles of no rows at the end are left out when it runs."""
        self._tiles, self._count, self._targeted = tiles, rows, targeted

    @property
    def names(self) -> frozenset[str]:
        """Of all linears."""
        return frozenset(self._memory)

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y `[rows, out]` += each row of x `[rows, in]` through its adapter; rows without one are not touched."""
        if name in self._targeted:
            if len(x) != self._count or y.dtype != self.dtype or y.stride(-1) != 1:
                raise RuntimeError(
                    f"{name} sees {len(x)} rows in {y.dtype}, a step has {self._count} in {self.dtype}"
                )
            if x.dtype != self.dtype or x.stride(-1) != 1:
                x = x.to(self.dtype).contiguous()
            a, b = self._memory[name]
            self._product(a, b, x, y, self._tiles)


def tiles_of(rows: Sequence[str | None], slots: Sequence[Slot], most: int) -> Tiles:
    """The rows that have an adapter, in tiles of up to `most` of the same."""
    own: dict[str, list[int]] = {slot.generation: [] for slot in slots}
    for number, generation in enumerate(rows):
        if generation is not None:
            own[generation].append(number)
    tiles, order = array("i"), array("i")
    for slot in slots:
        numbers = own[slot.generation]
        for first in range(0, len(numbers), most):
            tile = numbers[first : first + most]
            tiles.extend((len(order), len(tile), slot.offset, slot.rows))
            order.extend(tile)
    if not order:
        return Tiles.empty()
    return Tiles(
        torch.frombuffer(tiles, dtype=torch.int32).view(-1, 4), torch.frombuffer(order, dtype=torch.int32)
    )


@torch.inference_mode()
def probe(product: RowProduct, tile: int, dtype: torch.dtype, device: torch.device) -> float:
    """The product's largest relative error for a row: tiles full, not full and of none, odd ranks, a row without adapter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    slots = [Slot("one", 0, 8), Slot("two", 8, 5), Slot("three", 13, 43)]
    rows = ["one", None, *["two"] * (tile + 3), "three", "three", "one"]
    a, b = random(56, 1184), random(56, 96)
    x, y = random(len(rows), 1184), random(len(rows), 96)
    expected = y.float()
    for slot in slots:
        own = torch.tensor([row == slot.generation for row in rows], device=device)
        ranks = slice(slot.offset, slot.offset + slot.rows)
        expected[own] += x[own].float() @ a[ranks].float().T @ b[ranks].float()
    product(a, b, x, y, tiles_of(rows, slots, tile).with_room(len(rows)).on(device))
    return float(((y.float() - expected).norm(dim=1) / expected.norm(dim=1)).max())
