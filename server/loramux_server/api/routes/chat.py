"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from loramux_server.api.logprobs import chat_logprobs, prompt_logprobs
from loramux_server.api.messages import conversation, ignored_in_messages
from loramux_server.api.openapi import describe
from loramux_server.api.params import (
    Budget,
    Wanted,
    fit,
    ignored_fields,
    sampling_params,
    stop_strings,
    validate,
)
from loramux_server.api.protocol import UNSUPPORTED_CHAT, ChatBody
from loramux_server.api.structured import checked, grammar_of
from loramux_server.api.tool_calls import MARKERS, Call, CallReader, Found, call_reader
from loramux_server.api.tools import dialect_of, plan_tools
from loramux_server.api.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    DeltaToolCall,
    FinishReason,
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
        wanted, plan = _logprobs(body), plan_tools(body)
        messages = conversation(body.messages, api.models.system_prompt(body.model))
        if plan is not None and plan.forced:
            grammar: str | None = await checked(body, "tool_choice", plan.grammar)
        else:
            grammar = await grammar_of(body)
        base = api.engine.ready
        with ExitStack() as held:
            target = held.enter_context(api.models.lease(body.model))
            prompt = await api.texts.encode_chat(messages, body.chat_template_kwargs or {}, plan)
            n = body.n or 1
            count_sequences(1, n, api.settings.max_sequences_per_request)
            asked = body.max_completion_tokens or body.max_tokens
            max_tokens = fit(len(prompt), Budget(asked, None, "messages"), base.max_model_len)
            params = sampling_params(body, Wanted(wanted, body.prompt_logprobs, grammar), max_tokens, base)
            ask = Ask(
                id=f"chatcmpl-{uuid4().hex}",
                target=target,
                prompts=[prompt],
                n=n,
                params=params,
                stops=stop_strings(body),
                kept_tokens=frozenset() if plan is None else api.texts.marker_tokens(MARKERS),
            )
            shape = ChatShape(Identity.of(ask, base), ask, api.texts.pieces)
            if plan is not None:
                dialect = dialect_of(api.texts.chat_template(tools=True))
                shape.readers = [call_reader(plan, dialect) for _ in range(n)]
            response = await respond(request, api, ask, shape, body, held)
        ignored = ignored_fields(body, UNSUPPORTED_CHAT) + ignored_in_messages(body.messages)
        response.headers.update(ignored_fields_header(ignored))
        return response

    return router


@dataclass
class ChatShape:
    """`readers`, one for each choice, find the tool calls; without tools everything is text."""

    identity: Identity
    ask: Ask
    pieces: Pieces
    readers: list[CallReader] = field(default_factory=list)
    _called: set[int] = field(default_factory=set)  # choices with a call
    _unsent: dict[int, list[ScoredToken]] = field(default_factory=dict)  # of text that is held back

    def opening(self) -> Iterable[ChatChunk]:
        for index in range(self.ask.n):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))

    def chunks(self, piece: Piece) -> Iterable[ChatChunk]:
        found = self._read(piece.index, piece.text, piece.finish)
        scored = [*self._unsent.pop(piece.index, []), *piece.scored]
        deltas = [ChatDelta(content=found.text)] if found.text else []
        deltas += [ChatDelta(tool_calls=[part]) for call in found.calls for part in _delta_calls(call)]
        if not deltas and not piece.finish:
            self._unsent[piece.index] = scored
        for place, delta in enumerate(deltas):
            logprobs = self._logprobs(scored if place == 0 else [])
            yield self._chunk(ChatChunkChoice(piece.index, delta, logprobs))
        if piece.finish:
            finish = self._finish(piece.index, piece.finish)
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
                self._finish(one.index, one.finish),
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
        found = self._read(one.index, one.text, one.finish)
        if not found.calls:
            return ChatMessage(found.text)
        calls: dict[int, MessageToolCall] = {}
        for call in found.calls:
            known = calls.setdefault(call.index, MessageToolCall(call.id, FunctionCall("", call.name)))
            known.function.arguments += call.arguments
        return ChatMessage(found.text or None, tool_calls=list(calls.values()))

    def _read(self, index: int, text: str, finish: FinishReason | None) -> Found:
        if not self.readers:
            return Found(text)
        found = self.readers[index].push(text)
        if finish:
            rest = self.readers[index].finish()
            found = Found(found.text + rest.text, found.calls + rest.calls)
        if found.calls:
            self._called.add(index)
        return found

    def _finish(self, index: int, finish: FinishReason) -> FinishReason:
        return "tool_calls" if finish == "stop" and index in self._called else finish

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


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None
