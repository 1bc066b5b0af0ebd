"""POST /tokenize and /detokenize, in vLLM's shapes: what the base's tokenizer makes of text, and back."""

from __future__ import annotations

from fastapi import APIRouter
from msgspec.json import encode
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_server.api.answer import ignored_fields_header
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.detokenize import Detokenizer
from loramux_server.api.messages import conversation
from loramux_server.api.openapi import describe
from loramux_server.api.params import ignored_fields, parse
from loramux_server.api.protocol import DetokenizeBody, TokenizeBody
from loramux_server.api.tools import ToolPlan
from loramux_server.api.wire import Detokenized, Tokenized


def tokens_router(api: ApiContext) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=describe(TokenizeBody, Tokenized))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        body = parse(TokenizeBody, await read_object(request, api.settings.max_body_bytes))
        _check_model(body.model)
        tokens = await _tokens(body)
        pieces = api.texts.pieces
        names = [pieces.name_of(token) for token in tokens] if body.return_token_strs else None
        answer = Tokenized(len(tokens), api.engine.ready.max_model_len, tokens, names)
        return _json(encode(answer), ignored_fields(body))

    @router.post("/detokenize", openapi_extra=describe(DetokenizeBody, Detokenized))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens by their names."""
        body = parse(DetokenizeBody, await read_object(request, api.settings.max_body_bytes))
        _check_model(body.model)
        vocab_size = api.engine.ready.vocab_size
        if body.tokens and max(body.tokens) >= vocab_size:
            raise RequestError(f"tokens: has an id that is not below {vocab_size}", param="tokens")
        text = Detokenizer.text(api.texts.pieces, body.tokens, specials=True)
        return _json(encode(Detokenized(text)), ignored_fields(body))

    def _check_model(model: str | None) -> None:
        """Adapters have the base's tokenizer; a name that nobody has is refused all the same."""
        if model is not None and model not in api.models.base_names:
            api.models.adapter(model)

    async def _tokens(body: TokenizeBody) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            return (await api.texts.encode([body.prompt], specials=body.add_special_tokens is not False))[0]
        prompt = None if body.model is None else api.models.system_prompt(body.model)
        plan = ToolPlan(tuple(body.tools), False, None, True) if body.tools else None
        return await api.texts.encode_chat(
            conversation(body.messages or [], prompt),
            body.chat_template_kwargs or {},
            plan,
            for_answer=body.add_generation_prompt is not False,
        )

    return router


def _json(content: bytes, ignored: list[str]) -> Response:
    return Response(content, headers=ignored_fields_header(ignored), media_type="application/json")
