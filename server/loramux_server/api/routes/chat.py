"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loramux_server.api.answer import Choice, chunk_events, ignored_fields_header, respond
from loramux_server.api.body import read_object
from loramux_server.api.chat_ask import AnswerReader, chat_ask
from loramux_server.api.context import ApiContext
from loramux_server.api.detokenize import Pieces
from loramux_server.api.generation import Ask, Piece, ScoredToken
from loramux_server.api.identity import Identity
from loramux_server.api.logprobs import chat_logprobs, prompt_logprobs
from loramux_server.api.openapi import describe
from loramux_server.api.params import ignored_fields, validate
from loramux_server.api.protocol import UNSUPPORTED_CHAT, ChatBody
from loramux_server.api.tool_calls import Call
from loramux_server.api.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    DeltaToolCall,
    FunctionCall,
    MessageToolCall,
    Usage,
)


def chat_router(api: ApiContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=describe(ChatBody, ChatCompletion))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        values = api.models.with_defaults(await read_object(request, api.settings.max_body_bytes))
        body = validate(ChatBody, values, UNSUPPORTED_CHAT)
        with ExitStack() as held:
            asked = await chat_ask(api, body, held, id_prefix="chatcmpl-")
            ask = asked.ask
            shape = ChatShape(Identity.of(ask, asked.base), ask, api.texts.pieces, asked.answers)
            response = await respond(request, api, ask, shape, chunk_events(shape, body), held)
        response.headers.update(ignored_fields_header(ignored_fields(body, UNSUPPORTED_CHAT)))
        return response

    return router


@dataclass
class ChatShape:
    identity: Identity
    ask: Ask
    pieces: Pieces
    answers: AnswerReader
    _unsent: dict[int, list[ScoredToken]] = field(default_factory=dict)  # of text that is held back

    def opening(self) -> Iterable[ChatChunk]:
        for index in range(self.ask.n):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))

    def chunks(self, piece: Piece) -> Iterable[ChatChunk]:
        found = self.answers.read(piece.index, piece.text, piece.finish)
        scored = [*self._unsent.pop(piece.index, []), *piece.scored]
        deltas = [ChatDelta(content=found.text)] if found.text else []
        deltas += [ChatDelta(tool_calls=[part]) for call in found.calls for part in _delta_calls(call)]
        if not deltas and not piece.finish:
            self._unsent[piece.index] = scored
        for place, delta in enumerate(deltas):
            logprobs = self._logprobs(scored if place == 0 else [])
            yield self._chunk(ChatChunkChoice(piece.index, delta, logprobs))
        if piece.finish:
            finish = self.answers.finish_reason(piece.index, piece.finish)
            rest = self._logprobs(scored) if scored and not deltas else None
            yield self._chunk(ChatChunkChoice(piece.index, ChatDelta(), rest, finish))

    def empty_chunk(self) -> ChatChunk:
        return self._chunk()

    def whole(self, choices: Sequence[Choice], usage: Usage) -> ChatCompletion:
        answers = [
            ChatChoice(
                one.index,
                self._message(one),
                self._logprobs(one.scored),
                self.answers.finish_reason(one.index, one.finish),
            )
            for one in choices
        ]
        who = self.identity
        completion = ChatCompletion(who.id, who.created, who.model, who.fingerprint, answers, usage)
        if (top := self.ask.params.prompt_logprobs) is not None:
            prompt, scores = self.ask.prompts[0], choices[0].prompt_scores
            completion.prompt_logprobs = prompt_logprobs(self.pieces, prompt, scores, top)
        return completion

    def _message(self, one: Choice) -> ChatMessage:
        found = self.answers.read(one.index, one.text, one.finish)
        if not found.calls:
            return ChatMessage(found.text)
        calls: dict[int, MessageToolCall] = {}
        for call in found.calls:
            known = calls.setdefault(call.index, MessageToolCall(call.id, FunctionCall("", call.name)))
            known.function.arguments += call.arguments
        return ChatMessage(found.text or None, tool_calls=list(calls.values()))

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        who = self.identity
        return ChatChunk(who.id, who.created, who.model, who.fingerprint, list(choices))

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        top = self.ask.params.logprobs
        return None if top is None else chat_logprobs(self.pieces, scored, top)


def _delta_calls(call: Call) -> list[DeltaToolCall]:
    """A call begins with its id, its name and no arguments; then come the arguments."""
    parts = []
    if call.id:
        parts.append(DeltaToolCall(call.index, FunctionCall("", call.name), call.id, "function"))
    if call.arguments:
        parts.append(DeltaToolCall(call.index, FunctionCall(call.arguments)))
    return parts
