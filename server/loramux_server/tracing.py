"""OpenTelemetry traces of requests, sent to a collector over OTLP/HTTP. Needs the extra `otel`.

One span a request, made when the request has ended from what was observed of it, under the caller's `traceparent`. Names are
those of OpenTelemetry's conventions for generative AI and HTTP; latencies as vLLM names them. No prompts, no answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from loramux_adapters.errors import ConfigError
from loramux_server.observed import ObservedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

_OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}
_UNTRACED = frozenset({"/health", "/ready", "/metrics"})
_EXPORT_TIMEOUT_S = 5
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


class Tracing:
    """Spans to one provider. `close` sends what is left."""

    def __init__(self, provider: TracerProvider, base: str) -> None:
        """`base` is what the model of a request without an adapter is called."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._base = base
        self._tracer = provider.get_tracer("loramux")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, endpoint: str, *, base: str, version: str) -> Tracing:
        """Raises ConfigError without OpenTelemetry. A collector that does not answer costs spans, no requests."""
        _check_installed()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = Resource({"service.name": "loramux", "service.version": version})
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, as everywhere else, win.
        provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, base)

    def record(self, request: ObservedRequest, traceparent: Mapping[str, str]) -> None:
        """Make the span of a request that has ended. `traceparent` holds the W3C headers that came with it."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        if request.route in _UNTRACED:
            return
        operation = _OPERATIONS.get(request.route)
        model = self._model(request)
        span = self._tracer.start_span(
            f"{operation} {model}" if operation and model else f"{request.method} {request.route}",
            context=self._propagator.extract(traceparent),
            kind=SpanKind.SERVER,
            attributes=self._attributes(request, operation),
            start_time=request.began_unix_ns,
        )
        if request.first_token is not None:
            span.add_event("first_token", timestamp=_unix_ns(request, request.first_token))
        if request.failed:
            span.set_status(Status(StatusCode.ERROR, request.error_code))
        span.end(_unix_ns(request, request.began + request.seconds))

    def close(self) -> None:
        """Blocks while the last spans are sent."""
        self._provider.shutdown()

    def _model(self, request: ObservedRequest) -> str | None:
        return (request.adapter or self._base) if request.sequences else None

    def _attributes(self, request: ObservedRequest, operation: str | None) -> dict[str, AttributeValue]:
        found: dict[str, AttributeValue | None] = {
            "http.request.method": request.method,
            "http.route": request.route,
            "http.response.status_code": request.status,
            "error.type": request.error_code,
            "loramux.request.id": request.id,
            "gen_ai.operation.name": operation,
        }
        if request.sequences:
            first = request.first_token
            found |= {
                "gen_ai.provider.name": "loramux",
                "gen_ai.request.model": self._model(request),
                "gen_ai.response.model": self._model(request),
                "gen_ai.response.finish_reasons": tuple(request.finish_reasons) or None,
                "gen_ai.usage.input_tokens": request.prompt_tokens,
                "gen_ai.usage.output_tokens": request.completion_tokens,
                "gen_ai.latency.e2e": request.seconds,
                "gen_ai.latency.time_in_queue": request.queue_seconds,
                "gen_ai.latency.time_to_first_token": None if first is None else first - request.began,
                "loramux.adapter.generation": request.generation,
            }
        return {key: value for key, value in found.items() if value is not None}


def _check_installed() -> None:
    for module in _NEEDED:
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(
                "--otlp-traces-endpoint needs OpenTelemetry, which is not installed: pip install 'loramux[otel]'",
                param="otlp_traces_endpoint",
            )


def _unix_ns(request: ObservedRequest, seconds: float) -> int:
    """A moment of the monotonic clock as Unix time."""
    return request.began_unix_ns + int((seconds - request.began) * 1e9)
