"""Adapter folders on disk, kept in step with the registry.

A folder with an adapter_config.json is an adapter named after it; a folder of such folders makes `org/name`.
A scan reads only what changed since the last one (also across restarts), imports what passes the gate, and
removes names whose folder is gone. A folder that fails is reported and harms nobody: an earlier version of it
goes on being served, and it is tried again when its files change. No torch at import.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux_adapters.access import SHARED
from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, DEFAULT_LIMITS, GateLimits
from loramux_adapters.errors import AdapterConflict, Fault, InvalidAdapter, RequestError, UnknownAdapter
from loramux_adapters.registry import AdapterRecord, AdapterRegistry, Scanned
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.store import GenerationStore


@dataclass(slots=True)
class ScanReport:
    """What one scan changed. `failed` has what began to fail, or fails otherwise than at the last scan."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, InvalidAdapter] = field(default_factory=dict)
    unchanged: int = 0


def find_adapters(directory: Path) -> dict[str, Path]:
    """Adapter name -> folder, at most two levels deep; hidden folders are skipped. Raises OSError."""
    found: dict[str, Path] = {}
    for folder in _folders(directory):
        if (folder / CONFIG_FILE).exists():
            found[folder.name] = folder
            continue
        try:
            nested = _folders(folder)
        except OSError:  # reported as an adapter that cannot be read, which is what we know
            found[folder.name] = folder
            continue
        found.update({f"{folder.name}/{sub.name}": sub for sub in nested if (sub / CONFIG_FILE).exists()})
    return found


def fingerprint(folder: Path) -> str:
    """Changes when one of the two files is written or replaced; costs two stat calls."""
    marks = []
    for name in ADAPTER_FILES:
        try:
            status = (folder / name).stat()
            marks.append(f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}")
        except OSError as error:
            marks.append(f"{type(error).__name__}")
    return " ".join(marks)


def import_directory(
    registry: AdapterRegistry,
    geometry: BaseGeometry,
    name: str,
    path: Path,
    *,
    limits: GateLimits = DEFAULT_LIMITS,
) -> AdapterRecord:
    """Pass a folder through the gate and point `name` at it, unless the name came from elsewhere.

    Raises InvalidAdapter for the files, AdapterConflict or RequestError for the name.
    """
    from loramux_adapters.weights import LoraWeights

    registry.check_name(name)
    origin = str(path)
    try:
        current = registry.get(name)
    except UnknownAdapter:
        current = None
    if current is not None and (current.source, current.origin, current.owner) != (
        "path",
        origin,
        SHARED,
    ):
        came_from = current.origin or f"an {current.source}"
        raise AdapterConflict(f"name: '{name}' is taken by {came_from}; rename one of them", param="name")
    mark = fingerprint(path)
    weights = LoraWeights.read(path, geometry, limits=limits)
    if fingerprint(path) != mark:
        raise InvalidAdapter(
            [Fault("folder", "changed while it was read, and is read again when it is still")]
        )
    generation = registry.store.publish(weights, {"source": "path", "origin": origin})
    if current is not None and current.generation == generation:
        return current
    return registry.put(name, generation, source="path", origin=origin)


@dataclass(frozen=True, slots=True)
class _Failure:
    name: str
    mark: str  # the fingerprint that failed; "" when it may succeed without the folder changing
    error: InvalidAdapter


class AdapterScanner:
    """Scans the --adapter-dir folders. One scan at a time; call it at start and then as often as you like."""

    def __init__(
        self,
        registry: AdapterRegistry,
        store: GenerationStore,
        geometry: BaseGeometry,
        directories: Sequence[Path],
        *,
        limits: GateLimits = DEFAULT_LIMITS,
    ) -> None:
        self._registry = registry
        self._store = store
        self._geometry = geometry
        self._directories = [Path(os.path.abspath(directory)) for directory in directories]
        self._limits = limits
        self._lock = threading.Lock()
        self._failures: dict[str, _Failure] = {}  # by path

    @property
    def failures(self) -> dict[str, InvalidAdapter]:
        """Everything that fails now, by name."""
        return {failure.name: failure.error for failure in self._failures.values()}

    def scan_once(self) -> ScanReport:
        with self._lock:
            report = ScanReport()
            known = self._registry.scanned()
            visited: set[str] = set()
            for directory in self._directories:
                visited.add(str(directory))
                try:
                    found = find_adapters(directory)
                except OSError as error:
                    problem = [Fault("folder", f"cannot be listed: {error.strerror}")]
                    self._fail(report, str(directory), str(directory), "", problem)
                    continue
                self._failures.pop(str(directory), None)
                for name, folder in found.items():
                    visited.add(str(folder))
                    self._visit(name, folder, known.get(str(folder)), report)
            for path in known.keys() - visited:
                self._visit_missing(path, known[path], report, visited)
            self._failures = {path: failure for path, failure in self._failures.items() if path in visited}
            return report

    def _visit(self, name: str, folder: Path, known: Scanned | None, report: ScanReport) -> None:
        path, mark = str(folder), fingerprint(folder)
        if known == Scanned(name, mark) and not self._is_lost(name, path):
            self._failures.pop(path, None)
            report.unchanged += 1
            return
        failure = self._failures.get(path)
        if failure is not None and failure.mark == mark:
            return
        before = self._generation(name)
        try:
            record = import_directory(self._registry, self._geometry, name, folder, limits=self._limits)
        except InvalidAdapter as error:
            self._fail(report, path, name, mark, error.faults)
        except (AdapterConflict, RequestError) as error:
            self._fail(report, path, name, "", [Fault("name", error.message.removeprefix("name: "))])
        else:
            self._failures.pop(path, None)
            self._registry.save_scanned(path, Scanned(name, mark))
            if before is None:
                report.added.append(name)
            elif before != record.generation:
                report.updated.append(name)
            else:
                report.unchanged += 1

    def _visit_missing(self, path: str, known: Scanned, report: ScanReport, visited: set[str]) -> None:
        """A folder that was an adapter: remove its name, unless all we know is that it cannot be read now."""
        ours = any(_is_below(path, str(directory)) for directory in self._directories)
        if not ours or any(_is_below(path, failing) for failing in self._failures):
            return
        if Path(path).is_dir():  # only its config is gone, as while it is being replaced
            visited.add(path)
            self._visit(known.name, Path(path), known, report)
            return
        self._registry.save_scanned(path, None)
        if self._came_from(known.name, path):
            self._registry.delete(known.name)
            report.removed.append(known.name)

    def _fail(self, report: ScanReport, path: str, name: str, mark: str, faults: Sequence[Fault]) -> None:
        error = InvalidAdapter(faults, name=name)
        before = self._failures.get(path)
        self._failures[path] = _Failure(name, mark, error)
        if before is None or before.error.message != error.message:
            report.failed[name] = error

    def _generation(self, name: str) -> str | None:
        try:
            return self._registry.get(name).generation
        except UnknownAdapter:
            return None

    def _came_from(self, name: str, path: str) -> bool:
        try:
            record = self._registry.get(name)
        except UnknownAdapter:
            return False
        return (record.source, record.origin, record.owner) == ("path", path, SHARED)

    def _is_lost(self, name: str, path: str) -> bool:
        """Whether the name needs this folder again. One that was deleted or taken over does not."""
        return self._came_from(name, path) and self._registry.get(name).generation not in self._store


def _folders(directory: Path) -> list[Path]:
    with os.scandir(directory) as entries:
        return sorted(
            Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()
        )


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(directory + os.sep)
