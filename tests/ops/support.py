"""The metrics that /metrics really has, with their labels, and the queries that are shipped over them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from loramux_server.engine.messages import (
    AdapterEviction,
    AdapterLoad,
    EngineStats,
    StepOutput,
    TrainingStep,
)
from loramux_server.metrics import Metrics
from loramux_server.observed import ObservedRequest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "loramux.json"
RULES = DEPLOY / "prometheus" / "rules.yml"
# What Prometheus itself adds to a scrape and to its series.
SCRAPE = {"up": {"job", "instance"}}
SCRAPE_LABELS = {"job", "instance"}


@cache
def exposed() -> dict[str, set[str]]:
    """Name of each sample -> its labels, after everything that counts has counted once."""
    metrics = Metrics(max_loras=4)
    metrics.describe(version="0", base="base", quantization="nf4", dtype="float32")
    with metrics.request("adapter", 3) as sequence:
        sequence.tokens(1, 0.1)
        sequence.tokens(1)
        sequence.finished("stop")
    metrics.request_failed("some_code")
    stats = EngineStats(
        step=1, running=1, waiting=0, kv_blocks_used=1, kv_blocks_total=8, batch_tokens=2, batch_adapters=1,
        preemptions=0, device_adapters=[], host_adapters=[],
    )  # fmt: skip
    loads = [AdapterLoad("g", "host", 0.2, True)]
    metrics.observe_step(StepOutput([], stats, loads, [AdapterEviction("g", "host", "capacity")]))
    metrics.training.observe(
        TrainingStep("job", 1, 2, 0.5, 1.0, 0.5, 1e-4, 1.0, 10, 5, 0.1, 0.1, memory_bytes=1)
    )
    metrics.http.began()
    metrics.http.ended(ObservedRequest("id", "GET", route="/v1/models", status=200))
    text = metrics.render("")[0].decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


@cache
def families() -> set[str]:
    """The names as people know them: of a histogram without _bucket, _sum and _count."""
    histograms = {name.removesuffix("_bucket") for name in exposed() if name.endswith("_bucket")}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    return (set(exposed()) - parts) | histograms


def dashboard_queries() -> list[tuple[str, str]]:
    """(panel, expression), Grafana's variables filled in."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            assert "$" not in expression, expression
            found.append((panel["title"], expression))
    return found


def rule_expressions() -> list[tuple[str, str]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels that are matched) for every selector of an expression."""
    import promql_parser

    yield from _walk(promql_parser.parse(expression))


def _walk(node: Any) -> Iterator[tuple[str, set[str]]]:
    selector = getattr(node, "vector_selector", None) or (node if hasattr(node, "matchers") else None)
    if selector is not None:
        yield selector.name, {matcher.name for matcher in selector.matchers.matchers}
        return
    for name in ("expr", "lhs", "rhs"):
        if getattr(node, name, None) is not None:
            yield from _walk(getattr(node, name))
    for argument in getattr(node, "args", None) or ():
        yield from _walk(argument)


def grouped_labels(expression: str) -> set[str]:
    """Those after `by`."""
    lists = re.findall(r"\bby\s*\(([^)]*)\)", expression)
    return {label.strip() for one in lists for label in one.split(",")}
