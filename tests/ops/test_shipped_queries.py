"""Metrics, their documentation, the dashboard and the alerts agree. Needs no Prometheus."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.ops.support import (
    DASHBOARD,
    DEPLOY,
    ROOT,
    RULES,
    SCRAPE,
    SCRAPE_LABELS,
    dashboard_queries,
    exposed,
    families,
    grouped_labels,
    rule_expressions,
    selectors,
)

QUERIES = [*dashboard_queries(), *rule_expressions()]


def documented() -> set[str]:
    """The first column of the table of metrics."""
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_documentation_lists_exactly_the_metrics_there_are() -> None:
    assert len(families()) > 40
    assert documented() == {name for name in families() if not name.startswith("process_")}


def test_the_queries_are_found() -> None:
    assert len(dashboard_queries()) > 40
    assert len(rule_expressions()) >= 6
    assert list(selectors('sum by (a) (rate(m_total{b="1"}[5m])) / n')) == [("m_total", {"b"}), ("n", set())]


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[title for title, _ in QUERIES])
def test_a_query_uses_metrics_and_labels_that_exist(title: str, expression: str) -> None:
    known = exposed() | SCRAPE
    used = list(selectors(expression))
    assert used, expression
    labels: set[str] = set(SCRAPE_LABELS)
    for metric, matched in used:
        assert metric in known, f"{title}: {metric} is no metric"
        assert matched <= known[metric] | SCRAPE_LABELS, f"{title}: {metric} has no label {matched}"
        labels |= known[metric]
    assert grouped_labels(expression) <= labels, f"{title}: {expression}"


def test_legends_name_labels_that_are_left() -> None:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for query in panel.get("targets", ()):
            wanted = set(re.findall(r"{{\s*(\w+)\s*}}", query["legendFormat"]))
            expression = query["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            left = grouped_labels(expression) or {
                label for metric, _ in selectors(expression) for label in exposed()[metric] | SCRAPE_LABELS
            }
            assert wanted <= left, (panel["title"], wanted, left)


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert {"summary", "action"} <= rule["annotations"].keys(), rule["alert"]


def test_prometheus_reads_the_rules_and_finds_the_server() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    assert config["rule_files"] == [RULES.name]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "loramux"  # the alerts ask for it
    (target,) = job["static_configs"][0]["targets"]
    assert target.partition(":")[0] in compose["services"]


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], Any] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]
