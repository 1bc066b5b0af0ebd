"""The messages of a chat request, as the plain dictionaries that chat templates read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramux_adapters.errors import RequestError
from loramux_server.api.body import parse_object
from loramux_server.api.errors import unsupported
from loramux_server.api.protocol import ContentPart, Message, ToolCall

_ROLES = {"developer": "system"}  # templates know the older name


def conversation(messages: Sequence[Message], system_prompt: str | None = None) -> list[dict[str, Any]]:
    """Text only: parts are joined by newlines; anything else is refused by its path.

    `system_prompt` begins a conversation that has no system message of its own.
    """
    plain = [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]
    if system_prompt and all(message["role"] != "system" for message in plain):
        return [{"role": "system", "content": system_prompt}, *plain]
    return plain


def _plain(message: Message, path: str) -> dict[str, Any]:
    if message.function_call:
        raise unsupported(f"{path}.function_call", f"{path}.function_call: use tool_calls instead")
    if message.tool_calls and message.role != "assistant":
        raise RequestError(
            f"{path}.tool_calls: only the assistant's messages have them", param=f"{path}.tool_calls"
        )
    plain: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": _text(message, path),
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{place}]") for place, call in enumerate(message.tool_calls)
        ]
    return plain


def _tool_call(call: ToolCall, path: str) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves: they get the object."""
    try:
        arguments = parse_object(call.function.arguments.encode() or b"{}")
    except RequestError:
        path = f"{path}.function.arguments"
        raise RequestError(f"{path}: is no JSON object", param=path) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _text(message: Message, path: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant" and message.refusal is not None:
            return message.refusal
        if message.tool_calls:
            return ""
        raise RequestError(f"{path}.content: a message needs content", param=f"{path}.content")
    return "\n".join(
        _part_text(part, f"{path}.content[{place}]") for place, part in enumerate(message.content)
    )


def _part_text(part: ContentPart, path: str) -> str:
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type != "text":
        raise unsupported(
            f"{path}.type",
            f"{path}: content parts of type '{part.type[:64]}' are not supported; only 'text' is",
        )
    if part.text is None:
        raise RequestError(f"{path}.text: a text part needs text", param=f"{path}.text")
    return part.text
