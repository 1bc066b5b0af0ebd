"""What is said of a request when it has ended: one log line, counters by route, a span. Never a text of the caller's."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from loramux_adapters.errors import ConfigError
from loramux_server import tracing as tracing_module
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.engine.messages import TokenOutput
from loramux_server.logs import JsonFormatter, TextFormatter
from loramux_server.tracing import Tracing
from tests.api.conftest import Call, Stand
from tests.api.test_metrics import value

SECRET = "Schwarzwälder Kirschtorte"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, at the lowest level, as JSON lines."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(JsonFormatter("front"))
    handler.addFilter(lambda record: not record.name.startswith("httpx"))  # the tests' own client
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield sink
    root.removeHandler(handler)
    root.setLevel(before)


def access_lines(log: io.StringIO) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if line["logger"] == "loramux.access"]


async def chat(client: httpx.AsyncClient, model: str = "pirate", **more: Any) -> httpx.Response:
    messages = [{"role": "user", "content": SECRET}]
    headers = {"x-request-id": "my-id", **more.pop("headers", {})}
    body = {"model": model, "messages": messages, **more}
    return await client.post("/v1/chat/completions", json=body, headers=headers)


# --- the log -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_one_line_says_how_a_request_went(
    client: httpx.AsyncClient, log: io.StringIO, stream: bool
) -> None:
    answer = await chat(client, stream=stream)
    assert answer.status_code == 200
    (line,) = access_lines(log)
    assert line["request_id"] == answer.headers["x-request-id"] == "my-id"
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["adapter"], line["generation"]) == ("pirate", "a1b2c3d4e5f60718")
    assert line["completion_tokens"] == 3
    assert line["prompt_tokens"] > 10
    assert 0 < line["first_token_seconds"] <= line["seconds"] < 60
    assert line["level"] == "info"


async def test_no_line_has_the_prompt_or_the_answer(
    client: httpx.AsyncClient, stand: Stand, log: io.StringIO
) -> None:
    await chat(client)
    await chat(client, model=SECRET)  # unknown
    await chat(client, max_tokens=100_000)  # too long
    await chat(client, temperature=SECRET)  # a wrong type
    stand.engine.script = lambda call: [TokenOutput(call.request_id, [], "error", error="the worker died")]
    await chat(client)
    await client.get(f"/v1/models/{SECRET}")
    await client.get(f"/{SECRET}")
    assert [line["status"] for line in access_lines(log)] == [200, 404, 400, 400, 503, 404, 404]
    assert "the worker died" in log.getvalue()
    for text in (SECRET, "Schwarzw", "Hello", "Kirschtorte"):
        assert text not in log.getvalue()


async def test_failures_and_unknown_paths(client: httpx.AsyncClient, log: io.StringIO) -> None:
    await client.get("/nowhere")
    await chat(client, model="nobody")
    unmatched, unknown = access_lines(log)
    assert (unmatched["route"], unmatched["status"]) == ("_unmatched", 404)
    assert (unknown["error_code"], unknown["status"]) == ("model_not_found", 404)
    assert "adapter" not in unknown
    assert "prompt_tokens" not in unknown


async def test_probes_are_for_debugging_unless_they_fail(
    client: httpx.AsyncClient, stand: Stand, log: io.StringIO
) -> None:
    await client.get("/ready")
    stand.engine.state = "restarting"
    await client.get("/ready")
    assert [(line["status"], line["level"]) for line in access_lines(log)] == [(200, "debug"), (503, "info")]


async def test_lines_of_the_engines_errors_have_the_id(
    client: httpx.AsyncClient, stand: Stand, log: io.StringIO
) -> None:
    def breaks(call: Call) -> list[Exception]:
        return [RuntimeError("broken")]

    stand.engine.script = breaks  # type: ignore[assignment]
    await chat(client)
    (failed,) = [json.loads(line) for line in log.getvalue().splitlines() if '"exception"' in line]
    assert failed["request_id"] == "my-id"
    assert "RuntimeError: broken" in failed["exception"]
    assert log.getvalue().count("\n") == len(log.getvalue().splitlines())


async def test_text_lines_end_with_the_id(client: httpx.AsyncClient) -> None:
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(TextFormatter())
    access = logging.getLogger("loramux.access")
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    await chat(client)
    access.removeHandler(handler)
    access.setLevel(logging.NOTSET)
    (line,) = sink.getvalue().splitlines()
    assert "INFO loramux.access: POST /v1/chat/completions 200 seconds=" in line
    assert "adapter=pirate" in line
    assert line.endswith("[my-id]")


# --- counters ----------------------------------------------------------------------------------------------------------


async def test_requests_are_counted_by_route_and_status(client: httpx.AsyncClient, stand: Stand) -> None:
    await chat(client)
    await chat(client, n=0)
    await client.request("BREW", "/coffee/for/me")
    m, route = stand.metrics, "/v1/chat/completions"
    assert value(m, "http_requests_total", method="POST", route=route, status="200") == 1
    assert value(m, "http_requests_total", method="POST", route=route, status="400") == 1
    assert value(m, "http_requests_total", method="_other", route="_unmatched", status="404") == 1
    assert value(m, "http_request_duration_seconds_count", route=route) == 2
    assert value(m, "http_requests_in_flight") == 0
    assert "coffee" not in m.render("")[0].decode()


async def test_parts_of_the_latency(client: httpx.AsyncClient, stand: Stand) -> None:
    def says(call: Call) -> list[TokenOutput]:
        first = TokenOutput(call.request_id, [5], queue_seconds=0.25)
        return [first, TokenOutput(call.request_id, [6]), TokenOutput(call.request_id, [7], "length")]

    stand.engine.script = says
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "n": 2})
    m = stand.metrics
    assert value(m, "request_queue_time_seconds_sum") == 0.5
    assert value(m, "request_prefill_time_seconds_count") == 2
    assert value(m, "request_decode_time_seconds_count") == 2
    assert value(m, "request_time_per_output_token_seconds_count") == 2
    assert value(m, "request_generation_tokens_sum") == 6
    assert (value(m, "request_prompt_tokens_count"), value(m, "request_prompt_tokens_sum")) == (1, 2)


# --- traces ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(stand: Stand, spans: InMemorySpanExporter) -> Any:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = create_app(
        engine=stand.engine,
        adapters=stand.adapters,
        tokenizer=stand.tokenizer,
        settings=ApiSettings(served_model_names=("tiny",), version="9.9"),
        metrics=stand.metrics,
        tracing=Tracing(provider, "tiny"),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
    provider.shutdown()


def only(spans: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, Any]]:
    (span,) = spans.get_finished_spans()
    return span, dict(span.attributes or {})


async def test_a_request_is_one_span(traced: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    await chat(traced, headers={"traceparent": PARENT})
    span, attributes = only(spans)
    assert (span.name, span.kind) == ("chat pirate", SpanKind.SERVER)
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.response.model"] == "pirate"
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.usage.input_tokens"] > 10
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["http.response.status_code"] == 200
    assert attributes["loramux.request.id"] == "my-id"
    assert attributes["loramux.adapter.generation"] == "a1b2c3d4e5f60718"
    assert 0 < attributes["gen_ai.latency.time_to_first_token"] <= attributes["gen_ai.latency.e2e"]
    (event,) = span.events
    assert event.name == "first_token"
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= event.timestamp <= span.end_time
    assert SECRET not in span.to_json()


async def test_the_base_and_other_routes(traced: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    await traced.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    span, attributes = only(spans)
    assert (span.name, attributes["gen_ai.request.model"]) == ("text_completion tiny", "tiny")
    spans.clear()
    await traced.get("/v1/models")
    span, attributes = only(spans)
    assert span.name == "GET /v1/models"
    assert not [name for name in attributes if name.startswith("gen_ai")]
    spans.clear()
    await traced.get("/health")
    await traced.get("/ready")
    await traced.get("/metrics")
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_said(
    traced: httpx.AsyncClient, stand: Stand, spans: InMemorySpanExporter, stream: bool
) -> None:
    def dies(call: Call) -> list[TokenOutput]:
        return [
            TokenOutput(call.request_id, [5]),
            TokenOutput(call.request_id, [], "error", error="the worker died"),
        ]

    stand.engine.script = dies
    await chat(traced, stream=stream)
    span, attributes = only(spans)
    assert span.status.status_code is StatusCode.ERROR
    assert attributes["error.type"] == "engine_unavailable"
    assert attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert attributes["http.response.status_code"] == (200 if stream else 503)


def test_without_the_extra_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'loramux\[otel\]'") as caught:
        Tracing.to_collector("http://127.0.0.1:9/v1/traces", base="tiny", version="1")
    assert caught.value.param == "otlp_traces_endpoint"


def test_a_collector_that_is_not_there_harms_nothing() -> None:
    tracing = Tracing.to_collector("http://127.0.0.1:9/v1/traces", base="tiny", version="1")
    tracing.close()
