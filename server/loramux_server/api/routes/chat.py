"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_server.api.answer import Choice, count_sequences, ignored_fields_header, respond
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.detokenize import Pieces
from loramux_server.api.generation import Ask, Piece, ScoredToken
from loramux_server.api.identity import Identity
from loramux_server.api.logprobs import chat_logprobs
from loramux_server.api.messages import conversation, ignored_in_messages
from loramux_server.api.openapi import describe
from loramux_server.api.params import Budget, fit, ignored_fields, sampling_params, stop_strings, validate
from loramux_server.api.protocol import UNSUPPORTED_CHAT, ChatBody
from loramux_server.api.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)


def chat_router(api: ApiContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=describe(ChatBody, ChatCompletion))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        values = api.models.with_defaults(await read_object(request, api.settings.max_body_bytes))
        body = validate(ChatBody, values, UNSUPPORTED_CHAT)
        logprobs = _logprobs(body)
        messages = conversation(body.messages)
        base = api.engine.ready
        with ExitStack() as held:
            target = held.enter_context(api.models.lease(body.model))
            prompt = await api.texts.encode_chat(messages, body.chat_template_kwargs or {})
            n = body.n or 1
            count_sequences(1, n, api.settings.max_sequences_per_request)
            asked = body.max_completion_tokens or body.max_tokens
            max_tokens = fit(len(prompt), Budget(asked, None, "messages"), base.max_model_len)
            params = sampling_params(body, logprobs, max_tokens, base)
            ask = Ask(f"chatcmpl-{uuid4().hex}", target, [prompt], n, params, stop_strings(body))
            shape = ChatShape(Identity.of(ask, base), ask, api.texts.pieces)
            response = await respond(request, api, ask, shape, body, held)
        ignored = ignored_fields(body, UNSUPPORTED_CHAT) + ignored_in_messages(body.messages)
        response.headers.update(ignored_fields_header(ignored))
        return response

    return router


@dataclass(frozen=True)
class ChatShape:
    identity: Identity
    ask: Ask
    pieces: Pieces

    def opening(self) -> Iterable[ChatChunk]:
        for index in range(self.ask.n):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))

    def chunks(self, piece: Piece) -> Iterable[ChatChunk]:
        if piece.text:
            delta = ChatDelta(content=piece.text)
            yield self._chunk(ChatChunkChoice(piece.index, delta, self._logprobs(piece.scored)))
        if piece.finish:
            yield self._chunk(ChatChunkChoice(piece.index, ChatDelta(), finish_reason=piece.finish))

    def empty_chunk(self) -> ChatChunk:
        return self._chunk()

    def whole(self, choices: Sequence[Choice], usage: Usage) -> ChatCompletion:
        answers = [
            ChatChoice(one.index, ChatMessage(one.text), self._logprobs(one.scored), one.finish)
            for one in choices
        ]
        who = self.identity
        return ChatCompletion(who.id, who.created, who.model, who.fingerprint, answers, usage)

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        who = self.identity
        return ChatChunk(who.id, who.created, who.model, who.fingerprint, list(choices))

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        top = self.ask.params.logprobs
        return None if top is None else chat_logprobs(self.pieces, scored, top)


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None
