"""Which adapters are to stay on the device, and how many may: a pinned one must leave room to all others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from loramux_adapters.errors import AdapterConflict, StorageError
from loramux_adapters.registry import AdapterRecord, AdapterRegistry
from loramux_adapters.store import Manifest
from loramux_server.engine.messages import AdapterRef, Ready

logger = logging.getLogger(__name__)


class Pins:
    """A view of the registry. Its methods may read the disk."""

    def __init__(
        self, registry: AdapterRegistry, manifest: Callable[[str], Manifest], base: Ready, max_rank: int
    ) -> None:
        self._registry = registry
        self._manifest = manifest
        self._base = base
        self._max_rank = max_rank

    def check(self, name: str, rank: int) -> None:
        """Raises AdapterConflict if, with this one pinned, a slot or the rows of the largest adapter were not left."""
        base = self._base
        others = {record.generation for record in self._pinned() if record.name != name}
        if len(others) + 1 >= base.max_loras:
            raise AdapterConflict(
                f"pinned: {len(others)} of {base.max_loras} slots are pinned, and one must stay for the other "
                "adapters; unpin one or raise --max-loras",
                param="pinned",
            )
        rows = rank + sum(self._manifest(generation).rank for generation in others)
        if rows > base.lora_rows - self._max_rank:
            raise AdapterConflict(
                f"pinned: the pinned adapters would take {rows} of {base.lora_rows} rank rows, and "
                f"{self._max_rank} must stay for the other adapters; unpin one or raise --max-loras",
                param="pinned",
            )

    def wanted(self) -> list[AdapterRef]:
        """What the engine is told: a generation under several names once, one that is damaged not at all."""
        found: dict[str, AdapterRef] = {}
        for record in self._pinned():
            try:
                path = self._registry.store.path(record.generation)
            except StorageError as error:
                logger.warning("adapter %s cannot be pinned: %s", record.name, error.message)
                continue
            found[record.generation] = AdapterRef(record.generation, str(path))
        return list(found.values())

    def _pinned(self) -> list[AdapterRecord]:
        return [record for record in self._registry.list(limit=sys.maxsize) if record.pinned]
