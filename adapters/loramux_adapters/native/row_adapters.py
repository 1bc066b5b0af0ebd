"""Adapters' products row by row: each row times the factors of its own adapter, read where they lie in the pool.

The dense form (`layers.py`) multiplies every row with every active adapter and masks what is foreign; this saves the
arithmetic and most of the calls. Nothing is cut out of the pool, so nothing is copied when who is active changes.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection, Mapping, Sequence

import torch

from loramux_adapters.native.library import Native, Tiles
from loramux_adapters.residency import Slot

logger = logging.getLogger(__name__)

_TILE = 4  # rows that are multiplied together, as in lora.c
_BOUND = 1e-2  # relative error that is rounding to bf16

FactorMemory = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class RowAdapters:
    """Over `memory[name]` = A `[R, in]`, B `[R, out]` of every linear, in bf16 on the CPU."""

    def __init__(self, native: Native, memory: FactorMemory) -> None:
        self._native = native
        self._memory = memory
        self._targeted: Collection[str] = ()
        self._count = 0
        self._tiles = tiles_of((), ())

    def select(self, rows: Sequence[str | None], slots: Sequence[Slot], targeted: Collection[str]) -> None:
        """For the next pass: `rows` names each row's generation, `slots` where those lie."""
        self.select_tiles(tiles_of(rows, slots), len(rows), targeted)

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
            if len(x) != self._count or y.dtype != torch.bfloat16 or y.stride(-1) != 1:
                raise RuntimeError(
                    f"{name} sees {len(x)} rows in {y.dtype}, a step has {self._count} in bf16"
                )
            if x.dtype != torch.bfloat16 or x.stride(-1) != 1:
                x = x.to(torch.bfloat16).contiguous()
            a, b = self._memory[name]
            self._native.lora(a, b, x, y, self._tiles)


def row_adapters(native: Native | None, memory: FactorMemory) -> RowAdapters | None:
    """None where the kernel is not for these factors, or wrong on a probe, which the log says."""
    if native is None or not all(
        factor.dtype == torch.bfloat16 and factor.device.type == "cpu" and factor.shape[1] % 32 == 0
        for factors in memory.values()
        for factor in factors
    ):
        return None
    distance = probe(native)
    if not distance <= _BOUND:
        logger.warning(
            "adapters multiply by torch: the CPU kernel is wrong here (relative error %.3g)", distance
        )
        return None
    return RowAdapters(native, memory)


def tiles_of(rows: Sequence[str | None], slots: Sequence[Slot]) -> Tiles:
    """The rows that have an adapter, in tiles of up to four of the same."""
    own: dict[str, list[int]] = {slot.generation: [] for slot in slots}
    for number, generation in enumerate(rows):
        if generation is not None:
            own[generation].append(number)
    tiles, order = array("i"), array("i")
    for slot in slots:
        numbers = own[slot.generation]
        for first in range(0, len(numbers), _TILE):
            tile = numbers[first : first + _TILE]
            tiles.extend((len(order), len(tile), slot.offset, slot.rows))
            order.extend(tile)
    if not order:
        return Tiles(torch.empty((0, 4), dtype=torch.int32), torch.empty(0, dtype=torch.int32))
    return Tiles(
        torch.frombuffer(tiles, dtype=torch.int32).view(-1, 4), torch.frombuffer(order, dtype=torch.int32)
    )


@torch.inference_mode()
def probe(native: Native) -> float:
    """The kernel's largest relative error for a row: tiles of one to four rows, odd ranks, a row without adapter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    a, b, x, y = random(24, 96), random(24, 64), random(1, 12, 96), random(1, 12, 64)
    slots = [Slot("one", 0, 8), Slot("two", 8, 5), Slot("three", 13, 11)]
    rows = ["one", None, *["two"] * 7, "three", "three", "one"]
    expected = y[0].float()
    for slot in slots:
        own = torch.tensor([row == slot.generation for row in rows])
        ranks = slice(slot.offset, slot.offset + slot.rows)
        expected[own] += x[0, own].float() @ a[ranks].float().T @ b[ranks].float()
    native.lora(a, b, x, y, tiles_of(rows, slots))
    return float(((y[0].float() - expected).norm(dim=1) / expected.norm(dim=1)).max())
