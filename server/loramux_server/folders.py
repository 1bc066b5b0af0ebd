"""Adapters that nobody uploads: those the command line names, and the folders that are watched.

What does not pass the gate is logged and counted, and harms nobody; what was served before goes on being served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from watchfiles import awatch

from loramux_adapters.errors import AdapterConflict, AdapterError, ConfigError, RequestError
from loramux_adapters.scanner import AdapterScanner, ScanReport, import_directory
from loramux_server.catalog import AdapterCatalog

logger = logging.getLogger(__name__)

_RESCAN_S = 30.0  # network file systems send no change events


class AdapterFolders:
    """Brings a catalogue in step with folders. All methods but `watch` block on the disk."""

    def __init__(self, catalog: AdapterCatalog, directories: Sequence[Path]) -> None:
        self._catalog = catalog
        self._directories = directories
        self._scanner = AdapterScanner(
            catalog.registry, catalog.registry.store, catalog.geometry, directories, limits=catalog.limits
        )

    def add_modules(self, modules: Mapping[str, Path]) -> None:
        """Import what the command line names. Raises ConfigError: a name somebody typed must work or be an error."""
        for name, path in modules.items():
            try:
                self._import(name, path)
            except (AdapterError, RequestError) as error:
                raise ConfigError(
                    f"--lora-modules {name}={path}: {error.message}", param="lora_modules"
                ) from error

    def add_examples(self, modules: Mapping[str, Path]) -> None:
        """Import what the package brings along, unless the name means something else by now."""
        for name, path in modules.items():
            try:
                self._import(name, path)
            except AdapterConflict as error:
                logger.info("the shipped adapter %s is left out: %s", name, error.message)

    def scan(self) -> ScanReport:
        """Look at the folders once, and log what changed."""
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
            self._catalog.metrics.adapter_rejected()
        for name in report.removed:
            self._catalog.metrics.adapter_deleted(name)
        return report

    async def watch(self) -> None:
        """Scan whenever something changes below the folders, for as long as the task runs."""
        if not self._directories:
            return
        changes = awatch(*self._directories, rust_timeout=int(_RESCAN_S * 1000), yield_on_timeout=True)
        async for _ in changes:
            report = await asyncio.to_thread(self.scan)
            if report.updated or report.removed:
                await self._catalog.keep_pinned()

    def _import(self, name: str, path: Path) -> None:
        catalog = self._catalog
        record = import_directory(catalog.registry, catalog.geometry, name, path, limits=catalog.limits)
        logger.info("adapter %s is generation %s", name, record.generation[:12])
