"""The messages of a chat request, as the plain dictionaries that chat templates read."""

from __future__ import annotations

from collections.abc import Sequence

from loramux_adapters.errors import RequestError
from loramux_server.api.errors import unsupported
from loramux_server.api.protocol import ContentPart, Message

_ROLES = {"developer": "system"}  # templates know the older name


def conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Text only: parts are joined by newlines; anything else is refused by its path."""
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def ignored_in_messages(messages: Sequence[Message]) -> list[str]:
    return sorted({f"messages[].{name}" for message in messages for name in message.model_extra or {}})


def _plain(message: Message, path: str) -> dict[str, str]:
    for field in ("tool_calls", "function_call"):
        if getattr(message, field):
            raise unsupported(
                f"{path}.{field}", f"{path}.{field}: tool calls are not supported by this server"
            )
    plain = {"role": _ROLES.get(message.role, message.role), "content": _text(message, path)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _text(message: Message, path: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant" and message.refusal is not None:
            return message.refusal
        raise RequestError(f"{path}.content: a message needs content", param=f"{path}.content")
    return "\n".join(
        _part_text(part, f"{path}.content[{place}]") for place, part in enumerate(message.content)
    )


def _part_text(part: ContentPart, path: str) -> str:
    if part.type != "text":
        raise unsupported(
            f"{path}.type",
            f"{path}: content parts of type '{part.type[:64]}' are not supported; only 'text' is",
        )
    if part.text is None:
        raise RequestError(f"{path}.text: a text part needs text", param=f"{path}.text")
    return part.text
