"""/v1/models and /v1/models/{model}: the base and every adapter as cards, and an adapter's deletion by OpenAI's clients."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_adapters.names import split_pin
from loramux_server.api.context import ApiContext
from loramux_server.api.methods import refuse_others
from loramux_server.api.openapi import describe_answer
from loramux_server.api.wire import ModelCard, ModelDeleted, ModelList
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.interface import AdapterView
from loramux_server.keys.principal import current_access

_ONE = "/v1/models/{model:path}"


def models_router(api: ApiContext, catalog: AdapterCatalog | None = None) -> APIRouter:
    """Without a catalogue nothing can be deleted."""
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
    @router.get(_ONE, openapi_extra=describe_answer(ModelCard))
    async def retrieve_model(model: str) -> Response:
        """One model, by any name that a request may use for it."""
        return _json(base_card(model) if model in base_names else adapter_card(api.models.adapter(model)))

    methods = ["GET"]
    if catalog is not None:
        _add_deletion(router, api, catalog)
        methods.append("DELETE")
    refuse_others(router, "/v1/models", ["GET"])
    refuse_others(router, _ONE, methods)
    return router


def _add_deletion(router: APIRouter, api: ApiContext, catalog: AdapterCatalog) -> None:
    @router.delete(_ONE, openapi_extra=describe_answer(ModelDeleted))
    async def delete_model(model: str) -> Response:
        """Forget an adapter, a fine-tuned model or a checkpoint; requests that run on it finish."""
        if model in api.models.base_names:
            raise RequestError("model: the base cannot be deleted", param="model")
        if split_pin(model)[1] is not None:
            raise RequestError(
                "model: a name is deleted with all its generations, not one of them", param="model"
            )
        name = api.models.adapter(model).name
        await catalog.delete(name, 0, current_access())
        return _json(ModelDeleted(name))


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
