"""The collectors about adapters as things that are stored, moved and evicted; per-request counts are in `metrics.py`.

Promises: no label that a caller chose. Gauges are read when they are scraped, from the latest engine step and from
the catalogue; before there is either they are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux_server.engine.messages import EngineStats, StepOutput

STATES = ("available", "loading", "ready", "failed")

_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class AdapterMetrics(Collector):
    """Registers itself and its counters with `registry`."""

    def __init__(self, registry: CollectorRegistry, *, max_loras: int) -> None:
        self._loads = Counter(
            "loramux_adapter_loads_total", "Adapters moved to a tier", ["tier", "result"], registry=registry
        )
        self._load_seconds = Histogram(
            "loramux_adapter_load_seconds",
            "How long moving one took",
            ["tier"],
            buckets=_LOAD_BUCKETS,
            registry=registry,
        )
        self._evictions = Counter(
            "loramux_adapter_evictions_total",
            "Adapters that left a tier to make room",
            ["tier", "reason"],
            registry=registry,
        )
        self._rejected = Counter(
            "loramux_adapters_rejected_total", "Adapters that did not pass the gate", registry=registry
        )
        self._max_loras = max_loras
        self._stats: EngineStats | None = None
        self._count_states: Callable[[], Mapping[str, int]] | None = None
        self._stored_bytes: Callable[[], int] | None = None
        registry.register(self)

    def watch(self, *, states: Callable[[], Mapping[str, int]], stored_bytes: Callable[[], int]) -> None:
        """Ask these at every scrape; they must be quick and may be called from any thread."""
        self._count_states, self._stored_bytes = states, stored_bytes

    def rejected(self) -> None:
        self._rejected.inc()

    def observe_step(self, step: StepOutput) -> None:
        self._stats = step.stats
        for load in step.loads:
            self._loads.labels(load.tier, "ok" if load.ok else "failed").inc()
            if load.ok:
                self._load_seconds.labels(load.tier).observe(load.seconds)
        for eviction in step.evictions:
            self._evictions.labels(eviction.tier, eviction.reason).inc()

    def collect(self) -> Iterable[Metric]:
        counts = self._count_states() if self._count_states else {}
        yield _family(
            "adapters", "Registered adapters by state", "state", {s: counts.get(s, 0) for s in STATES}
        )
        stats = self._stats
        yield _family(
            "adapter_bytes",
            "Bytes of adapters by tier, each content counted once",
            "tier",
            {
                "disk": self._stored_bytes() if self._stored_bytes else 0,
                "host": stats.host_bytes if stats else 0,
                "device": stats.device_bytes if stats else 0,
            },
        )
        used = len(stats.device_slots) if stats else 0
        yield GaugeMetricFamily("loramux_adapter_slots_used", "Device slots that hold an adapter", value=used)
        yield GaugeMetricFamily("loramux_adapter_slots", "Device slots there are", value=self._max_loras)


def _family(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"loramux_{name}", help_text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
