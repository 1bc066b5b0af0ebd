"""The tools of a chat request: which may be called, how the model is told of them, and what forces a call.

Promises: a forced call (`required`, or one by name) always has a known name and arguments that match its parameters, by a
grammar; a free one (`auto`) is whatever the model writes, read by tool_calls.py, unless text has to be JSON: then an answer
is that, or calls of known names. A base whose chat template does not write tools is told of them in the system message, in
the format of Hermes (https://github.com/NousResearch/Hermes-Function-Calling).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher

from loramux_adapters.errors import RequestError
from loramux_server.api.protocol import ChatBody, NamedTool, Tool
from loramux_server.api.structured import WHITE_SPACE, bounded, lark_string, of_schema

Dialect = Literal["hermes", "mistral", "llama3"]

_INSTRUCTIONS = """\
You may call one or more of the functions in <tools></tools>, one JSON object per line:
<tools>
{tools}
</tools>
For each call write a JSON object with the function's name and its arguments inside <tool_call></tool_call> tags:
<tool_call>
{{"name": "function-name", "arguments": {{...}}}}
</tool_call>"""


_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_WORD = re.compile(r"\btool(?:s|_calls)?\b")


@dataclass(frozen=True)
class ToolPlan:
    """The tools that may be called in an answer. `forced`: one has to be, `only` this one if it is set."""

    tools: tuple[Tool, ...]
    forced: bool
    only: str | None
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """As chat templates read them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def grammar(self) -> str:
        """What forces a call: the arguments alone if the function is named, else a list of calls."""
        if self.only is not None:
            function = next(tool.function for tool in self.tools if tool.function.name == self.only)
            return of_schema(function.parameters or _NO_PARAMETERS)
        return self._list_of_calls()

    def _list_of_calls(self) -> str:
        calls, rules = [], []
        for place, tool in enumerate(self.tools):
            opening = lark_string(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ')
            calls.append(f'{opening} arguments_{place} "}}"')
            schema = tool.function.parameters or _NO_PARAMETERS
            rules.append(f"arguments_{place}: %json {json.dumps(bounded(schema))}")
        more = '(", " call)*' if self.parallel else ""
        lark = [f'start: "[" call {more} "]"', "call: " + " | ".join(calls), *rules]
        return LLMatcher.grammar_from_lark("\n".join(lark))

    def json_or_calls(self, template: str, marker: Callable[[str], str], schema: dict[str, Any]) -> str:
        """What allows JSON by `schema`, or calls as `template` teaches them; `marker` writes one of theirs for a grammar."""
        names = [tool.function.name for tool in self.tools]
        call = _called_object("arguments", names)
        match dialect_of(template):
            case "hermes":
                opening, closing = marker("<tool_call>"), marker("</tool_call>")
                calls = self._several(f'{opening} "\\n"? call "\\n"? {closing}', '"\\n"')
            case "mistral" if "[ARGS]" in template:
                call = f"({_either(names)}) {marker('[ARGS]')} object"
                calls = self._several(f"{marker('[TOOL_CALLS]')} call", "")
            case "mistral":
                listed = self._several("call", 'SPACE? "," SPACE?')
                calls = f'{marker("[TOOL_CALLS]")} "[" {listed} "]"'
            case "llama3":
                call = _called_object("parameters", names)
                calls = self._several("call", '"; "')
        lark = (
            *(f"start: answer | {calls}", f"call: {call}", f"SPACE: /{WHITE_SPACE}/"),
            f"answer: %json {json.dumps(bounded(schema))}",
            f"object: %json {json.dumps(bounded({'type': 'object'}))}",
        )
        return LLMatcher.grammar_from_lark("\n".join(lark))

    def _several(self, one: str, between: str) -> str:
        return f"{one} ({between} {one})*" if self.parallel else one


def _called_object(key: str, names: Sequence[str]) -> str:
    """In the pieces that JSON consists of: where it begins, nothing tells a call from any other object."""
    name = f"({_either(json.dumps(one) for one in names)})"
    pieces = (
        '"{"',
        lark_string('"name"'),
        '":"',
        name,
        '","',
        lark_string(f'"{key}"'),
        '":"',
        "object",
        '"}"',
    )
    return " SPACE? ".join(pieces)


def _either(texts: Iterable[str]) -> str:
    return " | ".join(map(lark_string, texts))


def plan_tools(body: ChatBody) -> ToolPlan | None:
    """None if no tool may be called."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice: there are no tools to choose from", param="tool_choice")
        return None
    names = [tool.function.name for tool in body.tools]
    for place, name in enumerate(names):
        if name in names[:place]:
            path = f"tools[{place}].function.name"
            raise RequestError(f"{path}: '{name}' is there twice", param=path)
    if choice == "none":
        return None
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if only is not None and only not in names:
        path = "tool_choice.function.name"
        raise RequestError(f"{path}: is none of the tools", param=path)
    forced = only is not None or choice == "required"
    # response_format is about text, and a forced call has none: clients send both.
    if forced and body.structured_outputs is not None:
        raise RequestError(
            "tool_choice: a forced call has no room for structured_outputs", param="tool_choice"
        )
    return ToolPlan(tuple(body.tools), forced, only, body.parallel_tool_calls is not False)


def dialect_of(template: str) -> Dialect:
    """Which way of writing calls a chat template teaches; Hermes's if it teaches none."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" not in template and ("ipython" in template or "<|python_tag|>" in template):
        return "llama3"
    return "hermes"


def for_template(
    template: str, messages: Sequence[dict[str, Any]], plan: ToolPlan | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and the definitions to render: what the template does not write itself is text in the messages."""
    known = set(_WORD.findall(template))
    written = [_as_plain(message, known) for message in messages]
    if plan is None or "tools" in known:
        return written, None if plan is None else plan.definitions
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in plan.definitions)
    instructions = _INSTRUCTIONS.format(tools=lines)
    if written and written[0]["role"] == "system":
        first = {**written[0], "content": f"{written[0]['content']}\n\n{instructions}"}
        return [first, *written[1:]], None
    return [{"role": "system", "content": instructions}, *written], None


def _as_plain(message: dict[str, Any], known: set[str]) -> dict[str, Any]:
    if message["role"] == "tool" and not known & {"tool", "tools"}:
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls or "tool_calls" in known:
        return message
    written = [
        f"<tool_call>\n{json.dumps(one['function'], ensure_ascii=False)}\n</tool_call>" for one in calls
    ]
    parts = [message["content"], *written] if message["content"] else written
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(parts)}
