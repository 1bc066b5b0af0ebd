"""Tool calls in answers: every way of writing them, in pieces of any size, and what only looks like a call."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramux_server.api.protocol import ChatBody
from loramux_server.api.tool_calls import CallReader, call_reader
from loramux_server.api.tools import Dialect, ToolPlan, dialect_of, for_template, plan_tools

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]


def plan(**fields: Any) -> ToolPlan:
    body = ChatBody.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS} | fields
    )
    made = plan_tools(body)
    assert made is not None
    return made


def read(reader: CallReader, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer that comes in pieces of `size` characters."""
    found = [reader.push(text[begin : begin + size]) for begin in range(0, len(text), size)]
    found.append(reader.finish())
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in (call for one in found for call in one.calls):
        if call.id:
            assert call.index not in names
            names[call.index] = call.name
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert list(names) == list(range(len(names)))
    return "".join(one.text for one in found), [
        (names[index], json.loads(text)) for index, text in arguments.items()
    ]


ADD = ("add", {"a": 1, "b": "}</x>"})
NOW: tuple[str, dict[str, Any]] = ("now", {})
_HERMES_ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}</x>"}}\n</tool_call>'
_HERMES_NOW = '<tool_call>{"name": "now"}</tool_call>'
_LLAMA_ADD = '{"name": "add", "parameters": {"a": 1, "b": "}</x>"}}'
_LLAMA_NOW = '{"name": "now", "parameters": {}}'
_ARGUMENTS = '{"a": 1, "b": "}</x>"}'

CASES: list[tuple[Dialect, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "just text", "just text", []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", _HERMES_ADD, "", [ADD]),
    ("hermes", f"I will.\n{_HERMES_ADD}\n{_HERMES_NOW}", "I will.\n", [ADD, NOW]),
    ("hermes", _HERMES_ADD.removesuffix("\n</tool_call>"), "", [ADD]),
    ("hermes", "<tool_call>nonsense</tool_call> so", "<tool_call>nonsense</tool_call> so", []),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    ("mistral", "just [text]", "just [text]", []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "add", "arguments": {_ARGUMENTS}}}]', "", [ADD]),
    ("mistral", f"well[TOOL_CALLS]add[ARGS]{_ARGUMENTS}[TOOL_CALLS]now{{}}", "well", [ADD, NOW]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]abc[ARGS]{_ARGUMENTS}", "", [ADD]),
    ("mistral", "[TOOL_CALLS]what?", "[TOOL_CALLS]what?", []),
    ("mistral", '[TOOL_CALLS][{"name": "add"}, 3]', '[TOOL_CALLS][{"name": "add"}, 3]', []),
    ("llama3", "just text {", "just text {", []),
    ("llama3", _LLAMA_ADD, "", [ADD]),
    ("llama3", f"<|python_tag|>{_LLAMA_ADD}; {_LLAMA_NOW}", "", [ADD, NOW]),
    ("llama3", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    ("llama3", ' {"a": 1} and more', ' {"a": 1} and more', []),
]


@pytest.mark.parametrize(("dialect", "written", "text", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_free_calls(
    dialect: Dialect, written: str, text: str, calls: list[tuple[str, Any]], size: int
) -> None:
    assert read(call_reader(plan(), dialect), written, size) == (text, calls)


@pytest.mark.parametrize(
    ("dialect", "written"),
    [
        ("hermes", f"{_HERMES_ADD}\n{_HERMES_NOW}"),
        ("mistral", f"[TOOL_CALLS]add[ARGS]{_ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}"),
        ("llama3", f"{_LLAMA_ADD}, {_LLAMA_NOW}"),
    ],
)
def test_one_call_if_they_may_not_be_parallel(dialect: Dialect, written: str) -> None:
    one = plan(parallel_tool_calls=False)
    assert read(call_reader(one, dialect), written, 5) == ("", [ADD])


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_forced_calls(size: int) -> None:
    named = plan(tool_choice={"type": "function", "function": {"name": "add"}})
    assert read(call_reader(named, "llama3"), _ARGUMENTS, size) == ("", [ADD])
    written = f'[{{"name": "add", "arguments": {_ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]'
    required = plan(tool_choice="required")
    assert read(call_reader(required, "hermes"), written, size) == ("", [ADD, NOW])
    # cut off in the second call
    assert read(call_reader(required, "hermes"), written[:-8], size) == ("", [ADD])


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("{% for m in messages %}...{% endfor %}", "hermes"),
        ("{{ tools }} <tool_call> ... ipython", "hermes"),
        ("[AVAILABLE_TOOLS] {{ tools }} [TOOL_CALLS]", "mistral"),
        ("Environment: ipython {{ tools }}", "llama3"),
    ],
)
def test_the_template_tells_how_calls_are_written(template: str, dialect: str) -> None:
    assert dialect_of(template) == dialect


def test_a_template_without_tools_gets_them_as_text() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (system, user, assistant, result), definitions = for_template(bare, messages, plan())
    assert definitions is None
    assert system["content"].startswith("Be brief.\n\n")
    assert '"name": "now", "description": "the time"' in system["content"]
    assert user == messages[1]
    assert read(call_reader(plan(), "hermes"), assistant["content"], 50) == ("", [("add", {"a": 1})])
    assert result == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}
    assert for_template(bare, messages[1:2], plan())[0][0]["role"] == "system"
    assert for_template(bare, messages[1:2], None) == (messages[1:2], None)


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "content": "2", "tool_call_id": "1"}]
    knowing = "{{ tools }} {% if message.tool_calls %}"
    assert for_template(knowing, messages, plan()) == (messages, plan().definitions)
    assert plan().definitions[0] == TOOLS[0]
