"""GET /v1/models and /v1/models/{model}: the base and every adapter, as cards."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from loramux_server.api.context import ApiContext
from loramux_server.api.openapi import describe_answer
from loramux_server.api.wire import ModelCard, ModelList
from loramux_server.engine.interface import AdapterView


def models_router(api: ApiContext) -> APIRouter:
    router = APIRouter()
    base_names = api.models.base_names

    def base_card(name: str) -> ModelCard:
        base = api.engine.ready
        return ModelCard(name, api.settings.started, base.base_name, None, base.max_model_len)

    def adapter_card(adapter: AdapterView) -> ModelCard:
        return ModelCard(
            id=adapter.name,
            created=int(adapter.created),
            root=adapter.name,
            parent=base_names[0],
            max_model_len=api.engine.ready.max_model_len,
            generation=adapter.generation,
        )

    @router.get("/v1/models", openapi_extra=describe_answer(ModelList))
    async def list_models() -> Response:
        """The base under each of its names, then the adapters by name."""
        cards = [base_card(name) for name in base_names]
        return _json(ModelList(cards + [adapter_card(adapter) for adapter in api.models.adapters()]))

    # The names of models have slashes and colons in them.
    @router.get("/v1/models/{model:path}", openapi_extra=describe_answer(ModelCard))
    async def retrieve_model(model: str) -> Response:
        """One model, by any name that a request may use for it."""
        return _json(base_card(model) if model in base_names else adapter_card(api.models.adapter(model)))

    return router


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
