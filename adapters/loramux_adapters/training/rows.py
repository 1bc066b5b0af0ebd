"""A JSONL training file -> validated rows, or an error that names line, message and key.

Three kinds of rows, OpenAI's and the field's: `{"messages": [...], "tools": [...]}`, `{"prompt": ..., "completion": ...}`
and `{"text": ...}`; one file holds one kind. Promises: a row that comes out has the shape a chat template may rely
on, and something in it to learn. Does not tokenize, and knows no lengths in tokens. No torch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loramux_adapters.config_fields import shown
from loramux_adapters.errors import TrainingError
from loramux_adapters.files import open_regular

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_FAULTS = 20

_ROLES = ("system", "developer", "user", "assistant", "tool")
_RENAMED = {"developer": "system"}  # templates know the older name, as when serving
_ROW_KEYS = {"messages": {"messages", "tools", "parallel_tool_calls"}, "prompt": {"prompt", "completion"}}
_MESSAGE_KEYS = {"role", "content", "name"}
_ROLE_KEYS = {"assistant": {"weight", "tool_calls", "refusal"}, "tool": {"tool_call_id"}}


@dataclass(frozen=True, slots=True)
class ChatRow:
    """`weights` has one entry a message, True where it is trained on."""

    line: int
    messages: list[dict[str, Any]]
    weights: tuple[bool, ...]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class CompletionRow:
    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextRow:
    line: int
    text: str


Row = ChatRow | CompletionRow | TextRow


@dataclass(frozen=True, slots=True)
class RowFile:
    """The rows of one file; `sha256` is of its bytes, as `sha256sum` prints it."""

    name: str
    sha256: str
    rows: list[Row]


class _Fault(Exception):
    """What is wrong with one line, as the rest of a sentence that begins with the line's number."""


def read_rows(path: Path, *, param: str = "training_file") -> RowFile:
    """Read and check a whole file. Raises TrainingError with up to 20 faults; `param` is what the caller calls it."""
    rows: list[Row] = []
    sha256 = check_rows(path, rows.append, param=param)
    return RowFile(path.name, sha256, rows)


def check_rows(path: Path, keep: Callable[[Row], object], *, param: str = "training_file") -> str:
    """Check a whole file of any size, a row at a time; `keep` is given each. Returns the sha256. Raises as `read_rows`."""
    found = wrong = 0
    faults: list[str] = []
    digest = hashlib.sha256()
    kind = ""
    try:
        for number, line in _lines(path, digest):
            try:
                row, row_kind = _row(number, line)
                if kind and row_kind != kind:
                    raise _Fault(
                        f'key "{row_kind}": the lines above have "{kind}"; a file holds one kind of row'
                    )
                kind = row_kind
                found += 1
                keep(row)
            except _Fault as fault:
                wrong += 1
                if wrong <= MAX_FAULTS:
                    faults.append(f"Line {number}, {fault}")
    except OSError as error:
        raise TrainingError(f"{path.name} cannot be read: {error.strerror or error}", param=param) from error
    if faults:
        more = f"; and {wrong - MAX_FAULTS} more lines" if wrong > MAX_FAULTS else ""
        raise TrainingError(
            f"Invalid file format of {path.name}. {'; '.join(faults)}{more}",
            param=param,
            code="invalid_training_file",
        )
    if not found:
        raise TrainingError(f"{path.name} has no rows", param=param, code="invalid_training_file")
    return digest.hexdigest()


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1 as editors do; a longer one than allowed comes cut."""
    number = 0
    with open_regular(path) as raw, io.BufferedReader(cast(io.RawIOBase, raw)) as reader:
        while line := reader.readline(MAX_LINE_BYTES + 1):
            number += 1
            digest.update(line)
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = reader.readline(MAX_LINE_BYTES)
                digest.update(rest)
            if line.strip():
                yield number, line


def _row(number: int, line: bytes) -> tuple[Row, str]:
    if len(line) > MAX_LINE_BYTES:
        raise _Fault(f"it is longer than {MAX_LINE_BYTES} bytes")
    value = _parse(line)
    if not isinstance(value, dict):
        raise _Fault("it should be a JSON object")
    if "messages" in value:
        _known(value, _ROW_KEYS["messages"], "")
        return _chat(number, value), "messages"
    if "prompt" in value or "completion" in value:
        _known(value, _ROW_KEYS["prompt"], "")
        prompt, completion = _text(value, "prompt", "", empty=True), _text(value, "completion", "")
        return CompletionRow(number, prompt, completion), "prompt"
    if "text" in value:
        _known(value, {"text"}, "")
        return TextRow(number, _text(value, "text", "")), "text"
    raise _Fault('it should have the key "messages", "prompt" and "completion", or "text"')


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _Fault(f"it is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _Fault(f"it is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _Fault(f"it is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _chat(number: int, value: Mapping[str, Any]) -> ChatRow:
    given = value["messages"]
    if not isinstance(given, list) or not given:
        raise _Fault('key "messages": Input should be a list of messages')
    tools = value.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Fault('key "tools": Input should be a list of objects')
    if not isinstance(value.get("parallel_tool_calls", True), bool):
        raise _Fault('key "parallel_tool_calls": Input should be a valid boolean')
    messages, weights = [], []
    for place, message in enumerate(given, start=1):
        plain, weight = _message(message, f"message {place}, ")
        messages.append(plain)
        weights.append(weight)
    if messages[-1]["role"] != "assistant":
        raise _Fault(f'message {len(messages)}, key "role": the last message should be the assistant\'s')
    if not any(weights):
        raise _Fault('key "messages": no assistant message has a weight of 1, there is nothing to learn')
    return ChatRow(number, messages, tuple(weights), tools or None)


def _message(message: object, where: str) -> tuple[dict[str, Any], bool]:
    """The message as templates read it, and whether it is trained on."""
    if not isinstance(message, dict):
        raise _Fault(f"{where}it should be a JSON object")
    role = message.get("role")
    if role not in _ROLES:
        raise _Fault(f'{where}key "role": Input should be one of {", ".join(_ROLES)}, not {shown(role)}')
    _known(message, _MESSAGE_KEYS | _ROLE_KEYS.get(role, set()), where)
    plain: dict[str, Any] = {"role": _RENAMED.get(role, role), "content": _content(message, where)}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            plain[key] = _text(message, key, where)
    if message.get("tool_calls") is not None:
        plain["tool_calls"] = _tool_calls(message["tool_calls"], where)
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _Fault(f'{where}key "weight": Input should be 0 or 1, not {shown(weight)}')
    return plain, role == "assistant" and weight == 1


def _content(message: Mapping[str, Any], where: str) -> str:
    """Text parts are joined by newlines, as when serving; null is for tool calls and refusals."""
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        if message.get("refusal") is not None:
            return _text(message, "refusal", where)
        if message.get("tool_calls"):
            return ""
    if isinstance(content, list) and content:
        texts = []
        for place, part in enumerate(content, start=1):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise _Fault(
                    f'{where}key "content", part {place}: only parts of type "text" can be trained on'
                )
            texts.append(_text(part, "text", f'{where}key "content", part {place}, '))
        return "\n".join(texts)
    return _text(message, "content", where, empty=True)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    where = f'{where}key "tool_calls"'
    if not isinstance(calls, list) or not calls:
        raise _Fault(f"{where}: Input should be a list of calls")
    plain = []
    for place, call in enumerate(calls, start=1):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Fault(f"{where}, call {place}: Input should have a function with a name")
        arguments = function.get("arguments", "{}")
        try:  # templates write arguments as an object; the API sends them as text
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            raise _Fault(f"{where}, call {place}: arguments is not JSON") from None
        if not isinstance(arguments, dict):
            raise _Fault(f"{where}, call {place}: arguments should be a JSON object")
        described = {"name": function["name"], "arguments": arguments}
        plain.append({"type": "function", "id": str(call.get("id", "")), "function": described})
    return plain


def _text(value: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise _Fault(f'{where}key "{key}": Input should be a valid string')
    if not text and not empty:
        raise _Fault(f'{where}key "{key}": Input should not be empty')
    return text


def _known(value: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in value:
        if key not in keys:
            raise _Fault(
                f"{where}key {shown(key)}: it is not known here; known are {', '.join(sorted(keys))}"
            )
