"""Which samples make which step: packing, and the order of an epoch.

Promises: everything is a function of the lengths, the recipe and the step's number, so a resumed run continues with
exactly the batches it would have seen. No torch, no state.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

Unit = tuple[int, ...]  # samples laid out as one row


def pack(lengths: Sequence[int], max_length: int) -> list[Unit]:
    """Best-fit decreasing: each sample goes where the least room is left, longest first."""
    units: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, unit), sorted
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[sample], 0))
        if place < len(room):
            left, unit = room.pop(place)
        else:
            left, unit = max_length, len(units)
            units.append([])
        units[unit].append(sample)
        insort(room, (left - lengths[sample], unit))
    return [tuple(unit) for unit in units]


class Batches:
    """The micro-batches of every step; the last batch of an epoch, and its last step, may be smaller."""

    def __init__(self, units: Sequence[Unit], batch_size: int, accumulation: int, seed: int) -> None:
        self._units = units
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._seed = seed
        per_epoch = -(-len(units) // batch_size)
        self.steps_per_epoch = -(-per_epoch // accumulation)
        self._epoch = -1
        self._order: list[int] = []

    def of_step(self, step: int) -> list[Unit]:
        """The micro-batches of step 0, 1, ...: for each the samples in it."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._units)))
            random.Random(f"{self._seed} epoch {epoch}").shuffle(self._order)
        size = self._batch_size
        first = place * self._accumulation * size
        chosen = self._order[first : first + self._accumulation * size]
        return [
            tuple(sample for unit in chosen[start : start + size] for sample in self._units[unit])
            for start in range(0, len(chosen), size)
        ]
