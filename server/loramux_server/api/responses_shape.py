"""How an answer of /v1/responses is written: items and the events that tell of them, from one piece of text to the next.

Promises: a stream and a whole answer are made by the same steps; at any time at most one item is open; events are numbered
from 0 without gaps; what a stream ends with (`response.completed`, `.incomplete` or `.failed`) has every item that was sent.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import msgspec

from loramux_server.api.answer import Choice, UsageCount
from loramux_server.api.chat_ask import ChatAsk
from loramux_server.api.detokenize import Pieces
from loramux_server.api.errors import ErrorReply
from loramux_server.api.generation import Piece, ScoredToken
from loramux_server.api.identity import Identity
from loramux_server.api.logprobs import chat_logprobs
from loramux_server.api.responses_protocol import ResponsesBody, ResponseToolChoice
from loramux_server.api.responses_wire import (
    ArgumentsDelta,
    ArgumentsDone,
    CallItem,
    ErrorCode,
    IncompleteDetails,
    InputTokensDetails,
    ItemEvent,
    LifecycleEvent,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    TextDelta,
    TextDone,
)
from loramux_server.api.stream import named_event
from loramux_server.api.tool_calls import Call, Found
from loramux_server.api.wire import FinishReason, TokenLogprob, Usage

Events = Iterator[ResponseEvent]


class ResponseWriter:
    """Adds to a response what comes, and says it as events."""

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._open: MessageItem | CallItem | None = None
        self._next = 0

    def begin(self) -> Events:
        yield self._lifecycle("response.created")
        yield self._lifecycle("response.in_progress")

    def add(self, found: Found, logprobs: list[TokenLogprob]) -> Events:
        if found.text:
            if not isinstance(self._open, MessageItem):
                yield from self._begin_message()
            yield from self._text(found.text, logprobs)
        for call in found.calls:
            if call.id:
                yield from self._begin_call(call)
            if call.arguments:
                yield from self._arguments(call.arguments)

    def end(self, finish: FinishReason, usage: Usage) -> Events:
        response = self.response
        if not response.output:
            yield from self._begin_message()
        yield from self._close("incomplete" if finish == "length" else "completed")
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(),
            usage.total_tokens,
        )
        if finish == "length":
            response.status, response.incomplete_details = "incomplete", IncompleteDetails()
        else:
            response.status, response.completed_at = "completed", int(time.time())

    def last(self) -> ResponseEvent:
        """To be sent after `end`, or as soon as the response failed."""
        return self._lifecycle(f"response.{self.response.status}")

    def _begin_message(self) -> Events:
        yield from self._close("completed")
        item = self._open = MessageItem(f"msg_{uuid4().hex}", "assistant", [], "in_progress")
        self.response.output.append(item)
        yield ItemEvent("response.output_item.added", self._number(), self._place, item)
        part = OutputText("")
        item.content.append(part)
        yield PartEvent("response.content_part.added", self._number(), item.id, self._place, 0, part)

    def _text(self, text: str, logprobs: list[TokenLogprob]) -> Events:
        item, part = self._message()
        part.text += text
        part.logprobs += logprobs
        kind = "response.output_text.delta"
        yield TextDelta(kind, self._number(), item.id, self._place, 0, text, logprobs)

    def _begin_call(self, call: Call) -> Events:
        yield from self._close("completed")
        self._open = CallItem(f"fc_{uuid4().hex}", f"call_{call.id}", call.name, "", "in_progress")
        self.response.output.append(self._open)
        yield ItemEvent("response.output_item.added", self._number(), self._place, self._open)

    def _arguments(self, arguments: str) -> Events:
        assert isinstance(self._open, CallItem)
        self._open.arguments += arguments
        kind = "response.function_call_arguments.delta"
        yield ArgumentsDelta(kind, self._number(), self._open.id, self._place, arguments)

    def _close(self, status: Any) -> Events:
        item, place = self._open, self._place
        if item is None:
            return
        if isinstance(item, CallItem):
            kind = "response.function_call_arguments.done"
            yield ArgumentsDone(kind, self._number(), item.id, place, item.arguments)
        else:
            _, part = self._message()
            kind = "response.output_text.done"
            yield TextDone(kind, self._number(), item.id, place, 0, part.text, part.logprobs)
            yield PartEvent("response.content_part.done", self._number(), item.id, place, 0, part)
        item.status = status
        self._open = None
        yield ItemEvent("response.output_item.done", self._number(), place, item)

    def _message(self) -> tuple[MessageItem, OutputText]:
        assert isinstance(self._open, MessageItem)
        part = self._open.content[0]
        assert isinstance(part, OutputText)
        return self._open, part

    @property
    def _place(self) -> int:
        return len(self.response.output) - 1

    def _lifecycle(self, kind: str) -> ResponseEvent:
        return LifecycleEvent(kind, self._number(), self.response)

    def _number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number


class ResponseShape:
    """One answer. `keep` is told of the response before the last event says that it is done."""

    def __init__(
        self, asked: ChatAsk, body: ResponsesBody, pieces: Pieces, keep: Callable[[ResponseObject], None]
    ) -> None:
        self._asked = asked
        self._pieces = pieces
        self._keep = keep
        self._writer = ResponseWriter(_begun(asked, body))
        self._unsent: list[ScoredToken] = []  # of text that is held back

    def whole(self, choices: Sequence[Choice], usage: Usage) -> ResponseObject:
        (one,) = choices
        for _ in self._add(one.text, one.scored, one.finish):
            pass  # nobody listens
        return self._ended(one.finish, usage)

    async def events(
        self, pieces: AsyncGenerator[Piece, None], count: UsageCount
    ) -> AsyncGenerator[bytes, None]:
        begun = False
        async with aclosing(pieces):
            async for piece in pieces:
                count.add(piece)
                if not begun:
                    begun = True
                    for event in self._writer.begin():
                        yield _encoded(event)
                for event in self._add(piece.text, piece.scored, piece.finish):
                    yield _encoded(event)
                if piece.finish:
                    for event in self._writer.end(piece.finish, count.usage()):
                        yield _encoded(event)
                    self._keep(self._writer.response)
                    yield _encoded(self._writer.last())

    def failed(self, reply: ErrorReply) -> bytes:
        """The last event of a stream that broke off."""
        response = self._writer.response
        response.status = "failed"
        response.error = ResponseError(_error_code(reply.status), reply.error.message)
        return _encoded(self._writer.last())

    def _add(self, text: str, scored: Sequence[ScoredToken], finish: FinishReason | None) -> Events:
        found = self._asked.answers.read(0, text, finish)
        self._unsent += scored
        logprobs: list[TokenLogprob] = []
        if found.text or found.calls:
            if found.text and (top := self._asked.ask.params.logprobs) is not None:
                logprobs = chat_logprobs(self._pieces, self._unsent, top).content
            self._unsent = []
        return self._writer.add(found, logprobs)

    def _ended(self, finish: FinishReason, usage: Usage) -> ResponseObject:
        for _ in self._writer.end(finish, usage):
            pass
        self._keep(self._writer.response)
        return self._writer.response


def _begun(asked: ChatAsk, body: ResponsesBody) -> ResponseObject:
    who, params = Identity.of(asked.ask, asked.base), asked.ask.params
    choice = body.tool_choice
    wanted = body.text.format if body.text is not None else None
    format_ = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
    return ResponseObject(
        id=who.id,
        created_at=who.created,
        model=who.model,
        system_fingerprint=who.fingerprint,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        store=body.store is not False,
        temperature=params.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_logprobs=body.top_logprobs or 0,
        text={"format": format_},
        tool_choice=choice.model_dump() if isinstance(choice, ResponseToolChoice) else choice or "auto",
        tools=[tool.model_dump() for tool in body.tools or []],
        user=body.user,
        prompt_cache_key=body.prompt_cache_key,
        safety_identifier=body.safety_identifier,
    )


def _error_code(status: int) -> ErrorCode:
    if status == 429:
        return "rate_limit_exceeded"
    return "server_error" if status >= 500 else "invalid_prompt"


def _encoded(event: ResponseEvent) -> bytes:
    return named_event(event.type, msgspec.json.encode(event))
