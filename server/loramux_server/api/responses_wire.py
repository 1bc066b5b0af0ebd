"""What /v1/responses answers with: the response, its items, and the events of a stream, in OpenAI's shapes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from loramux_server.api.wire import TokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(msgspec.Struct, tag_field="type", tag="input_text"):
    text: str


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[dict[str, Any]] = []
    logprobs: list[TokenLogprob] = []


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    """Also of the input: the assistant's messages have output_text, all others input_text."""

    id: str
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]
    status: Status = "completed"


class CallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "completed"


class CallOutputItem(msgspec.Struct, tag_field="type", tag="function_call_output"):
    id: str
    call_id: str
    output: str
    status: Status = "completed"


Item = MessageItem | CallItem | CallOutputItem


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


ErrorCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class ResponseError(msgspec.Struct):
    code: ErrorCode
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class NoReasoning(msgspec.Struct):
    effort: None = None
    summary: None = None


class ResponseObject(msgspec.Struct, tag_field="object", tag="response", kw_only=True):
    """The request's own fields are repeated in it, as OpenAI does."""

    id: str
    created_at: int
    model: str
    system_fingerprint: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    user: str | None
    prompt_cache_key: str | None
    safety_identifier: str | None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[Item] = []
    usage: ResponseUsage | None = None
    background: bool = False
    reasoning: NoReasoning = msgspec.field(default_factory=NoReasoning)
    service_tier: Literal["default"] = "default"
    truncation: Literal["disabled"] = "disabled"


class ResponseDeleted(msgspec.Struct, tag_field="object", tag="response"):
    id: str
    deleted: bool = True


class ItemList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseEvent(msgspec.Struct):
    """Of a stream: what kind it is, and its place in the order of all."""

    type: str
    sequence_number: int


class LifecycleEvent(ResponseEvent):
    response: ResponseObject


class ItemEvent(ResponseEvent):
    output_index: int
    item: Item


class _InItem(ResponseEvent):
    item_id: str
    output_index: int


class PartEvent(_InItem):
    content_index: int
    part: OutputText


class TextDelta(_InItem):
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(_InItem):
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(_InItem):
    delta: str


class ArgumentsDone(_InItem):
    arguments: str
