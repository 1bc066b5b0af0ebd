"""Every Prometheus collector of the server, in a registry of its own.

Promises: a bounded number of series. The `adapter` label is the name of a registered adapter, `_base`, or
`_other` beyond the first hundred names, and goes when the adapter is deleted. Nothing here is labelled by
user, path or anything a caller made up. Counting happens in two places: per request (`request`) and per
engine step (`observe_step`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from loramux_server.adapter_metrics import AdapterMetrics
from loramux_server.engine.messages import EngineStats, StepOutput
from loramux_server.http_metrics import HttpMetrics
from loramux_server.latency_metrics import LatencyMetrics
from loramux_server.observed import current_request
from loramux_server.prefix_cache_metrics import PrefixCacheMetrics
from loramux_server.service_metrics import ServiceMetrics
from loramux_server.spec_decode_metrics import SpecDecodeMetrics
from loramux_server.training_metrics import TrainingMetrics
from loramux_server.usage import Usage

BASE = "_base"
OTHER = "_other"
MAX_ADAPTER_LABELS = 100

Outcome = Literal["stop", "length", "abort", "error"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "abort", "error")

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_ADAPTERS_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What the server counts. One instance per process (or per test)."""

    def __init__(self, *, max_loras: int) -> None:
        registry = self.registry = CollectorRegistry()
        self._labels = _AdapterLabels()
        self._running = Gauge("loramux_num_requests_running", "Sequences in the batch", registry=registry)
        self._waiting = Gauge("loramux_num_requests_waiting", "Sequences in the queue", registry=registry)
        self._kv_cache = Gauge("loramux_kv_cache_usage_perc", "KV blocks in use, 0 to 1", registry=registry)
        self._prefix_cache = PrefixCacheMetrics(registry)
        self._spec_decode = SpecDecodeMetrics(registry)
        self._prompt = _counter(registry, "prompt_tokens", "Prompt tokens accepted", "adapter")
        self._generated = _counter(registry, "generation_tokens", "Tokens generated", "adapter")
        self._success = _counter(
            registry, "request_success", "Sequences that ended, by how", "adapter", "finished_reason"
        )
        self._errors = _counter(registry, "request_errors", "HTTP requests answered with an error", "code")
        self._latency = LatencyMetrics(registry)
        self.http = HttpMetrics(registry)
        self.service = ServiceMetrics(registry)
        self.adapters = AdapterMetrics(registry, max_loras=max_loras)
        self.training = TrainingMetrics(registry)
        self.usage = Usage()
        self._batch_size = _histogram(registry, "batch_size", "Tokens in a step", _BATCH_BUCKETS)
        self._batch_adapters = _histogram(
            registry, "batch_adapters", "Distinct adapters in a step", _ADAPTERS_BUCKETS
        )
        self._preemptions = _counter(registry, "preemptions", "Sequences put back for lack of KV blocks")
        self._preemptions_seen = 0
        self._build_info = Gauge(
            "loramux_build_info", "Constant 1; which loramux this is", ["version"], registry=registry
        )
        self._model_info = Gauge(
            "loramux_model_info",
            "Constant 1; which base is resident",
            ["base", "quantization", "dtype"],
            registry=registry,
        )
        self._in_flight = _InFlight(max_loras)
        registry.register(self._in_flight)

    def describe(self, *, version: str, base: str, quantization: str, dtype: str) -> None:
        """Set the info series, once the base is known."""
        for gauge, values in (
            (self._build_info, (version,)),
            (self._model_info, (base, quantization, dtype)),
        ):
            gauge.clear()
            gauge.labels(*values).set(1)

    @contextmanager
    def request(self, adapter: str | None, prompt_tokens: int) -> Iterator[TrackedSequence]:
        """Count one sequence from its submission to its end, however it ends. None is the base."""
        if adapter is not None:
            self.usage.began(adapter)
        label = BASE if adapter is None else self._labels.of(adapter)
        self._prompt.labels(label).inc(prompt_tokens)
        tracked = TrackedSequence(self, adapter, label, prompt_tokens)
        outcome: Outcome = "abort"
        try:
            with self._in_flight.counted(tracked):
                yield tracked
        except Exception:
            outcome = "error"
            raise
        finally:
            tracked.ended(outcome)

    def request_failed(self, code: str) -> None:
        """An HTTP request was answered with an error. `code` comes from our own closed set."""
        self._errors.labels(code).inc()

    def adapter_rejected(self) -> None:
        self.adapters.rejected()

    def adapter_deleted(self, name: str) -> None:
        """Drop the series of an adapter that no longer exists."""
        self.usage.forget(name)
        if not self._labels.forget(name):
            return
        for counter in (self._prompt, self._generated):
            counter.remove(name)
        for outcome in OUTCOMES:
            self._success.remove(name, outcome)

    def observe_step(self, step: StepOutput) -> None:
        """A listener of the engine."""
        self._observe_stats(step.stats)
        self.adapters.observe_step(step)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def _observe_stats(self, stats: EngineStats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_cache.set(stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
        self._prefix_cache.observe(stats)
        self._spec_decode.observe(stats)
        self.service.observe(stats)
        if stats.batch_tokens:
            self._batch_size.observe(stats.batch_tokens)
            self._batch_adapters.observe(stats.batch_adapters)
        # The engine counts from its own start; after a restart of the worker it begins at zero again.
        seen, self._preemptions_seen = self._preemptions_seen, stats.preemptions
        self._preemptions.inc(stats.preemptions - (seen if stats.preemptions >= seen else 0))


class TrackedSequence:
    """One sequence being generated."""

    def __init__(self, metrics: Metrics, adapter: str | None, label: str, prompt_tokens: int) -> None:
        self.adapter = adapter
        self._latency = metrics._latency
        # Children are held, so that an adapter deleted meanwhile does not get its series back.
        self._generated = metrics._generated.labels(label)
        self._outcomes = {outcome: metrics._success.labels(label, outcome) for outcome in OUTCOMES}
        self._began = self._latest = time.perf_counter()
        self._first: float | None = None
        self._prompt_tokens, self._tokens = prompt_tokens, 0
        self._finish: Outcome | None = None
        self._request = current_request()
        if self._request is not None:
            self._request.sequence_began(adapter, prompt_tokens)

    @property
    def has_begun(self) -> bool:
        return self._first is not None

    @property
    def has_finished(self) -> bool:
        return self._finish is not None

    def tokens(self, count: int, queue_seconds: float | None = None) -> None:
        """The engine gave `count` more tokens; with the first ones it says how long the sequence was in its queue."""
        now = time.perf_counter()
        self._generated.inc(count)
        self._tokens += count
        if self._first is not None:
            self._latency.itl.observe(now - self._latest)
        else:
            self._first = now
            self._latency.ttft.observe(now - self._began)
            if queue_seconds is not None:
                self._latency.queue.observe(queue_seconds)
                self._latency.prefill.observe(max(0.0, now - self._began - queue_seconds))
        if self._request is not None:
            self._request.tokens_came(count, now)
            if queue_seconds is not None:
                self._request.waited(queue_seconds)
        self._latest = now

    def finished(self, outcome: Outcome) -> None:
        """The last token came."""
        self._finish = outcome
        now = time.perf_counter()
        self._latency.e2e.observe(now - self._began)
        if self._first is not None:
            self._latency.decode.observe(now - self._first)
            if self._tokens > 1:
                self._latency.per_token.observe((now - self._first) / (self._tokens - 1))
        self._latency.generation_tokens.observe(self._tokens)
        if self._prompt_tokens:  # the other choices of a prompt do not count it again
            self._latency.prompt_tokens.observe(self._prompt_tokens)

    def ended(self, otherwise: Outcome) -> None:
        """Nothing more will come, whether it finished or not."""
        self._outcomes[self._finish or otherwise].inc()
        if self._request is not None:
            self._request.finish_reasons.append(self._finish or otherwise)


class _AdapterLabels:
    """Which adapters have a label of their own."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def of(self, name: str) -> str:
        if name not in self._names and len(self._names) < MAX_ADAPTER_LABELS:
            self._names.add(name)
        return name if name in self._names else OTHER

    def forget(self, name: str) -> bool:
        known = name in self._names
        self._names.discard(name)
        return known


class _InFlight(Collector):
    """vLLM's `lora_requests_info`, which routers read: one series whose value is the time.

    A labelled gauge would leave a series behind for every combination of names.
    """

    def __init__(self, max_loras: int) -> None:
        self._max_loras = max_loras
        self._sequences: set[TrackedSequence] = set()

    @contextmanager
    def counted(self, sequence: TrackedSequence) -> Iterator[None]:
        self._sequences.add(sequence)
        try:
            yield
        finally:
            self._sequences.remove(sequence)

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "loramux_lora_requests_info",
            "Adapters of the running and of the waiting requests; the value is the time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = [self._adapters(has_begun) for has_begun in (True, False)]
        family.add_metric([str(self._max_loras), *names], time.time())
        yield family

    def _adapters(self, has_begun: bool) -> str:
        return ",".join(
            sorted({one.adapter for one in self._sequences if one.adapter and one.has_begun == has_begun})
        )


def _counter(registry: CollectorRegistry, name: str, help_text: str, *labels: str) -> Counter:
    return Counter(f"loramux_{name}_total", help_text, labels, registry=registry)


def _histogram(
    registry: CollectorRegistry, name: str, help_text: str, buckets: tuple[float, ...], *labels: str
) -> Histogram:
    return Histogram(f"loramux_{name}", help_text, labels, buckets=buckets, registry=registry)
