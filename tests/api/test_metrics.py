"""What /metrics says, and that it stays small."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loramux_server.engine.messages import AdapterLoad, EngineStats, StepOutput, TokenOutput
from loramux_server.engine.stats import DraftCounts
from loramux_server.metrics import MAX_ADAPTER_LABELS, Metrics
from tests.api.conftest import Call, Stand

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Metrics) -> Samples:
    text = metrics.render("")[0].decode()
    return {
        (sample.name.removeprefix("loramux_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def stats(**fields: Any) -> EngineStats:
    plain: dict[str, Any] = {
        "step": 1,
        "running": 0,
        "waiting": 0,
        "kv_blocks_used": 0,
        "kv_blocks_total": 8,
        "batch_tokens": 0,
        "batch_adapters": 0,
        "preemptions": 0,
        "device_adapters": [],
        "host_adapters": [],
    }
    return EngineStats(**(plain | fields))


async def complete(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"} | fields)


async def test_requests_are_counted_by_adapter(client: httpx.AsyncClient, stand: Stand) -> None:
    await complete(client, n=3)
    await complete(client, model="pirate@a1b2c3d4", stop="Hello")
    await complete(client, model="nobody")
    await complete(client, n=0)
    m = stand.metrics
    assert value(m, "prompt_tokens_total", adapter="_base") == 2
    assert value(m, "generation_tokens_total", adapter="_base") == 9
    assert value(m, "request_success_total", adapter="_base", finished_reason="stop") == 3
    assert value(m, "generation_tokens_total", adapter="pirate") == 1
    assert value(m, "request_success_total", adapter="pirate", finished_reason="abort") == 0
    assert value(m, "time_to_first_token_seconds_count") == 4
    assert value(m, "inter_token_latency_seconds_count") == 6
    assert value(m, "e2e_request_latency_seconds_count") == 4
    assert value(m, "request_errors_total", code="model_not_found") == 1
    assert value(m, "request_errors_total", code="invalid_request") == 1
    assert not any("nobody" in str(labels) for _, labels in samples(m))


async def test_failures_and_departures_are_not_success(client: httpx.AsyncClient, stand: Stand) -> None:
    def fails(call: Call) -> list[TokenOutput]:
        return [TokenOutput(call.request_id, [], finish="error")]

    stand.engine.script = fails
    await complete(client)
    stand.engine.script, stand.engine.delay = None, 10
    task = asyncio.create_task(complete(client))
    async with asyncio.timeout(30):
        while len(stand.engine.calls) < 2:
            await asyncio.sleep(0.01)
    info = dict(next(labels for name, labels in samples(stand.metrics) if name == "lora_requests_info"))
    assert info == {"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    m = stand.metrics
    assert value(m, "request_success_total", adapter="_base", finished_reason="error") == 1
    assert value(m, "request_success_total", adapter="_base", finished_reason="abort") == 1


def test_the_engines_steps() -> None:
    m = Metrics(max_loras=4)
    loads = [AdapterLoad("g", "host", 0.2, True), AdapterLoad("g", "device", 0.1, False)]
    busy = stats(running=3, waiting=2, kv_blocks_used=2, batch_tokens=7, batch_adapters=2, preemptions=5)
    m.observe_step(StepOutput([], busy, loads))
    assert (value(m, "num_requests_running"), value(m, "num_requests_waiting")) == (3, 2)
    assert value(m, "kv_cache_usage_perc") == 0.25
    assert (value(m, "batch_size_sum"), value(m, "batch_adapters_sum")) == (7, 2)
    assert value(m, "adapter_loads_total", tier="host", result="ok") == 1
    assert value(m, "adapter_loads_total", tier="device", result="failed") == 1
    assert value(m, "adapter_load_seconds_count", tier="host") == 1
    m.observe_step(StepOutput([], stats(preemptions=6)))
    assert (value(m, "preemptions_total"), value(m, "batch_size_count")) == (6, 1)
    m.observe_step(StepOutput([], stats(preemptions=2)))  # the worker was restarted
    assert value(m, "preemptions_total") == 8


def test_the_prefix_cache() -> None:
    m = Metrics(max_loras=4)
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total", "prefix_cache_blocks")
    for queries, hits, blocks, counted in (
        (100, 0, 6, [100, 0, 6]),
        (150, 48, 8, [150, 48, 8]),
        (20, 0, 1, [170, 48, 1]),  # the worker was restarted
        (60, 16, 2, [210, 64, 2]),
    ):
        counts = stats(prefix_cache_queries=queries, prefix_cache_hits=hits, kv_blocks_cached=blocks)
        m.observe_step(StepOutput([], counts))
        assert [value(m, name) for name in names] == counted


def test_drafts() -> None:
    m = Metrics(max_loras=4)
    names = [f"spec_decode_num_{what}_total" for what in ("drafts", "draft_tokens", "accepted_tokens")]
    for drafts, counted in (
        (None, [0, 0, 0]),
        (DraftCounts(3, 12, 7), [3, 12, 7]),
        (DraftCounts(4, 16, 7), [4, 16, 7]),
        (DraftCounts(1, 4, 2), [5, 20, 9]),  # the worker was restarted
        (DraftCounts(1, 4, 2), [5, 20, 9]),
    ):
        m.observe_step(StepOutput([], stats(spec_decode=drafts)))
        assert [value(m, name) for name in names] == counted


def test_info_series_are_replaced() -> None:
    m = Metrics(max_loras=4)
    for base in ("one", "two"):
        m.describe(version="1", base=base, quantization="nf4", dtype="bf16")
    infos = [labels for name, labels in samples(m) if name == "model_info"]
    assert infos == [frozenset({("base", "two"), ("quantization", "nf4"), ("dtype", "bf16")})]
    assert value(m, "build_info", version="1") == 1


def test_lora_requests_info_is_one_series() -> None:
    m = Metrics(max_loras=4)
    with m.request("a", 1) as first, m.request("b", 1), m.request(None, 1):
        first.tokens(1)
        info = [dict(labels) for name, labels in samples(m) if name == "lora_requests_info"]
        assert info == [{"max_lora": "4", "running_lora_adapters": "a", "waiting_lora_adapters": "b"}]
    infos = [dict(labels) for name, labels in samples(m) if name == "lora_requests_info"]
    assert infos == [{"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}]


def test_the_number_of_series_is_bounded_and_shrinks() -> None:
    m = Metrics(max_loras=4)

    def use(count: int) -> set[str]:
        for place in range(count):
            with m.request(f"adapter-{place}", 1) as tracked:
                tracked.tokens(1)
                tracked.finished("stop")
        return {dict(labels)["adapter"] for _, labels in samples(m) if "adapter" in dict(labels)}

    seen = use(MAX_ADAPTER_LABELS + 50)
    assert len(seen) == MAX_ADAPTER_LABELS + 1
    assert value(m, "generation_tokens_total", adapter="_other") == 50
    before = len(samples(m))
    assert len(use(MAX_ADAPTER_LABELS + 80)) == len(seen)
    assert len(samples(m)) == before
    with m.request("adapter-1", 1) as tracked:
        m.adapter_deleted("adapter-1")
        tracked.tokens(5)
    m.adapter_deleted("adapter-1")
    m.adapter_deleted("never-seen")
    assert not any("adapter-1" in dict(labels).values() for _, labels in samples(m))


def test_rejected_adapters() -> None:
    m = Metrics(max_loras=4)
    m.adapter_rejected()
    assert value(m, "adapters_rejected_total") == 1


async def test_formats_and_head(client: httpx.AsyncClient) -> None:
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert plain.headers["content-type"].count("charset") == 1
    openmetrics = await client.get(
        "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert openmetrics.text.endswith("# EOF\n")
    assert (await client.head("/metrics")).status_code == 200
