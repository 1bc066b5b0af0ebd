"""The request bodies: every field we know, with its type and range.

Strict: `true` is no number and "1" is no integer. Unknown fields are kept aside and reported, never refused.
Fields that OpenAI or vLLM define and that we cannot honour are declared too (`UNSUPPORTED_*`): their neutral
values pass, anything else is refused by name in params.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

INT31, INT64 = 2**31, 2**63

# Field -> the values that change nothing. None always does.
UNSUPPORTED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "thinking_token_budget": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
UNSUPPORTED_COMMON: dict[str, tuple[Any, ...]] = {**UNSUPPORTED_SAMPLING, "store": (False,)}
UNSUPPORTED_COMPLETION = UNSUPPORTED_COMMON
UNSUPPORTED_CHAT: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED_COMMON,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}


def text_or_list(value: object) -> str:
    """The tag of a `string or list` field. Tags begin with @, so that error paths can leave them out."""
    return "@list" if isinstance(value, list) else "@text"


def text_or_object(value: object) -> str:
    """The tag of a `string or object` field."""
    return "@object" if isinstance(value, dict) else "@text"


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "@text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "@token_lists"
    return "@tokens" if isinstance(first, int) else "@texts"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


Stop = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[str], Field(max_length=4, fail_fast=True), Tag("@list")],
    Discriminator(text_or_list),
]
# Each entry is looked up for every token of the answer.
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
StopTokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=INT31)]], Field(max_length=64, fail_fast=True)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # answers follow the schema exactly in any case


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict):
    """vLLM's."""

    json_: (
        Annotated[
            Annotated[str, Tag("@text")] | Annotated[dict[str, Any], Tag("@object")],
            Discriminator(text_or_object),
        ]
        | None
    ) = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Strict):
    """Who answers and how tokens are picked: what all endpoints have in common."""

    model: str = Field(min_length=1)
    min_tokens: int | None = Field(None, ge=0, lt=INT31)
    ignore_eos: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: LogitBias | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokenIds | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int | None = Field(None, ge=-INT31, lt=INT31)
    stream: bool | None = None
    # Hints to a provider's bookkeeping: nothing in an answer depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


class SamplingBody(Sampling):
    """What completions and chat have in common."""

    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, lt=INT31)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None


# fail_fast: a million wrong elements must not become a million error objects.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=INT31)]], Field(min_length=1, fail_fast=True)]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("@text")]
        | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("@texts")]
        | Annotated[TokenIds, Tag("@tokens")]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("@token_lists")],
        Discriminator(_prompt_kind),
    ]
    max_tokens: int | None = Field(None, ge=0, lt=INT31)
    best_of: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=5)


# More could not be answered by any base, and each is an object of the event loop.
MAX_MESSAGES = 16_384
MAX_PARTS = 4_096


class ContentPart(Strict):
    type: str
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Annotated[str, Tag("@text")]
    | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("@list")],
    Discriminator(text_or_list),
]


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionSpec(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@text")] | Annotated[NamedTool, Tag("@object")],
    Discriminator(text_or_object),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    function_call: dict[str, Any] | None = None
    refusal: str | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(Strict):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=INT31)]], Field(fail_fast=True)]
