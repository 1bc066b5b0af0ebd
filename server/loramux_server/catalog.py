"""The adapters of one base: the registry on disk, what the command line adds to it, and the folders it watches.

Every base has its own registry and store below the data directory, named by its quantization identity, so that an adapter
checked against one base can never be served on another. What fails the gate is logged and counted, and harms nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from watchfiles import awatch

from loramux_adapters.adapter_files import GateLimits
from loramux_adapters.errors import AdapterError, ConfigError, RequestError
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.scanner import AdapterScanner, ScanReport, import_directory
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.store import GenerationStore
from loramux_server.engine.messages import Ready
from loramux_server.metrics import Metrics

logger = logging.getLogger(__name__)

_RESCAN_S = 30.0  # network file systems send no change events


def geometry_of(ready: Ready) -> BaseGeometry:
    return BaseGeometry(name=ready.base_name, identity=ready.base_identity, linear_shapes=ready.linear_shapes)


class AdapterCatalog:
    """Owns the registry. Methods may block on the disk: call them from a thread once the loop serves."""

    def __init__(
        self, data_dir: Path, ready: Ready, *, reserved: Sequence[str], max_lora_rank: int, metrics: Metrics
    ) -> None:
        self.geometry = geometry_of(ready)
        self.limits = GateLimits(max_rank=max_lora_rank)
        self._metrics = metrics
        root = data_dir / "bases" / (ready.base_identity[:16] or "unknown")
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / "base.json").write_text(
                json.dumps({"name": ready.base_name, "identity": ready.base_identity})
            )
        except OSError as error:
            raise ConfigError(f"--data-dir {data_dir}: {error.strerror}", param="data_dir") from error
        self.registry = AdapterRegistry(
            root / "adapters.sqlite3", GenerationStore(root / "generations"), reserved=reserved
        )
        self._scanner: AdapterScanner | None = None

    def add_modules(self, modules: Mapping[str, Path]) -> None:
        """Import what the command line names. Raises ConfigError: a name somebody typed must work or be an error."""
        for name, path in modules.items():
            try:
                record = import_directory(self.registry, self.geometry, name, path, limits=self.limits)
            except (AdapterError, RequestError) as error:
                raise ConfigError(
                    f"--lora-modules {name}={path}: {error.message}", param="lora_modules"
                ) from error
            logger.info("adapter %s is generation %s", name, record.generation[:12])

    def scan(self, directories: Sequence[Path]) -> ScanReport:
        """Bring the registry in step with the adapter folders, and log what changed."""
        if self._scanner is None:
            self._scanner = AdapterScanner(
                self.registry, self.registry.store, self.geometry, directories, limits=self.limits
            )
        report = self._scanner.scan_once()
        for verb, names in (
            ("added", report.added),
            ("updated", report.updated),
            ("removed", report.removed),
        ):
            for name in names:
                logger.info("adapter %s %s", name, verb)
        for error in report.failed.values():
            logger.warning("%s", error.message)
            self._metrics.adapter_rejected()
        for name in report.removed:
            self._metrics.adapter_deleted(name)
        return report

    async def watch(self, directories: Sequence[Path]) -> None:
        """Scan whenever something changes below the folders, for as long as the task runs."""
        changes = awatch(*directories, rust_timeout=int(_RESCAN_S * 1000), yield_on_timeout=True)
        async for _ in changes:
            await asyncio.to_thread(self.scan, directories)

    def close(self) -> None:
        self.registry.close()
