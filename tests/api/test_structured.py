"""response_format, structured_outputs and tool_choice: what the engine is told, and what is refused before it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from loramux_server.api import structured
from loramux_server.api.tool_calls import MARKERS
from tests.api.conftest import CHATML, Stand, build, byte_level_tokenizer
from tests.api.test_requests import chat, completion, refused

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def follows(stand: Stand, text: str) -> bool:
    """Whether the grammar that the engine was last given accepts `text` as a whole."""
    grammar = stand.engine.calls[-1].params.grammar
    assert grammar is not None
    matcher = LLMatcher(from_tokenizer(stand.tokenizer), grammar, log_level=0)
    return matcher.consume_tokens(stand.tokenizer.encode(text)) and matcher.is_accepting()


def json_schema(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"b": [1, null]}', "[1]"),
        ({"response_format": json_schema(SCHEMA)}, '{\n  "a": -3\n}', '{"a": "3"}'),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a":3}', "{}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":3}', "{}"),
        ({"structured_outputs": {"json_object": True}}, "{}", "3"),
        ({"structured_outputs": {"regex": r"\d+/[a-z]"}}, "12/b", "12/"),
        ({"structured_outputs": {"choice": ['"yes"', "nö\\"]}}, "nö\\", "no"),
        ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, "aab", "aa"),
        ({"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}}, "aab", "aa"),
    ],
)
async def test_the_engine_gets_a_grammar(
    client: httpx.AsyncClient, stand: Stand, fields: dict[str, Any], good: str, bad: str
) -> None:
    for ask in (completion, chat):
        assert (await ask(client, **fields)).status_code == 200
        assert follows(stand, good)
        assert not follows(stand, bad)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"type": "object", "properties": {}}, "{}", '{"a": 1}'),
        ({"properties": {"a": {"properties": {"b": {}}}}}, '{"a": {"b": 1}}', '{"a": {"c": 1}}'),
        (
            {"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"properties": {"a": {}}}}},
            '[{"a": 1}]',
            '[{"b": 1}]',
        ),
        ({"properties": {"properties": {"type": "integer"}}}, '{"properties": 1}', '{"b": 1}'),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, '{"b": 1}', '{"b": "c"}'),
        ({"properties": {"a": {}}, "required": ["b"]}, '{"b": 1}', "{}"),
        ({"enum": [{"properties": {"a": 1}}]}, '{"properties": {"a": 1}}', "{}"),
        (
            {
                "allOf": [
                    {"properties": {"a": {"type": "integer"}}},
                    {"properties": {"b": {"type": "integer"}}},
                ]
            },
            '{"a": 1, "b": 2}',
            '{"a": "c"}',
        ),
    ],
)
async def test_objects_have_only_the_properties_they_name(
    client: httpx.AsyncClient, stand: Stand, schema: dict[str, Any], good: str, bad: str
) -> None:
    """Unless the schema says that there may be others, or composes them of parts."""
    schema = {"type": "array" if "items" in schema else "object", **schema}
    assert (await chat(client, response_format=json_schema(schema))).status_code == 200
    assert follows(stand, good)
    assert not follows(stand, bad)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
async def test_free_text_has_none(client: httpx.AsyncClient, stand: Stand, fields: dict[str, Any]) -> None:
    assert (await chat(client, **fields)).status_code == 200
    assert stand.engine.calls[-1].params.grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": json_schema([])}, "response_format.json_schema.schema"),
        ({"response_format": json_schema({"type": "objekt"})}, "response_format.json_schema.schema"),
        ({"response_format": json_schema({"not": {}})}, "response_format.json_schema.schema"),
        (
            {"response_format": json_schema({"not": {}, "x-guidance": {"lenient": True}})},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"const": "\\ud800"}'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "a ::= b"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a" * 600_000}}, "structured_outputs.regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_what_cannot_be_followed_is_refused(
    client: httpx.AsyncClient, stand: Stand, fields: dict[str, Any], param: str
) -> None:
    for ask in (completion, chat):
        message = await refused(await ask(client, **fields), param)
        assert len(message) < 500
    assert stand.engine.calls == []


async def test_compiling_has_a_time_limit(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "COMPILE_TIMEOUT_S", 0.001)
    properties = {f"p{place}": {"type": "string"} for place in range(2000)}
    response = await chat(client, response_format=json_schema({"type": "object", "properties": properties}))
    assert "seconds to compile" in await refused(response, "response_format.json_schema.schema")


TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


async def test_forced_calls_are_grammars(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.engine.max_model_len = 2048
    await chat(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add"}})
    assert follows(stand, '{"a": 3}')
    assert not follows(stand, "{}")
    # A format is about text, and there is none.
    await chat(client, tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
    one, two = '{"name": "add", "arguments": {"a": 3}}', '{"name": "now", "arguments": {}}'
    assert follows(stand, f"[{one}, {two}]")
    assert not follows(stand, "[]")
    assert not follows(stand, '[{"name": "sub", "arguments": {}}]')
    assert not follows(stand, '[{"name": "add", "arguments": {}}]')
    await chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert follows(stand, f"[{one}]")
    assert not follows(stand, f"[{one}, {two}]")
    for choice in ("auto", "none", None):
        await chat(client, tools=TOOLS, tool_choice=choice)
        assert stand.engine.calls[-1].params.grammar is None


_ADD, _NOW = '{"name": "add", "KEY": {"a": 3}}', '{"name":"now", "KEY":{}}'
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@pytest.mark.parametrize("special", [(), MARKERS], ids=["text", "special"])
@pytest.mark.parametrize(
    ("template", "key", "one", "two"),
    [
        ("", "arguments", f"{_OPEN}\n{_ADD}\n{_CLOSE}", f"{_OPEN}{_ADD}{_CLOSE}\n{_OPEN}{_NOW}{_CLOSE}"),
        ("[TOOL_CALLS]", "arguments", f"[TOOL_CALLS][{_ADD}]", f"[TOOL_CALLS][{_ADD}, {_NOW}]"),
        ("[TOOL_CALLS][ARGS]", "", '[TOOL_CALLS]add[ARGS]{"a":3}', "[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]now[ARGS]{}"),
        ("ipython", "parameters", _ADD, f"{_ADD}; {_NOW}"),
    ],
    ids=["hermes", "mistral", "mistral-args", "llama3"],
)  # fmt: skip
async def test_where_json_is_asked_for_calls_are_possible(
    special: Sequence[str], template: str, key: str, one: str, two: str
) -> None:
    """As agents ask: tools to call, and JSON in the end. What the grammar allows is read as calls."""
    unknown = "<|im_start|>"  # no marker, though the tokenizer takes markers for it
    tokenizer = byte_level_tokenizer(unk_token=unknown, chat_template=f"{CHATML}{{# tools {template} #}}")
    tokenizer.add_tokens(list(special), special_tokens=True)
    stand = build(tokenizer)
    one, two = one.replace("KEY", key), two.replace("KEY", key)
    stand.engine.script = stand.engine.saying(two)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(stand.app), base_url="http://test") as client:
        for wanted in ({"response_format": json_schema(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}}):
            answer = (await chat(client, tools=TOOLS, **wanted)).json()["choices"][0]
            assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["add", "now"]
            for good in ('{"a": 3}', one, two):
                assert follows(stand, good), good
            for bad in ("{}", "text", one.replace("add", "sub"), one.replace("add", "add2"), one + "x"):
                assert not follows(stand, bad), bad
            await chat(client, tools=TOOLS, parallel_tool_calls=False, **wanted)
            assert follows(stand, one)
            assert not follows(stand, two)
            # It is only for `auto`.
            await chat(client, tools=TOOLS, tool_choice="none", **wanted)
            assert not follows(stand, one)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "code"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"json_object": True}},
            "tool_choice",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}],
                "tool_choice": "required",
            },
            "tool_choice",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
async def test_what_is_wrong_with_tools_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    await refused(await chat(client, **fields), param)


async def test_the_model_is_told_of_the_tools(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.engine.max_model_len = 2048
    await chat(client, tools=TOOLS)
    assert '"name": "now"' in stand.tokenizer.decode(stand.engine.calls[-1].prompt)
    await chat(client, tools=TOOLS, tool_choice="none")
    assert "now" not in stand.tokenizer.decode(stand.engine.calls[-1].prompt)
