"""Adapters as clients see them. Nothing shown tells where on this machine an adapter lies."""

from __future__ import annotations

import json
import sys
from typing import Literal

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import RequestError, StorageError
from loramux_adapters.registry import AdapterRecord
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import Manifest
from loramux_server.adapter_plan import Footprint, TierRoom, find_room
from loramux_server.api.adapter_wire import (
    Adapter,
    AdapterList,
    AdapterPlan,
    DevicePlan,
    GenerationEntry,
    PlanBody,
    TierPlan,
    Verification,
)
from loramux_server.api.visible import VisibleAdapters
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.messages import EngineStats
from loramux_server.keys.principal import current_access


class AdapterViews:
    """Reads manifests the first time it shows a generation, and reports every time: call it from a thread."""

    def __init__(self, catalog: AdapterCatalog) -> None:
        self._catalog = catalog
        self._visible = VisibleAdapters(catalog.registry)

    def one(self, model: str) -> Adapter:
        """By name, or by `name@generation-prefix`. Raises UnknownAdapter."""
        return self.card(self._visible.resolve(model))

    def page(self, after: str | None, limit: int) -> AdapterList:
        records = self._visible.list(after=after, limit=limit + 1)
        cards = [self._card(record, self._verdict(record.generation)) for record in records[:limit]]
        return AdapterList(
            data=cards,
            first_id=cards[0].id if cards else None,
            last_id=cards[-1].id if cards else None,
            has_more=len(records) > limit,
        )

    def card(self, record: AdapterRecord) -> Adapter:
        return self._card(record, self._verification(record.generation))

    def _card(self, record: AdapterRecord, verification: Verification | None) -> Adapter:
        manifest, damage = self._manifest(record.generation)
        stats = self._catalog.engine.stats
        requests, last_used = self._catalog.metrics.usage.of(record.name)
        return Adapter(
            id=record.name,
            generation=record.generation,
            state="failed" if damage else self._catalog.state(record),
            failure=damage or record.failure or None,
            tier=_tier(record.generation, stats),
            in_flight=self._catalog.registry.in_use(record.name),
            created=int(record.created),
            updated=int(record.updated),
            source=record.source,
            origin=_origin(record.source, record.origin),
            rank=manifest.rank if manifest else None,
            target_modules=list(manifest.target_modules) if manifest else None,
            dtype=manifest.dtype if manifest else None,
            bytes=manifest.num_bytes if manifest else None,
            base_model=manifest.base_model_name_or_path if manifest else None,
            verification=verification,
            pinned=record.pinned,
            description=record.description,
            metadata=dict(record.metadata),
            default_sampling=dict(record.default_sampling),
            generations=[
                GenerationEntry(
                    entry.generation, int(entry.created), entry.source, _origin(entry.source, entry.origin)
                )
                for entry in record.history
            ],
            requests=requests,
            last_used=None if last_used is None else int(last_used),
        )

    def plan(self, body: PlanBody) -> AdapterPlan:
        need = self._footprint(body)
        engine = self._catalog.engine
        room = find_room(need, engine.ready, engine.stats, self._catalog.limits.max_rank)
        names = self._names()
        device = room.device
        return AdapterPlan(
            fits=room.reason is None,
            reason=room.reason,
            rank=need.rank,
            device=DevicePlan(
                *_tier_fields(device, names),
                rows=room.rows,
                rows_used=room.rows_used,
                rows_needed=need.rank,
            ),
            host=TierPlan(*_tier_fields(room.host, names)),
        )

    def _footprint(self, body: PlanBody) -> Footprint:
        geometry = self._catalog.geometry
        if (body.name is None) == (body.config is None):
            raise RequestError("give either name or config", param="name")
        if body.config is not None:
            spec = AdapterSpec.from_config(body.config)
            need = Footprint.of_spec(spec, geometry)
            if not need.rank:
                raise RequestError("config.target_modules matches no linear of the base", param="config")
            return need
        record = self._visible.resolve(body.name or "")
        path = self._visible.store.path(record.generation)
        spec = AdapterSpec.from_config(json.loads((path / CONFIG_FILE).read_bytes()))
        return Footprint.of_spec(spec, geometry, record.generation)

    def _verdict(self, generation: str) -> Verification | None:
        outcome = self._catalog.registry.verifications.outcome(generation)
        return None if outcome is None else Verification(outcome)

    def _verification(self, generation: str) -> Verification | None:
        found = self._catalog.registry.verifications.get(generation)
        if found is None or found.report is None:
            return self._verdict(generation)
        return Verification(found.outcome, int(found.checked), found.report)

    def _names(self) -> dict[str, str]:
        """Generation -> a name of it; of those that the caller may not see, a word that tells nothing."""
        named = {record.generation: record.name for record in self._visible.list(limit=sys.maxsize)}
        if not current_access().is_operator:
            stats = self._catalog.engine.stats
            resident = [*stats.device_adapters, *stats.host_adapters] if stats else []
            named = {**dict.fromkeys(resident, "another tenant's"), **named}
        return named

    def _manifest(self, generation: str) -> tuple[Manifest | None, str]:
        try:
            return self._catalog.manifest(generation), ""
        except StorageError as error:
            return None, error.message


def _tier_fields(room: TierRoom, names: dict[str, str]) -> tuple[int, int, bool, int, list[str] | None]:
    evicted = None if room.evicted is None else [names.get(one, one[:12]) for one in room.evicted]
    return room.slots, room.slots_used, room.is_resident, room.bytes, evicted


def _tier(generation: str, stats: EngineStats | None) -> Literal["disk", "host", "device"]:
    if stats is not None and generation in stats.device_adapters:
        return "device"
    return "host" if stats is not None and generation in stats.host_adapters else "disk"


def _origin(source: str, origin: str) -> str | None:
    return None if source == "path" else origin or None
