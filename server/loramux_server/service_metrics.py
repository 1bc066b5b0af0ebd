"""The collectors about the service as a whole: the worker's state and restarts, memory, disk, export jobs.

Promises: everything is read when it is scraped, without waiting for anybody; before there is something to read, gauges are
zero. Labels are closed sets.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, get_args

import psutil
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux_adapters.errors import EngineError
from loramux_server.engine.interface import EngineState
from loramux_server.engine.messages import EngineStats, Ready

EXPORT_STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ITEM_BYTES: Mapping[str, int] = {"float32": 4}  # of the compute type; all others have two bytes


class WatchedWorker(Protocol):
    """What is asked of the engine's client."""

    @property
    def state(self) -> EngineState: ...
    @property
    def ready(self) -> Ready: ...
    @property
    def restarts(self) -> int: ...
    @property
    def worker_pid(self) -> int | None: ...


class ServiceMetrics(Collector):
    """Registers itself, and the usual figures of this process, with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._steps = Histogram(
            "loramux_step_seconds", "An engine step that computed something", buckets=_STEP_BUCKETS, registry=registry
        )  # fmt: skip
        ProcessCollector(registry=registry)
        self._worker: WatchedWorker | None = None
        self._data_dir: Path | None = None
        self._count_exports: Callable[[], Mapping[str, int]] | None = None
        self._stats: EngineStats | None = None
        registry.register(self)

    def watch(
        self, worker: WatchedWorker, data_dir: Path, count_exports: Callable[[], Mapping[str, int]]
    ) -> None:
        """Ask these at every scrape; `count_exports` gives the export jobs by status."""
        self._worker, self._data_dir, self._count_exports = worker, data_dir, count_exports

    def observe(self, stats: EngineStats) -> None:
        self._stats = stats
        if stats.batch_tokens:
            self._steps.observe(stats.step_seconds)

    def collect(self) -> Iterable[Metric]:
        worker = self._worker
        state = worker.state if worker else "starting"
        yield _gauge(
            "engine_state",
            "1 for the state that the engine is in",
            "state",
            {name: float(name == state) for name in get_args(EngineState)},
        )
        restarts = CounterMetricFamily("loramux_worker_restarts", "Workers started after one had died")
        restarts.add_metric([], worker.restarts if worker else 0)
        yield restarts
        yield from self._memory()
        yield _gauge("data_disk_bytes", "The file system of the data directory", "state", self._disk())
        counts = self._count_exports() if self._count_exports else {}
        yield _gauge(
            "export_jobs", "Export jobs by status", "status", {s: counts.get(s, 0) for s in EXPORT_STATUSES}
        )

    def _memory(self) -> Iterable[Metric]:
        ready, stats = _ready(self._worker), self._stats
        yield _gauge(
            "memory_bytes",
            "What the worker holds, by what it is for; pools count as a whole",
            "kind",
            {
                "weights": ready.weight_bytes if ready else 0,
                "kv_cache": ready.kv_cache_bytes if ready else 0,
                "adapter_pool": _pool_bytes(ready) if ready else 0,
                "adapter_host": stats.host_bytes if stats else 0,
            },
        )
        yield _gauge(
            "device_memory_bytes",
            "CUDA memory: held by the worker's allocator, and free for anybody; 0 without CUDA",
            "state",
            {
                "held": stats.device_memory_held if stats else 0,
                "free": stats.device_memory_free if stats else 0,
            },
        )
        yield _gauge(
            "worker_resident_memory_bytes",
            "Host memory of the worker process",
            None,
            {"": self._worker_rss()},
        )

    def _worker_rss(self) -> float:
        pid = self._worker.worker_pid if self._worker else None
        try:
            return float(psutil.Process(pid).memory_info().rss) if pid is not None else 0.0
        except psutil.Error:
            return 0.0  # it has just died

    def _disk(self) -> Mapping[str, float]:
        if self._data_dir is None:
            return {"free": 0, "total": 0}
        try:
            usage = shutil.disk_usage(self._data_dir)
        except OSError:
            return {"free": 0, "total": 0}
        return {"free": usage.free, "total": usage.total}


def _ready(worker: WatchedWorker | None) -> Ready | None:
    try:
        return worker.ready if worker else None
    except EngineError:
        return None


def _pool_bytes(ready: Ready) -> int:
    row = sum(sum(shape) for shape in ready.linear_shapes.values()) * _ITEM_BYTES.get(ready.dtype, 2)
    return ready.lora_rows * row


def _gauge(name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"loramux_{name}", text, labels=[label] if label else [])
    for value, number in values.items():
        family.add_metric([value] if label else [], number)
    return family
