"""The collectors about fine-tuning: jobs by status, and what the running one does.

Promises: no label that a caller chose, and no series for each job: one job trains at a time, and the gauge of its loss is
there only while it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux_server.engine.messages import TrainingStep
from loramux_server.training.records import STATUSES


class TrainingMetrics(Collector):
    """Registers itself and its counters with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"loramux_training_{name}_total", text, registry=registry)

        self._steps = counter("steps", "Optimizer steps, those done again after an interruption included")
        self._tokens = counter("tokens", "Tokens that were trained on, of these steps")
        self._seconds = counter("seconds", "Time spent computing them")
        self._waited = counter("waited_seconds", "Time that training left to serving in between")
        self._loss: float | None = None
        self._count: Callable[[], Mapping[str, int]] | None = None
        registry.register(self)

    def watch(self, count: Callable[[], Mapping[str, int]]) -> None:
        """`count` gives the jobs by status."""
        self._count = count

    def observe(self, step: TrainingStep) -> None:
        self._steps.inc()
        self._tokens.inc(step.trained_tokens)
        self._seconds.inc(step.seconds)
        self._waited.inc(step.waited)
        self._loss = step.train_loss

    def idle(self) -> None:
        """Nothing is trained any more."""
        self._loss = None

    def collect(self) -> Iterable[Metric]:
        counts = self._count() if self._count else {}
        jobs = GaugeMetricFamily("loramux_training_jobs", "Fine-tuning jobs by status", labels=["status"])
        for status in STATUSES:
            jobs.add_metric([status], counts.get(status, 0))
        yield jobs
        if self._loss is not None:
            yield GaugeMetricFamily(
                "loramux_training_loss", "Training loss of the running job's last step", value=self._loss
            )
