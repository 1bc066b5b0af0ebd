"""The adapters of one base, and everything that is done to them while the server runs.

Every base has its own registry and store below the data directory, named by its quantization identity, so that an adapter
checked against one base can never be served on another. What an operation acknowledged is durable; what it refuses
changes nothing. Disk work runs on threads. Where adapters come from without being asked is `folders.py`; HTTP is `api/`.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from loramux_adapters.access import Access
from loramux_adapters.adapter_files import DEFAULT_LIMITS, GateLimits
from loramux_adapters.errors import (
    ConfigError,
    StorageError,
)
from loramux_adapters.probe import Probe
from loramux_adapters.registry import AdapterRecord, AdapterRegistry
from loramux_adapters.registry_db import State
from loramux_adapters.set_aside import database_files, open_or_set_aside
from loramux_adapters.sources import Staged, clean_staging
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.store import GenerationStore, Manifest
from loramux_server.engine.interface import EngineClient
from loramux_server.engine.messages import Ready, StepOutput
from loramux_server.metrics import Metrics
from loramux_server.pins import Pins
from loramux_server.publishing import Options, Published, Publisher, check_pinning
from loramux_server.quotas import Quota, Quotas

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 300.0


def geometry_of(ready: Ready, aliases: Collection[str] = ()) -> BaseGeometry:
    return BaseGeometry(
        name=ready.base_name,
        identity=ready.base_identity,
        linear_shapes=ready.linear_shapes,
        aliases=tuple(aliases),
    )


class AdapterCatalog:
    """Owns the registry. One process at a time has a base's folder: a second one is a ConfigError."""

    def __init__(
        self,
        data_dir: Path,
        engine: EngineClient,
        metrics: Metrics,
        *,
        reserved: Collection[str],
        max_lora_rank: int,
        max_file_bytes: int = DEFAULT_LIMITS.max_file_bytes,
        probe: Probe,
        quota: Quota | None = None,
    ) -> None:
        """`reserved` are the base's names, `probe` is what adapters are verified on. The engine's worker must be ready."""
        self.engine = engine
        self.metrics = metrics
        self.geometry = geometry_of(engine.ready, reserved)
        self.limits = GateLimits(max_rank=max_lora_rank, max_file_bytes=max_file_bytes)
        root = data_dir / "bases" / (self.geometry.identity[:16] or "unknown")
        self.staging = root / "staging"
        self._lock = _take(root, self.geometry, data_dir)
        clean_staging(self.staging)
        database, store = root / "adapters.sqlite3", root / "generations"
        # With the store, because a sweep would remove what an empty registry does not name.
        self.registry = open_or_set_aside(
            lambda: AdapterRegistry(database, GenerationStore(store), reserved=reserved),
            *database_files(database),
            store,
        )
        for problem in self.registry.store.set_damaged_aside().values():
            logger.error("%s", problem)
        self._manifests: dict[str, Manifest] = {}
        self._pins = Pins(self.registry, self.manifest, engine.ready, self.limits.max_rank)
        self.quotas = Quotas(quota or Quota(), self.registry, self.manifest)
        self._changing = Lock()
        self._publisher = Publisher(
            self.registry, engine, metrics, self.geometry, probe, self._pins, self.quotas, self._changing
        )
        self._pinning = asyncio.Lock()
        engine.add_listener(self._observe_step)
        metrics.adapters.watch(states=self.count_states, stored_bytes=self._stored_bytes)

    def close(self) -> None:
        self.registry.close()
        self._lock.close()

    # --- changes ---------------------------------------------------------------------------------------------------

    async def publish(
        self, name: str, stage: Callable[[], Staged], options: Options, access: Access
    ) -> Published:
        """Pass what `stage` brings through gate and verification and point the name at it; see `publishing.py`."""
        published = await self._publisher.publish(name, stage, options, self.limits, access)
        await asyncio.to_thread(self.manifest, published.record.generation)
        await self.keep_pinned()
        logger.info("adapter %s is generation %s", name, published.record.generation[:12])
        return published

    async def update(self, name: str, options: Options, access: Access) -> AdapterRecord:
        """Change what is not None; the generation stays."""
        record = await asyncio.to_thread(self._update, name, options, access)
        await self.keep_pinned()
        return record

    async def rollback(self, name: str, generation_prefix: str | None, access: Access) -> AdapterRecord:
        """Point the name back at an earlier generation, by default the one before."""
        record = await asyncio.to_thread(self.registry.rollback, name, generation_prefix, access)
        await self.keep_pinned()
        logger.info("adapter %s is rolled back to generation %s", name, record.generation[:12])
        return record

    async def delete(self, name: str, timeout: float, access: Access) -> int:
        """Forget a name at once, then wait up to `timeout` seconds for what runs on it; how much still does.

        Its files go when nobody needs them any more.
        """
        await asyncio.to_thread(self.registry.delete, name, access)
        self.metrics.adapter_deleted(name)
        await self.keep_pinned()
        logger.info("adapter %s is deleted", name)
        deadline = asyncio.get_running_loop().time() + timeout
        while (left := self.registry.in_use(name)) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return left

    async def keep_pinned(self) -> None:
        """Tell the engine which adapters stay on the device. To be called after any change of names."""
        async with self._pinning:  # whoever comes last also sends last what it has read
            await self.engine.pin(await asyncio.to_thread(self._pins.wanted))

    async def maintain(self) -> None:
        """Read what every name refers to, then sweep now and then, for as long as the task runs."""
        while True:
            await asyncio.to_thread(self._read_manifests)
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(SWEEP_EVERY_S)

    def sweep(self, *, min_age: float = 600.0) -> None:
        """Delete the generations nobody refers to. Blocks."""
        try:
            for generation in self.registry.sweep(min_age=min_age):
                self._manifests.pop(generation, None)
                logger.info("generation %s is removed: nothing refers to it", generation[:12])
        except (StorageError, OSError) as error:
            logger.warning("unused generations could not be removed: %s", error)

    # --- questions -------------------------------------------------------------------------------------------------

    def manifest(self, generation: str) -> Manifest:
        """Reads the disk once per generation. Raises StorageError."""
        found = self._manifests.get(generation)
        if found is None:
            found = self._manifests[generation] = self.registry.store.manifest(generation)
        return found

    def state(self, record: AdapterRecord) -> State:
        """Where the record's generation is on its way to the device, as of the latest engine step."""
        stats = self.engine.stats
        if stats is not None and record.generation in stats.device_adapters:
            return "ready"
        if stats is not None and record.generation in stats.loading_adapters:
            return "loading"
        return record.state

    def count_states(self) -> Counter[str]:
        return Counter(self.state(record) for record in self.registry.list(limit=sys.maxsize))

    # --- the blocking parts ----------------------------------------------------------------------------------------

    def _update(self, name: str, options: Options, access: Access) -> AdapterRecord:
        with self._changing:
            record = self.registry.get(name, access)
            check_pinning(options, access)
            if options.pinned:
                self._pins.check(name, self.manifest(record.generation).rank)
            return self.registry.update(
                name,
                access,
                pinned=options.pinned,
                description=options.description,
                metadata=options.metadata,
                default_sampling=options.default_sampling,
            )

    def _read_manifests(self) -> None:
        for record in self.registry.list(limit=sys.maxsize):
            try:
                self.manifest(record.generation)
            except StorageError as error:
                self.registry.set_state(record.generation, "failed", error.message)
                logger.warning("adapter %s: %s", record.name, error.message)

    def _stored_bytes(self) -> int:
        return sum(manifest.num_bytes for manifest in list(self._manifests.values()))

    def _observe_step(self, step: StepOutput) -> None:
        for load in step.loads:
            self.registry.set_state(load.generation, "available" if load.ok else "failed", load.error)


def _take(root: Path, geometry: BaseGeometry, data_dir: Path) -> BinaryIO:
    """Make the folder, and keep other servers out of it until the result is closed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / "lock", "ab")  # noqa: SIM115 (held as long as the catalogue)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ConfigError(
                f"--data-dir {data_dir}: another server keeps the adapters of this base there; stop it, or choose "
                "another --data-dir",
                param="data_dir",
            ) from None
        description = {"name": geometry.name, "identity": geometry.identity}
        (root / "base.json").write_text(json.dumps(description))
        return lock
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir}: {error.strerror}", param="data_dir") from error
