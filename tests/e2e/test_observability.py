"""A real server's log, metrics and health as its operator's tools read them."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.e2e.conftest import start_server


def test_json_logs_and_metrics_of_both_processes(tmp_path: Path) -> None:
    server = start_server(tmp_path, ["demo", "--no-demo-adapters", "--log-format", "json"])
    server.url = server.url.rstrip('"}')  # the line that names it is JSON
    try:
        body = {"model": "demo", "prompt": "Kirschtorte", "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        metrics = server.metrics()
    finally:
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"loramux", "loramux.access"} <= {line["logger"] for line in lines}
    (access,) = [line for line in lines if line["logger"] == "loramux.access"]
    assert access["request_id"] == answer.headers["x-request-id"]
    assert (access["status"], access["completion_tokens"]) == (200, 4)
    assert "Kirschtorte" not in server.log.read_text()
    assert metrics['loramux_engine_state{state="ready"}'] == 1
    assert metrics["loramux_worker_restarts_total"] == 0
    assert metrics["loramux_request_queue_time_seconds_count"] == 1
    assert 0 < metrics["loramux_request_queue_time_seconds_sum"] < 60
    assert metrics["loramux_step_seconds_count"] >= 4
    assert metrics["loramux_step_seconds_sum"] > 0
    assert metrics['loramux_memory_bytes{kind="weights"}'] > 10**7
    assert metrics['loramux_memory_bytes{kind="kv_cache"}'] > 10**6
    assert metrics["loramux_worker_resident_memory_bytes"] > 10**8
    assert metrics["process_resident_memory_bytes"] > 10**7
    assert metrics['loramux_data_disk_bytes{state="free"}'] > 0
