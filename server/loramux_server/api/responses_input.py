"""A request to /v1/responses in the words of a chat request, and faults of that in the words of this one.

Promises: the model is given exactly what the same conversation gives it by /v1/chat/completions. Everything that only
this endpoint has is refused here by its path, before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from loramux_adapters.errors import RequestError
from loramux_server.api.body import parse_object
from loramux_server.api.errors import unsupported
from loramux_server.api.params import parse, refuse
from loramux_server.api.protocol import ChatBody, Sampling
from loramux_server.api.responses_protocol import (
    INCLUDABLE,
    INCLUDE_LOGPROBS,
    UNSUPPORTED_REASONING,
    UNSUPPORTED_RESPONSES,
    UNSUPPORTED_TEXT,
    InputCall,
    InputCallOutput,
    InputMessage,
    InputPart,
    InputReference,
    ResponsesBody,
    ResponseToolChoice,
)
from loramux_server.api.responses_store import ResponseStore, UnknownResponse
from loramux_server.api.responses_wire import (
    CallItem,
    CallOutputItem,
    InputText,
    Item,
    MessageItem,
    OutputText,
)
from loramux_server.keys.principal import current_access

_SHARED = set(Sampling.model_fields) - {"stream"}
_TEXT_PARTS = ("input_text", "output_text", "text")
# Neither honoured nor ignored: anything but their neutral values is refused.
REFUSED = {*UNSUPPORTED_RESPONSES, *(f"reasoning.{name}" for name in UNSUPPORTED_REASONING)}

# Names in chat's faults, and what this endpoint calls the same thing.
_NAMES = (
    (re.compile(r"response_format\.json_schema"), "text.format"),
    (re.compile(r"response_format"), "text.format"),
    (re.compile(r"(tools\[\d+\]|tool_choice)\.function"), r"\1"),
    (re.compile(r"^messages"), "input"),
)


def read_body(values: dict[str, object]) -> ResponsesBody:
    """The body, without anything that cannot be honoured."""
    body = parse(ResponsesBody, values)
    refuse(values, UNSUPPORTED_RESPONSES)
    for name, refused in (("reasoning", UNSUPPORTED_REASONING), ("text", UNSUPPORTED_TEXT)):
        inner = values.get(name)
        refuse(inner if isinstance(inner, dict) else {}, refused, f"{name}.")
    for place, one in enumerate(body.include or []):
        if one not in INCLUDABLE:
            raise unsupported(
                f"include[{place}]",
                f"include[{place}]: is none of {', '.join(INCLUDABLE)}, which can be included",
            )
    for place, tool in enumerate(body.tools or []):
        if tool.type != "function":
            path = f"tools[{place}].type"
            raise unsupported(
                path, f"{path}: tools of type '{tool.type[:64]}' are not supported; only 'function' is"
            )
        if tool.name is None:
            path = f"tools[{place}].name"
            raise RequestError(f"{path}: a function needs a name", param=path)
    choice = body.tool_choice
    if isinstance(choice, ResponseToolChoice) and (choice.type != "function" or choice.name is None):
        raise unsupported(
            "tool_choice", "tool_choice: must be none, auto, required, or one function by its name"
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
    return body


def read_input(body: ResponsesBody, store: ResponseStore) -> tuple[Item, ...]:
    """The whole conversation: that of the previous response, then what is new."""
    before: tuple[Item, ...] = ()
    if body.previous_response_id is not None:
        try:
            before = store.get(body.previous_response_id, current_access()).conversation
        except UnknownResponse:
            raise RequestError(
                f"Previous response with id '{body.previous_response_id[:64]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None
    return (*before, *_new_items(body, before, store))


def chat_body(body: ResponsesBody, items: Sequence[Item]) -> ChatBody:
    """The chat request that asks for the same."""
    values: dict[str, Any] = {name: getattr(body, name) for name in _SHARED}
    logprobs = bool(body.top_logprobs) or INCLUDE_LOGPROBS in (body.include or [])
    values |= {
        "messages": _messages(body.instructions, items),
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": logprobs,
        "top_logprobs": body.top_logprobs if logprobs else None,
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if body.structured_outputs is not None:
        values["structured_outputs"] = body.structured_outputs.model_dump(by_alias=True, exclude_unset=True)
    if body.tools is not None:
        functions = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in body.tools]
        values["tools"] = [{"type": "function", "function": function} for function in functions]
    choice = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        values["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        values["tool_choice"] = choice
    if body.text is not None and (wanted := body.text.format) is not None:
        values["response_format"] = {"type": wanted.type}
        if wanted.type == "json_schema":
            values["response_format"]["json_schema"] = {"schema": wanted.schema_}
    return parse(ChatBody, values)


@contextmanager
def in_our_words() -> Iterator[None]:
    """Faults of the chat request name the fields that the caller wrote."""
    try:
        yield
    except RequestError as error:
        words, param = error.message, error.param
        for name, ours in _NAMES:
            words = name.sub(ours, words)
            param = name.sub(ours, param) if param is not None else None
        raise type(error)(words, param=param, code=error.code) from error


def _new_items(body: ResponsesBody, before: Sequence[Item], store: ResponseStore) -> list[Item]:
    if isinstance(body.input, str):
        return [MessageItem(_new_id("msg"), "user", [InputText(body.input)])]
    called = {item.call_id for item in before if isinstance(item, CallItem)}
    items: list[Item] = []
    for place, given in enumerate(body.input):
        path = f"input[{place}]"
        match given:
            case InputMessage():
                item: Item = _message(given, path)
            case InputCall():
                _check_arguments(given.arguments, f"{path}.arguments")
                item = CallItem(given.id or _new_id("fc"), given.call_id, given.name, given.arguments)
            case InputCallOutput():
                if given.call_id not in called:
                    raise RequestError(
                        f"{path}.call_id: no function_call before it has this call_id",
                        param=f"{path}.call_id",
                    )
                text = "\n".join(_texts(given.output, f"{path}.output"))
                item = CallOutputItem(given.id or _new_id("fco"), given.call_id, text)
            case InputReference():
                found = store.item(given.id, current_access())
                if found is None:
                    raise RequestError(f"{path}.id: is no item of a stored response", param=f"{path}.id")
                item = found
            case other:
                raise unsupported(
                    f"{path}.type",
                    f"{path}: items of type '{other.type[:64]}' are not supported; messages, function_call, "
                    "function_call_output and item_reference are",
                )
        if isinstance(item, CallItem):
            called.add(item.call_id)
        items.append(item)
    return items


def _message(given: InputMessage, path: str) -> MessageItem:
    texts = _texts(given.content, f"{path}.content")
    kind = OutputText if given.role == "assistant" else InputText
    return MessageItem(given.id or _new_id("msg"), given.role, [kind(text) for text in texts])


def _texts(content: str | list[InputPart], path: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    texts = []
    for place, part in enumerate(content):
        where = f"{path}[{place}]"
        if part.type == "refusal" and part.refusal is not None:
            texts.append(part.refusal)
        elif part.type not in _TEXT_PARTS:
            raise unsupported(
                f"{where}.type",
                f"{where}: content parts of type '{part.type[:64]}' are not supported; only input_text and "
                "output_text are",
            )
        elif part.text is None:
            raise RequestError(f"{where}.text: a text part needs text", param=f"{where}.text")
        else:
            texts.append(part.text)
    return texts


def _check_arguments(arguments: str, path: str) -> None:
    try:
        parse_object(arguments.encode() or b"{}")
    except RequestError:
        raise RequestError(f"{path}: is no JSON object", param=path) from None


def _messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """As chat has them: instructions and a leading system message are one, and so are calls made at once."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem():
                parts = [{"type": "text", "text": part.text} for part in item.content]
                messages.append({"role": item.role, "content": parts})
            case CallItem():
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": []})
                messages[-1].setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
    if not instructions:
        return messages
    first = messages[0] if messages else None
    if first is not None and first["role"] in ("system", "developer"):
        text = "\n".join(part["text"] for part in first["content"])
        return [{"role": "system", "content": f"{instructions}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
