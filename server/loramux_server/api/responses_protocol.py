"""The body of POST /v1/responses: OpenAI's fields, and the sampling fields that the other endpoints have.

As strict as protocol.py. Items, content parts and tools of kinds that we do not have are read far enough to be refused by
their path.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from loramux_server.api.protocol import (
    INT31,
    MAX_MESSAGES,
    MAX_PARTS,
    UNSUPPORTED_SAMPLING,
    Sampling,
    Strict,
    text_or_list,
    text_or_object,
)

# Field -> the values that change nothing. None always does.
UNSUPPORTED_RESPONSES: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED_SAMPLING,
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "n": (1,),
    "prompt": (),
    "response_format": (),
    "truncation": ("disabled",),
}
UNSUPPORTED_REASONING: dict[str, tuple[Any, ...]] = {
    "effort": ("none",),
    "generate_summary": (),
    "mode": (),
    "summary": ("auto",),
}
UNSUPPORTED_TEXT: dict[str, tuple[Any, ...]] = {"verbosity": ("medium",)}
INCLUDE_LOGPROBS = "message.output_text.logprobs"
# What has no reasoning has none of it that is encrypted: agents ask for it whatever the model is.
INCLUDABLE = (INCLUDE_LOGPROBS, "reasoning.encrypted_content")


class InputPart(Strict):
    type: str
    text: str | None = None
    refusal: str | None = None


InputContent = Annotated[
    Annotated[str, Tag("@text")]
    | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("@list")],
    Discriminator(text_or_list),
]


class InputMessage(Strict):
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Strict):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: InputContent
    id: str | None = None
    status: str | None = None


class InputReference(Strict):
    """An item of a stored response, by its id. OpenAI lets the type be left out."""

    type: Literal["item_reference"] | None = None
    id: str


class OtherItem(Strict):
    type: str


def _item_kind(value: object) -> str:
    if not isinstance(value, dict):
        return "@message"
    kind = value.get("type")
    if kind is None:
        return "@item_reference" if "id" in value and "role" not in value else "@message"
    known = ("message", "function_call", "function_call_output", "item_reference")
    return f"@{kind}" if kind in known else "@other"


InputItem = Annotated[
    Annotated[InputMessage, Tag("@message")]
    | Annotated[InputCall, Tag("@function_call")]
    | Annotated[InputCallOutput, Tag("@function_call_output")]
    | Annotated[InputReference, Tag("@item_reference")]
    | Annotated[OtherItem, Tag("@other")],
    Discriminator(_item_kind),
]


class ResponseTool(Strict):
    """A function; a `type` of another kind is refused by name."""

    type: str
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Strict):
    type: str
    name: str | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # answers follow the schema exactly in any case


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None  # there is none either way


class ResponsesBody(Sampling):
    """POST /v1/responses."""

    input: Annotated[
        Annotated[str, Tag("@text")]
        | Annotated[
            list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("@list")
        ],
        Discriminator(text_or_list),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=INT31)
    include: Annotated[list[str], Field(max_length=32, fail_fast=True)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("@text")]
            | Annotated[ResponseToolChoice, Tag("@object")],
            Discriminator(text_or_object),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
