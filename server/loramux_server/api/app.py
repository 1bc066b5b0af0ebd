"""Build the HTTP application from its collaborators. Starts no process, opens no port, loads no model."""

from __future__ import annotations

from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from loramux_server.api import openapi
from loramux_server.api.context import ApiContext, ApiSettings
from loramux_server.api.gate import Gate
from loramux_server.api.middleware import Envelope
from loramux_server.api.models import ModelNames
from loramux_server.api.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from loramux_server.api.responses_protocol import ResponsesBody
from loramux_server.api.routes.adapters import ADAPTER_ANSWERS, ADAPTER_BODIES, adapters_router
from loramux_server.api.routes.chat import chat_router
from loramux_server.api.routes.completions import completions_router
from loramux_server.api.routes.exports import EXPORT_ANSWERS, EXPORT_BODIES, exports_router
from loramux_server.api.routes.files import FILE_ANSWERS, files_router
from loramux_server.api.routes.fine_tuning import (
    FINE_TUNING_ANSWERS,
    FINE_TUNING_BODIES,
    fine_tuning_router,
)
from loramux_server.api.routes.keys import KEY_ANSWERS, KEY_BODIES, keys_router
from loramux_server.api.routes.models import models_router
from loramux_server.api.routes.page import page_router
from loramux_server.api.routes.responses import RESPONSES_ANSWERS, responses_router
from loramux_server.api.routes.service import service_router
from loramux_server.api.routes.tokens import tokens_router
from loramux_server.api.routes.vllm import vllm_router
from loramux_server.api.texts import Texts
from loramux_server.api.wire import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    ModelCard,
    ModelDeleted,
    ModelList,
    Readiness,
    Tokenized,
    Version,
)
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.interface import AdapterDirectory, EngineClient
from loramux_server.exports.manager import ExportManager
from loramux_server.keys.guard import Guard
from loramux_server.metrics import Metrics
from loramux_server.tracing import Tracing
from loramux_server.training.manager import JobManager

__all__ = ["ApiSettings", "create_app"]


def create_app(
    *,
    engine: EngineClient,
    adapters: AdapterDirectory,
    tokenizer: Any,
    settings: ApiSettings,
    metrics: Metrics,
    chat_template: str | None = None,
    catalog: AdapterCatalog | None = None,
    exports: ExportManager | None = None,
    jobs: JobManager | None = None,
    guard: Guard | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application. `tokenizer` is the base's, from AutoTokenizer; `chat_template` replaces its own.

    Without a catalogue the routes that change adapters are not there, without `exports` those that export them,
    without `jobs` those that train them. Without a `guard` everybody may do everything, and there are no keys.
    """
    guard = guard or Guard()
    api = ApiContext(
        engine=engine,
        models=ModelNames(settings.served_model_names, adapters),
        texts=Texts(tokenizer, chat_template),
        settings=settings,
        metrics=metrics,
        limits=guard.limits,
    )
    engine.add_listener(metrics.observe_step)
    # No interactive pages: they load scripts from other hosts. No redirects: many clients do not follow them.
    app = FastAPI(
        title="loramux", version=settings.version, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for router in (
        *(completions_router, chat_router, responses_router),
        *(tokens_router, service_router),
    ):
        app.include_router(router(api))
    app.include_router(page_router())
    if guard.changes is not None:
        app.include_router(keys_router(guard, guard.changes))
    app.include_router(models_router(api, catalog))
    if catalog is not None:
        if exports is not None:
            app.include_router(exports_router(api, catalog, exports))  # first: adapters' names have slashes
        app.include_router(adapters_router(api, catalog))
        app.include_router(vllm_router(api, catalog))
        if jobs is not None:
            app.include_router(files_router(catalog, jobs))
            app.include_router(fine_tuning_router(api, catalog, jobs))
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _leave_to_envelope)
    app.add_middleware(Gate, guard=guard, engine=engine)
    app.add_middleware(Envelope, metrics=metrics, tracing=tracing)
    _describe(app, adapters=catalog, exports=exports, jobs=jobs, keys=guard.changes)
    return app


def _describe(app: FastAPI, *, adapters: object, exports: object, jobs: object, keys: object) -> None:
    """What the OpenAPI document says of the bodies and answers of the routes that are there: whose part is not None."""
    openapi.install(
        app,
        [
            *(CompletionBody, ChatBody, ResponsesBody, TokenizeBody, DetokenizeBody),
            *(ADAPTER_BODIES if adapters is not None else ()),
            *(EXPORT_BODIES if exports is not None else ()),
            *(FINE_TUNING_BODIES if jobs is not None else ()),
            *(KEY_BODIES if keys is not None else ()),
        ],
        [
            *RESPONSES_ANSWERS,
            *(Completion, ChatCompletion, Tokenized, Detokenized, ModelList, ModelCard),
            *(Health, Readiness, Version),
            *([*ADAPTER_ANSWERS, ModelDeleted] if adapters is not None else ()),
            *(EXPORT_ANSWERS if exports is not None else ()),
            *([*FILE_ANSWERS, *FINE_TUNING_ANSWERS] if jobs is not None else ()),
            *(KEY_ANSWERS if keys is not None else ()),
        ],
    )


async def _leave_to_envelope(request: Request, error: Exception) -> NoReturn:
    """Errors have one way out, the Envelope."""
    raise error
