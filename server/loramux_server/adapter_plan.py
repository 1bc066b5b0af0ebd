"""Does an adapter fit, and who would make room for it now? Answered from the latest engine step; moves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loramux_adapters.residency import DeviceTier, Slot
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_server.engine.messages import EngineStats, Ready

_ITEM_BYTES: Mapping[str, int] = {"float32": 4}  # of the compute type; all others have two bytes


@dataclass(frozen=True)
class Footprint:
    """What the engine has to find room for. `generation` is None when nothing is stored yet."""

    generation: str | None
    rank: int
    numbers: int  # of A and B over all linears

    @classmethod
    def of_spec(cls, spec: AdapterSpec, geometry: BaseGeometry, generation: str | None = None) -> Footprint:
        ranks = {name: spec.rank(name) for name in spec.targets(geometry)}
        numbers = sum(rank * sum(geometry.linear_shapes[name]) for name, rank in ranks.items())
        return cls(generation, max(ranks.values(), default=0), numbers)


@dataclass(frozen=True)
class TierRoom:
    """`evicted` are the generations that would go, least recently used first; None: those in use leave no room now."""

    slots: int
    slots_used: int
    is_resident: bool
    bytes: int
    evicted: tuple[str, ...] | None


@dataclass(frozen=True)
class Room:
    reason: str | None  # why it can never be served here
    device: TierRoom
    host: TierRoom
    rows: int
    rows_used: int


def find_room(need: Footprint, base: Ready, stats: EngineStats | None, max_rank: int) -> Room:
    slots = stats.device_slots if stats else []
    on_host = stats.host_adapters if stats else []
    item = _ITEM_BYTES.get(base.dtype, 2)
    row_bytes = item * sum(sum(shape) for shape in base.linear_shapes.values())
    tier = DeviceTier(max_loras=base.max_loras, rows=base.lora_rows)
    for one in slots:
        tier.slots[one.generation] = Slot(
            one.generation, one.offset, one.rows, one.references, pinned=one.pinned, filling=one.filling
        )
    reason = None
    if need.rank > min(max_rank, base.lora_rows):
        reason = f"rank {need.rank} is above the {min(max_rank, base.lora_rows)} that --max-lora-rank allows"
    resident = need.generation in tier.slots
    evicted: tuple[str, ...] | None = () if resident else None
    if reason is None and not resident:
        evicted = tier.evicted_by(need.rank)
    cached = need.generation in on_host
    crowded = len(on_host) >= base.max_cpu_loras and not cached
    return Room(
        reason=reason,
        device=TierRoom(base.max_loras, len(slots), resident, need.rank * row_bytes, evicted),
        host=TierRoom(
            base.max_cpu_loras,
            len(on_host),
            cached,
            need.numbers * item,
            tuple(on_host[:1]) if crowded else (),
        ),
        rows=base.lora_rows,
        rows_used=sum(one.rows for one in slots),
    )
