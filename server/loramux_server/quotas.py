"""How many adapters a tenant may have, and how many bytes of them. What is shared counts for nobody.

All generations of a name's history count, each once for a tenant. What a fine-tuning job makes is counted but never
refused: a tenant who is at his limit cannot begin another one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from loramux_adapters.access import Access
from loramux_adapters.errors import QuotaExceeded, StorageError
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.store import Manifest


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Of every tenant. None: no limit."""

    adapters: int | None = None
    num_bytes: int | None = None


class Quotas:
    """Its method may read the disk."""

    def __init__(self, quota: Quota, registry: AdapterRegistry, manifest: Callable[[str], Manifest]) -> None:
        self._quota = quota
        self._registry = registry
        self._manifest = manifest

    def check(self, access: Access, name: str | None = None, generation: str | None = None) -> None:
        """Raises QuotaExceeded if `access` may not have one adapter more: `name`, if it is known, pointing at
        `generation`, if that is stored."""
        quota = self._quota
        if access.is_operator or quota == Quota():
            return
        own = [record for record in self._registry.list(limit=sys.maxsize) if record.owner == access.owner]
        count = len({record.name for record in own} | {name or ""})
        if quota.adapters is not None and count > quota.adapters:
            raise QuotaExceeded(
                f"name: this tenant has {len(own)} adapters, and may have {quota.adapters}; delete one first",
                param="name",
            )
        kept = {entry.generation for record in own for entry in record.history}
        used = sum(map(self._bytes, kept))
        more = 0 if generation is None or generation in kept else self._bytes(generation)
        full = used >= (quota.num_bytes or 0) if generation is None else used + more > (quota.num_bytes or 0)
        if quota.num_bytes is not None and full:
            raise QuotaExceeded(
                f"this tenant's adapters take {used} bytes, earlier generations among them, and may take "
                f"{quota.num_bytes}" + (f"; this one takes {more}" if more else "") + "; delete one first"
            )

    def _bytes(self, generation: str) -> int:
        try:
            return self._manifest(generation).num_bytes
        except StorageError:  # it is damaged, which is said where it is shown
            return 0
