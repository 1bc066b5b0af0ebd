"""Find tool calls in an answer as its text comes.

Three ways of writing free calls are read: Hermes and Qwen (`<tool_call>{...}</tool_call>`), Mistral (`[TOOL_CALLS]`
before a list, or before names with arguments) and Llama 3 (a bare object with `name` and `parameters`). Promises: text is
held back only while it may be part of a call; what looks like a call and cannot be read as one is given as text; no
character is lost or given twice. Whether the called function exists is the caller's to say, except for Llama's bare
objects, which are calls only of tools that there are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from loramux_server.api.tools import Dialect, ToolPlan

# Special tokens of tokenizers that mean something here; all others are left out of the text.
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Call:
    """One call, or the next part of the arguments of one that was begun (`id` and `name` are empty then)."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


@dataclass
class Found:
    """What new text turned out to be."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)


class CallReader(Protocol):
    """One answer's text in, text and calls out."""

    def push(self, text: str) -> Found: ...

    def finish(self) -> Found:
        """What was held back, at the end of the answer."""
        ...


def call_reader(plan: ToolPlan, dialect: Dialect) -> CallReader:
    if plan.only is not None:
        return _NamedReader(plan.only)
    if plan.forced:
        return _ListReader()
    match dialect:
        case "mistral":
            return _MistralReader(plan.parallel)
        case "llama3":
            return _LlamaReader(plan.names, plan.parallel)
        case _:
            return _HermesReader(plan.parallel)


class _NamedReader:
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> Found:
        if not text:
            return Found()
        begin = not self._begun
        self._begun = True
        return Found(calls=[Call(0, text, _new_id(), self._name) if begin else Call(0, text)])

    def finish(self) -> Found:
        return Found()


class _ListReader:
    """A list of calls, written by a grammar. A call that the end of the answer cuts off is left out."""

    def __init__(self) -> None:
        self._rest = ""
        self._count = 0

    def push(self, text: str) -> Found:
        self._rest += text
        found = Found()
        if not text or "}" not in text:
            return found
        while (begin := self._rest.find("{")) >= 0:
            value, end = _read_object(self._rest, begin)
            if value is None:
                break
            found.calls.append(_call(self._count, value["name"], value["arguments"]))
            self._count += 1
            self._rest = self._rest[end:]
        return found

    def finish(self) -> Found:
        return Found()


class _HermesReader:
    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, parallel: bool) -> None:
        self._parallel = parallel
        self._held = ""
        self._inside = False
        self._count = 0
        self._gap = ""

    def push(self, text: str) -> Found:
        self._held += text
        found = Found()
        while True:
            before, marker, after = self._held.partition(self.CLOSE if self._inside else self.OPEN)
            if not marker:
                break
            self._held = after
            if self._inside:
                self._take(before, found, closed=True)
            else:
                self._say(before, found)
            self._inside = not self._inside
        if not self._inside:
            keep = _beginning(self._held, self.OPEN)
            self._say(self._held[: len(self._held) - keep], found)
            self._held = self._held[len(self._held) - keep :]
        return found

    def finish(self) -> Found:
        found = Found()
        rest, self._held = self._held, ""
        if self._inside:
            self._take(rest, found, closed=False)
        else:
            self._say(rest, found)
        return found

    def _take(self, body: str, found: Found, *, closed: bool) -> None:
        value, end = _read_object(body, len(body) - len(body.lstrip(_SPACE)))
        if value is None or body[end:].strip(_SPACE) or not _is_call(value, "arguments"):
            self._say(self.OPEN + body + (self.CLOSE if closed else ""), found)
        elif self._parallel or self._count == 0:
            found.calls.append(_call(self._count, value["name"], value.get("arguments") or {}))
            self._count += 1
            self._gap = ""

    def _say(self, text: str, found: Found) -> None:
        """White space behind a call is an answer only if one follows."""
        self._gap += text
        if self._gap.strip(_SPACE) or not self._count:
            found.text += self._gap
            self._gap = ""


class _MistralReader:
    MARKER = "[TOOL_CALLS]"

    def __init__(self, parallel: bool) -> None:
        self._parallel = parallel
        self._held = ""
        self._inside = False

    def push(self, text: str) -> Found:
        self._held += text
        if self._inside:
            return Found()
        before, marker, after = self._held.partition(self.MARKER)
        if marker:
            self._inside, self._held = True, after
            return Found(before)
        keep = _beginning(self._held, self.MARKER)
        sent = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return Found(sent)

    def finish(self) -> Found:
        rest, self._held = self._held, ""
        if not self._inside:
            return Found(rest)
        calls = self._list(rest) or self._named(rest)
        if not calls:
            return Found(self.MARKER + rest)
        return Found(calls=calls if self._parallel else calls[:1])

    @staticmethod
    def _list(text: str) -> list[Call]:
        """`[{"name": ..., "arguments": {...}}, ...]`."""
        value, end = _read(text, len(text) - len(text.lstrip(_SPACE)))
        if not isinstance(value, list) or text[end:].strip(_SPACE):
            return []
        if not all(isinstance(one, dict) and _is_call(one, "arguments") for one in value):
            return []
        return [_call(place, one["name"], one.get("arguments") or {}) for place, one in enumerate(value)]

    def _named(self, text: str) -> list[Call]:
        """`name[ARGS]{...}`, also with `[CALL_ID]...` between, and the marker again before each further call."""
        calls: list[Call] = []
        for part in text.split(self.MARKER):
            head, brace, _ = part.partition("{")
            value, end = _read_object(part, len(head)) if brace else (None, 0)
            name = head.partition("[")[0].strip(_SPACE)
            if value is None or not name or part[end:].strip(_SPACE):
                return []
            calls.append(_call(len(calls), name, value))
        return calls


class _LlamaReader:
    TAG = "<|python_tag|>"

    def __init__(self, names: frozenset[str], parallel: bool) -> None:
        self._names = names
        self._parallel = parallel
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Found:
        """An answer is either calls or text, and its first character tells which."""
        if self._is_text:
            return Found(text)
        self._held += text
        start = self._held.lstrip(_SPACE)
        if not start or start[0] == "{" or start.startswith(self.TAG) or self.TAG.startswith(start):
            return Found()
        self._is_text = True
        sent, self._held = self._held, ""
        return Found(sent)

    def finish(self) -> Found:
        rest, self._held = self._held, ""
        calls = self._calls(rest.strip(_SPACE).removeprefix(self.TAG))
        if not calls:
            return Found(rest)
        return Found(calls=calls if self._parallel else calls[:1])

    def _calls(self, text: str) -> list[Call]:
        """Objects one after the other, with `;` or `,` between them or nothing."""
        calls: list[Call] = []
        place = 0
        while place < len(text):
            if text[place] in _SPACE + ";,":
                place += 1
                continue
            value, place = _read_object(text, place)
            if value is None:
                return []
            arguments = "parameters" if "parameters" in value else "arguments"
            if not _is_call(value, arguments) or value["name"] not in self._names:
                return []
            calls.append(_call(len(calls), value["name"], value.get(arguments) or {}))
        return calls


def _call(index: int, name: str, arguments: object) -> Call:
    return Call(index, json.dumps(arguments, ensure_ascii=False), _new_id(), name)


def _new_id() -> str:
    return uuid4().hex[:9]  # Mistral's templates want exactly nine letters and digits, others take anything


def _is_call(value: dict[str, Any], arguments: str) -> bool:
    return isinstance(value.get("name"), str) and isinstance(value.get(arguments) or {}, dict)


def _read_object(text: str, begin: int) -> tuple[dict[str, Any] | None, int]:
    value, end = _read(text, begin)
    return (value, end) if isinstance(value, dict) else (None, end)


def _read(text: str, begin: int) -> tuple[object, int]:
    """The JSON value at `begin` and where it ends; None if there is none."""
    try:
        return _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None, begin


def _beginning(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return length
    return 0
