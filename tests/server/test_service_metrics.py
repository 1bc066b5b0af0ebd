"""Metrics of the service as a whole: read when scraped, whatever state the worker is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from loramux_adapters.errors import EngineError
from loramux_server.engine.device_memory import DeviceMemory
from loramux_server.engine.interface import EngineState
from loramux_server.engine.messages import Ready
from loramux_server.metrics import Metrics
from tests.api.test_metrics import stats, value


class Worker:
    state: EngineState = "ready"
    restarts = 3
    worker_pid: int | None = os.getpid()
    loaded = True

    @property
    def ready(self) -> Ready:
        if not self.loaded:
            raise EngineError("the base model is still loading")
        return Ready(
            base_name="b", base_identity="i", architecture="A", max_model_len=8, vocab_size=8, device="cpu",
            dtype="float32", quantization="nf4", eos_token_ids=[], linear_shapes={"l": (10, 20)}, weight_bytes=7,
            kv_blocks_total=2, kv_block_size=4, max_loras=1, max_cpu_loras=1, lora_rows=5, kv_cache_bytes=11,
        )  # fmt: skip


def test_the_worker_as_it_is_when_scraped(tmp_path: Path) -> None:
    metrics, worker = Metrics(max_loras=4), Worker()
    assert value(metrics, "engine_state", state="ready") == 0
    assert value(metrics, "engine_state", state="starting") == 1
    metrics.service.watch(worker, tmp_path, lambda: {"queued": 2})
    assert value(metrics, "engine_state", state="ready") == 1
    assert value(metrics, "worker_restarts_total") == 3
    assert value(metrics, "memory_bytes", kind="weights") == 7
    assert value(metrics, "memory_bytes", kind="kv_cache") == 11
    assert value(metrics, "memory_bytes", kind="adapter_pool") == 5 * 30 * 4
    assert (value(metrics, "worker_resident_memory_bytes") or 0) > 2**20
    assert (value(metrics, "data_disk_bytes", state="free") or 0) > 0
    assert value(metrics, "export_jobs", status="queued") == 2
    assert value(metrics, "export_jobs", status="failed") == 0


def test_a_worker_that_loads_or_has_died(tmp_path: Path) -> None:
    metrics, worker = Metrics(max_loras=4), Worker()
    worker.state, worker.worker_pid, worker.loaded = "restarting", 2**22 + 1, False
    metrics.service.watch(worker, tmp_path / "gone", dict)
    assert value(metrics, "engine_state", state="restarting") == 1
    assert value(metrics, "worker_resident_memory_bytes") == 0
    assert value(metrics, "memory_bytes", kind="weights") == 0
    assert value(metrics, "data_disk_bytes", state="free") == 0


def test_steps_that_computed_something_are_timed() -> None:
    metrics = Metrics(max_loras=4)
    metrics.service.observe(stats(batch_tokens=3, step_seconds=0.25, device_memory_held=5, host_bytes=6))
    metrics.service.observe(stats(batch_tokens=0, step_seconds=9.0, device_memory_held=5, host_bytes=6))
    assert (value(metrics, "step_seconds_count"), value(metrics, "step_seconds_sum")) == (1, 0.25)
    assert value(metrics, "device_memory_bytes", state="held") == 5
    assert value(metrics, "memory_bytes", kind="adapter_host") == 6


def test_device_memory_is_asked_for_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device) or 30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    assert DeviceMemory(torch.device("cpu")).read() == (0, 0)
    memory = DeviceMemory(torch.device("cuda"))
    assert (memory.read(), memory.read()) == ((20, 30), (20, 30))
    assert len(asked) == 1
