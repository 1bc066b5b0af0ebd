"""/v1/responses: OpenAI's newer way to ask for an answer, and the responses that are kept for later."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_server.api.answer import ignored_fields_header, respond
from loramux_server.api.body import read_object
from loramux_server.api.chat_ask import chat_ask
from loramux_server.api.context import ApiContext
from loramux_server.api.errors import unsupported
from loramux_server.api.methods import refuse_others
from loramux_server.api.middleware import FAILURE_EVENT
from loramux_server.api.openapi import describe, describe_answer
from loramux_server.api.params import ignored_fields
from loramux_server.api.responses_input import REFUSED, chat_body, in_our_words, read_body, read_input
from loramux_server.api.responses_protocol import ResponsesBody
from loramux_server.api.responses_shape import ResponseShape
from loramux_server.api.responses_store import ResponseStore
from loramux_server.api.responses_wire import Item, ItemList, ResponseDeleted, ResponseObject
from loramux_server.keys.principal import current_access

RESPONSES_ANSWERS = (ResponseObject, ResponseDeleted, ItemList)
_ONE = "/v1/responses/{response_id}"


def responses_router(api: ApiContext) -> APIRouter:
    router = APIRouter()
    settings = api.settings
    store = ResponseStore(settings.max_stored_responses, settings.max_stored_response_bytes)

    @router.post("/v1/responses", openapi_extra=describe(ResponsesBody, ResponseObject))
    async def create_response(request: Request) -> Response:
        """Answer a conversation, or go on with one that is kept."""
        body = read_body(api.models.with_defaults(await read_object(request, settings.max_body_bytes)))
        given = read_input(body, store)
        access = current_access()

        def keep(response: ResponseObject) -> None:
            if body.store is not False:
                store.put(response, given, access)

        with ExitStack() as held:
            with in_our_words():
                asked = await chat_ask(api, chat_body(body, given), held, id_prefix="resp_", where="input")
            shape = ResponseShape(asked, body, api.texts.pieces, keep)
            request.scope[FAILURE_EVENT] = shape.failed
            events = shape.events if body.stream else None
            response = await respond(request, api, asked.ask, shape, events, held)
        response.headers.update(ignored_fields_header(ignored_fields(body, REFUSED)))
        return response

    @router.get(_ONE, openapi_extra=describe_answer(ResponseObject))
    async def get_response(response_id: str, stream: bool = False) -> Response:
        """A response that is kept."""
        if stream:
            raise unsupported("stream", "stream: a response that is kept is whole; leave it out")
        return _json(store.get(response_id, current_access()).body)

    @router.delete(_ONE, openapi_extra=describe_answer(ResponseDeleted))
    async def delete_response(response_id: str) -> Response:
        """Forget it; responses that went on from it stay."""
        store.delete(response_id, current_access())
        return _json(msgspec.json.encode(ResponseDeleted(response_id)))

    @router.get(f"{_ONE}/input_items", openapi_extra=describe_answer(ItemList))
    async def list_input_items(
        response_id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """What the model was given, with the conversation before it, newest first."""
        given = store.get(response_id, current_access()).given
        return _json(msgspec.json.encode(_page(given if order == "asc" else given[::-1], after, limit)))

    refuse_others(router, _ONE, {"GET", "DELETE"})
    return router


def _page(items: Sequence[Item], after: str | None, limit: int) -> ItemList:
    begin = 0
    if after is not None:
        places = [place for place, item in enumerate(items) if item.id == after]
        if not places:
            raise RequestError("after: is none of the input items", param="after")
        begin = places[0] + 1
    page = list(items[begin : begin + limit])
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return ItemList(page, first, last, begin + limit < len(items))


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
