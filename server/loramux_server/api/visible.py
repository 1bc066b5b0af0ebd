"""The registry as the caller of the current request may see it: what others own is not there.

The only way from a route to the registry's names. Reads only; changes go through the catalogue, with the caller's access.
"""

from __future__ import annotations

from collections.abc import Sequence

from loramux_adapters.errors import UnknownAdapter
from loramux_adapters.registry import AdapterRecord, AdapterRegistry, Lease
from loramux_adapters.store import GenerationStore
from loramux_server.keys.principal import current_access


class VisibleAdapters:
    """Errors are the registry's own, so that nobody can tell what is hidden from what does not exist."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry

    @property
    def store(self) -> GenerationStore:
        return self._registry.store

    def list(self, after: str | None = None, limit: int = 100) -> Sequence[AdapterRecord]:
        return self._registry.list(after, limit, current_access())

    def get(self, name: str) -> AdapterRecord:
        return self._registry.get(name, current_access())

    def resolve(self, model: str) -> AdapterRecord:
        return self._registry.resolve(model, current_access())

    def lease(self, model: str) -> Lease:
        return self._registry.lease(model, current_access())

    def __contains__(self, name: str) -> bool:
        try:
            self.get(name)
        except UnknownAdapter:
            return False
        return True
