"""Which adapters are resident where: the policy of the tiers, on paper (no torch).

disk -> host copy -> device slot. The device tier is a pool of rank rows shared by every linear: an adapter of rank r
takes r rows, so a small adapter never pays for the largest. Promises: an adapter in use is never evicted; the least
recently used idle one goes first; an adapter that waits long enough gets its turn, because one of those in use is
then closed to new requests until it drains; at least one slot is never pinned, and a pinned adapter gives way only
to a request that could not be placed otherwise, ever. Does not move bytes: `bank.py` does, and reports back here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from loramux_adapters.errors import AdapterConflict, AdapterUnavailable


class RowPool:
    """First-fit allocation of contiguous rank rows. Adjacent free spans are merged."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._free: list[tuple[int, int]] = [(0, rows)]  # (offset, length), sorted, never adjacent

    @classmethod
    def around(cls, rows: int, taken: Iterable[tuple[int, int]]) -> RowPool:
        """A pool in which the spans `taken`, (offset, length) each, are in use."""
        pool = cls(rows)
        pool._free, end = [], 0
        for offset, length in [*sorted(taken), (rows, 0)]:
            if offset > end:
                pool._free.append((end, offset - end))
            end = offset + length
        return pool

    @property
    def free_rows(self) -> int:
        return sum(length for _, length in self._free)

    def allocate(self, rows: int) -> int | None:
        """The offset of `rows` contiguous rows, or None if no span is long enough."""
        for index, (offset, length) in enumerate(self._free):
            if length >= rows:
                rest = [(offset + rows, length - rows)] if length > rows else []
                self._free[index : index + 1] = rest
                return offset
        return None

    def release(self, offset: int, rows: int) -> None:
        spans = sorted([*self._free, (offset, rows)])
        merged = [spans[0]]
        for start, length in spans[1:]:
            last_start, last_length = merged[-1]
            if start < last_start + last_length:
                raise AssertionError(f"rows {start}.. were free already")
            if start == last_start + last_length:
                merged[-1] = (last_start, last_length + length)
            else:
                merged.append((start, length))
        self._free = merged


@dataclass(slots=True, eq=False)
class Slot:
    """One adapter's place on the device."""

    generation: str
    offset: int
    rows: int
    references: int = 0
    pinned: bool = False
    filling: bool = True  # its bytes are being copied: not usable yet, and not evictable
    closed_until: int = 0  # tick before which no new request is admitted, so that it drains
    admitted: int = 0  # requests admitted since it became resident

    @property
    def is_idle(self) -> bool:
        return not (self.references or self.pinned or self.filling)


@dataclass(frozen=True, slots=True)
class Eviction:
    generation: str
    tier: Literal["device", "host"]
    reason: Literal["capacity", "fairness"]


@dataclass
class DeviceTier:
    """At most `max_loras` adapters in `rows` rank rows; LRU over the idle ones. `tick` counts engine steps."""

    max_loras: int
    rows: int
    patience: int = 64  # steps an adapter waits before one in use is drained for it
    min_admitted: int = 4  # requests an adapter serves before it may be drained
    slots: OrderedDict[str, Slot] = field(default_factory=OrderedDict)  # least recently used first
    evictions: list[Eviction] = field(default_factory=list)
    tick: int = 0
    _waiting: dict[str, tuple[int, int]] = field(default_factory=dict)  # generation -> (since, last asked)

    def __post_init__(self) -> None:
        self._pool = RowPool(self.rows)

    def get(self, generation: str) -> Slot | None:
        return self.slots.get(generation)

    def place(self, generation: str, rows: int, *, before_pins: bool = False) -> Slot | None:
        """Reserve rows for an adapter, evicting idle ones; None if those in use leave no room yet.

        With `before_pins`, as for a request, an idle pinned one goes when nothing else is left: pinned adapters may
        split the free rows so that a large one never fits. Raises AdapterUnavailable if it could not fit an empty
        device.
        """
        if rows > self.rows:
            raise AdapterUnavailable(
                f"an adapter of rank {rows} does not fit the {self.rows} rank rows of the device; raise --max-lora-rank"
            )
        since, _ = self._waiting.get(generation, (self.tick, 0))
        if since > self._first_in_line():
            return None
        reason: Literal["capacity", "fairness"] = (
            "fairness" if self.tick - since >= self.patience else "capacity"
        )
        while True:
            if len(self.slots) < self.max_loras:
                offset = self._pool.allocate(rows)
                if offset is not None:
                    slot = Slot(generation, offset, rows)
                    self.slots[generation] = slot
                    self._waiting.pop(generation, None)
                    for other in self.slots.values():
                        other.closed_until = 0
                    return slot
            victim = next((s for s in self.slots.values() if s.is_idle), None)
            if victim is None and before_pins:
                victim = self._idle_pin()
            if victim is None:
                return None
            self._drop(victim, reason)

    def evicted_by(self, rows: int) -> tuple[str, ...] | None:
        """Which adapters would go now if one of `rows` came; None if those in use or pinned leave no room."""
        pool = RowPool.around(self.rows, ((slot.offset, slot.rows) for slot in self.slots.values()))
        idle = [slot for slot in self.slots.values() if slot.is_idle]
        gone: list[str] = []
        while len(self.slots) - len(gone) >= self.max_loras or pool.allocate(rows) is None:
            if not idle:
                return None
            victim = idle.pop(0)
            pool.release(victim.offset, victim.rows)
            gone.append(victim.generation)
        return tuple(gone)

    def wait(self, generation: str) -> None:
        """This adapter wants a slot in this step and gets none; past its patience, close one in use until it drains.

        What is closed reopens by itself when nobody asks any more (the request was aborted, say).
        """
        if generation not in self._waiting:  # a moment to forget those that nobody asks for any more
            self._waiting = {
                name: asked for name, asked in self._waiting.items() if self.tick - asked[1] <= self.patience
            }
        since, last = self._waiting.get(generation, (self.tick, self.tick))
        if self.tick - last > self.patience:
            since = self.tick
        self._waiting[generation] = (since, self.tick)
        if self.tick - since < self.patience:
            return
        closed = [slot for slot in self.slots.values() if slot.closed_until > self.tick]
        unpinned = [slot for slot in self.slots.values() if not slot.pinned]
        candidates = closed or [
            slot for slot in unpinned or self.slots.values() if slot.admitted >= self.min_admitted
        ]
        if candidates:
            max(candidates, key=lambda slot: slot.admitted).closed_until = self.tick + self.patience

    def _first_in_line(self) -> int:
        """Since when the adapter waits that has run out of patience first: what is drained is for nobody else."""
        overdue = [
            since
            for since, last in self._waiting.values()
            if self.tick - since >= self.patience >= self.tick - last
        ]
        return min(overdue, default=self.tick)

    def accepts(self, generation: str) -> bool:
        slot = self.slots.get(generation)
        return slot is None or slot.closed_until <= self.tick

    def acquire(self, generation: str) -> Slot:
        slot = self.slots[generation]
        slot.references += 1
        slot.admitted += 1
        self.slots.move_to_end(generation)
        return slot

    def release(self, generation: str) -> None:
        slot = self.slots[generation]
        if slot.references <= 0:
            raise AssertionError(f"adapter {generation[:12]} released more often than acquired")
        slot.references -= 1

    def pin(self, generation: str, pinned: bool) -> None:
        """Raises AdapterConflict rather than let every slot be pinned: a cold adapter must always find one."""
        others = sum(slot.pinned for name, slot in self.slots.items() if name != generation)
        if pinned and others + 1 >= self.max_loras:
            raise AdapterConflict(f"pinning one more would pin all {self.max_loras} slots", param="pinned")
        self.slots[generation].pinned = pinned

    def remove(self, generation: str) -> None:
        """Take back the rows of an adapter nobody references (a failed copy, a deleted adapter)."""
        slot = self.slots.pop(generation)
        self._pool.release(slot.offset, slot.rows)

    def _idle_pin(self) -> Slot | None:
        """The least recently used pinned adapter without requests, if every adapter on the device is pinned."""
        slots = self.slots.values()
        if any(not slot.pinned or slot.filling for slot in slots):
            return None
        return next((slot for slot in slots if not slot.references), None)

    def _drop(self, slot: Slot, reason: Literal["capacity", "fairness"]) -> None:
        self.remove(slot.generation)
        self.evictions.append(Eviction(slot.generation, "device", reason))

    def take_evictions(self) -> list[Eviction]:
        evictions, self.evictions = self.evictions, []
        return evictions

    def check(self) -> None:
        """Every row is free or owned exactly once. Raises AssertionError."""
        owned = sum(slot.rows for slot in self.slots.values())
        if owned + self._pool.free_rows != self.rows:
            raise AssertionError(f"{owned} rows owned + {self._pool.free_rows} free != {self.rows}")
