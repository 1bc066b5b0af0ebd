"""Which weights a request's `model` means.

A name is, in this order: a served name of the base; an adapter's `name` or `name@generation-prefix`; the same
with `base:` before it. Anything else is 404, never the base instead; so is an adapter that the caller may not see.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio.to_thread

from loramux_adapters.access import Access
from loramux_adapters.errors import AdapterUnavailable, StorageError, UnknownAdapter
from loramux_server.engine.interface import AdapterDirectory, AdapterView
from loramux_server.engine.messages import AdapterRef
from loramux_server.keys.principal import current_access

T = TypeVar("T")

SYSTEM_PROMPT = "system_prompt"  # key of an adapter's metadata


@dataclass(frozen=True)
class Target:
    """What answers: the base (adapter is None) or one generation of an adapter."""

    name: str  # as it is listed, whatever alias the caller used
    adapter: AdapterRef | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"x-adapter-generation": self.adapter.generation} if self.adapter else {}


class ModelNames:
    """The names of the base beside those of the adapters."""

    def __init__(self, base_names: tuple[str, ...], adapters: AdapterDirectory) -> None:
        self.base_names = base_names
        self._adapters = adapters
        # Threads of their own: requests for answers do not wait behind uploads.
        self._lookups = anyio.CapacityLimiter(4)

    async def lease(self, name: str, held: ExitStack) -> Target:
        """The target of a request; an adapter's generation stays until `held` is closed."""
        if name in self.base_names:
            return Target(self.base_names[0])
        lease = self._first_known(name, self._adapters.lease)
        held.callback(lease.release)
        record = lease.record
        path = await anyio.to_thread.run_sync(self._path, record.generation, limiter=self._lookups)
        return Target(record.name, AdapterRef(record.generation, str(path)))

    def _path(self, generation: str) -> Path:
        try:
            return self._adapters.store.path(generation)
        except StorageError as error:  # of one adapter: the server is well
            raise AdapterUnavailable(error.message) from error

    def with_defaults(self, values: dict[str, object]) -> dict[str, object]:
        """A request's fields, with those that its adapter brings defaults for and the request does not name."""
        model = values.get("model")
        if not isinstance(model, str) or model in self.base_names:
            return values
        try:
            defaults = self.adapter(model).default_sampling
        except UnknownAdapter:
            return values  # `lease` says so
        return {**values, **{name: value for name, value in defaults.items() if values.get(name) is None}}

    def system_prompt(self, model: str) -> str | None:
        """How the adapter of that name wants conversations to begin, by its metadata."""
        if model in self.base_names:
            return None
        try:
            prompt = self.adapter(model).metadata.get(SYSTEM_PROMPT)
        except UnknownAdapter:
            return None  # `lease` says so
        return prompt if isinstance(prompt, str) else None

    def adapter(self, name: str) -> AdapterView:
        """The adapter of that name. Raises UnknownAdapter for anything else, the base's names included."""
        return self._first_known(name, self._adapters.resolve)

    def adapters(self) -> Sequence[AdapterView]:
        return self._adapters.list(None, sys.maxsize, current_access())

    def _first_known(self, name: str, look_up: Callable[[str, Access], T]) -> T:
        prefixes = (f"{base}:" for base in self.base_names)
        readings = [name, *(name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix))]
        for reading in readings:
            try:
                return look_up(reading, current_access())
            except UnknownAdapter:
                continue
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        raise UnknownAdapter(
            f"The model '{shown}' does not exist; GET /v1/models lists the base and its adapters.",
            param="model",
        )
