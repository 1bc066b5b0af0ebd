"""GET /health, /ready, /version and /metrics: what operators and their tools ask."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import EngineError
from loramux_server.api.context import ApiContext
from loramux_server.api.errors import NotServed
from loramux_server.api.openapi import describe_answer
from loramux_server.api.wire import Health, Readiness, Version


def service_router(api: ApiContext) -> APIRouter:
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", openapi_extra=describe_answer(Health))
    async def health() -> Response:
        """Live: 200 unless work is pending and the worker does nothing about it, which the 503 names."""
        if api.engine.stall is not None:
            raise EngineError(api.engine.stall)
        return Response(msgspec.json.encode(Health()), media_type="application/json")

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", openapi_extra=describe_answer(Readiness))
    async def ready() -> Response:
        """200 when requests are accepted; 503 with the reason while starting, restarting, stalled or draining."""
        if api.engine.state != "ready":
            raise EngineError(f"the engine is {api.engine.state}")
        if api.engine.stall is not None:
            raise EngineError(api.engine.stall)
        return Response(msgspec.json.encode(Readiness()), media_type="application/json")

    @router.get("/version", openapi_extra=describe_answer(Version))
    async def version() -> Response:
        return Response(msgspec.json.encode(Version(api.settings.version)), media_type="application/json")

    @router.api_route("/v1/embeddings", methods=["GET", "POST"], include_in_schema=False)
    async def embeddings() -> Response:
        """Many clients look whether it is there."""
        raise NotServed("this server has no embeddings: its models answer with text")

    # Load generators probe with HEAD before they read.
    @router.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """All collectors, in Prometheus' or OpenMetrics' text format."""
        body, media_type = api.metrics.render(request.headers.get("accept", ""))
        return Response(body, media_type=media_type)

    return router
