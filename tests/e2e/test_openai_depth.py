"""Constrained answers, tool calls and scored prompts on the real server with the embedded model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from tests.conformance.schemas import answers_to_schemas
from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "rum", "code"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "add_person", "parameters": PERSON}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "maxProperties": 0}}},
]


def test_schemas_in_a_mixed_batch(server: Server) -> None:
    """The base and an adapter, constrained and free at the same time."""
    schema: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    asked: list[dict[str, Any]] = [
        {"model": model, "seed": seed, **({"response_format": schema} if seed else {})}
        for seed in range(2)
        for model in ("demo", "pirate")
    ]

    def ask(fields: dict[str, Any]) -> Any:
        return server.openai.chat.completions.create(
            messages=[{"role": "user", "content": "Invent a person, as JSON."}], max_tokens=120, **fields
        )

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    constrained = [one for one, fields in zip(answers, asked, strict=True) if "response_format" in fields]
    for one in constrained:
        assert one.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(one.choices[0].message.content), PERSON)
    assert len(constrained) == 2


def test_regex_and_choice(server: Server) -> None:
    for outputs, allowed in (
        ({"choice": ["left", "right"]}, {"left", "right"}),
        ({"regex": "(yes|no), (sir|madam)"}, {f"{a}, {b}" for a in ("yes", "no") for b in ("sir", "madam")}),
    ):
        answer = server.openai.completions.create(
            model="demo", prompt="Well:", max_tokens=20, extra_body={"structured_outputs": outputs}
        )
        assert answer.choices[0].text in allowed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add_person"}}])
def test_forced_calls_are_valid(server: Server, choice: Any) -> None:
    with server.openai.chat.completions.stream(
        model="demo",
        messages=[{"role": "user", "content": "Add Ann, 30 years old."}],
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=150,
        temperature=0,
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    (call,) = final.message.tool_calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_json_or_a_call(server: Server) -> None:
    """As agents ask, with tools and a format at once."""
    answers = server.openai.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Invent a person, as JSON, or call stop."}],
        tools=TOOLS,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        max_tokens=120,
        n=4,
        seed=0,
    ).choices
    finished = [one for one in answers if one.finish_reason != "length"]
    assert finished
    for one in finished:
        if one.finish_reason == "stop":
            jsonschema.validate(json.loads(one.message.content or ""), PERSON)
        else:
            assert {call.function.name for call in one.message.tool_calls or ()} <= {"add_person", "stop"}


def test_a_scored_prompt_is_as_likely_as_the_answer_that_gave_it(server: Server) -> None:
    """What a greedy answer's tokens scored, they score again when they are echoed as a prompt."""
    prompt = "The capital of France is"
    first = server.openai.completions.create(
        model="demo", prompt=prompt, max_tokens=8, temperature=0, logprobs=1
    )
    generated = first.choices[0].logprobs
    assert generated is not None
    text = first.choices[0].text
    again = server.openai.completions.create(
        model="demo", prompt=prompt + text, max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    echoed = again.choices[0].logprobs
    assert echoed is not None
    assert echoed.tokens is not None
    assert generated.tokens is not None
    assert generated.token_logprobs is not None
    assert echoed.token_logprobs is not None
    count = len(generated.tokens)
    assert echoed.tokens[-1 - count : -1] == generated.tokens
    assert echoed.token_logprobs[0] is None
    assert echoed.token_logprobs[-1 - count : -1] == pytest.approx(generated.token_logprobs, abs=1e-3)
    assert again.choices[0].text.startswith(prompt + text)


def test_a_conversation_by_responses(server: Server) -> None:
    """A forced call of an adapter, its output in the next turn, streamed; chat says the same to the same conversation."""
    tool: Any = {"type": "function", "name": "add_person", "parameters": PERSON, "strict": True}
    called = server.openai.responses.create(
        model="pirate",
        instructions="You keep a list of people.",
        input="Add Ann, 30 years old.",
        tools=[tool],
        tool_choice={"type": "function", "name": "add_person"},
        max_output_tokens=150,
        temperature=0,
    )
    (call,) = called.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), PERSON)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    with server.openai.responses.stream(
        model="demo",
        input=[output, {"role": "user", "content": "Thanks!"}],
        previous_response_id=called.id,
        max_output_tokens=12,
        temperature=0,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text != ""
    assert final.usage is not None
    function = {"name": "add_person", "arguments": call.arguments}
    messages: Any = [
        {"role": "user", "content": "Add Ann, 30 years old."},
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "done"},
        {"role": "user", "content": "Thanks!"},
    ]
    chat = server.openai.chat.completions.create(
        model="demo", messages=messages, max_tokens=12, temperature=0
    )
    assert chat.choices[0].message.content == final.output_text
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == final.usage.input_tokens


def test_answers_match_their_schemas(server: Server) -> None:
    """Two dozen of the random schemas of `make conformance`."""
    outcome = answers_to_schemas(server.url, count=24)
    assert outcome.failures == {}
    assert outcome.passed > 16
