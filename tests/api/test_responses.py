"""/v1/responses with the official client: shapes, the order of events, conversations that go on, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response

from loramux_adapters.access import Access
from loramux_adapters.errors import EngineError, Overloaded
from loramux_server.api.responses_store import ResponseStore, UnknownResponse
from loramux_server.api.responses_wire import InputText, MessageItem, ResponseObject
from loramux_server.engine.messages import TokenOutput
from tests.api.conftest import FakeRecord, Stand, build, listening
from tests.api.test_requests import refused

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS: Any = [
    {"type": "function", "name": "add", "description": "adds", "parameters": PARAMETERS, "strict": False},
    {"type": "function", "name": "stop", "parameters": None, "strict": None},
]
CALL = 'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture
def stand(tokenizer: Any) -> Stand:
    made = build(tokenizer)
    made.engine.max_model_len = 4096
    return made


@pytest.fixture
def api(stand: Stand) -> Iterator[openai.OpenAI]:
    with (
        listening(stand.app) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def prompt(stand: Stand) -> str:
    """What the engine was last given."""
    return str(stand.tokenizer.decode(stand.engine.calls[-1].prompt))


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/responses", json={"model": "tiny", "input": "hi"} | fields)


def test_a_response(api: openai.OpenAI, stand: Stand) -> None:
    raw = api.responses.with_raw_response.create(
        model="tiny:pirate",
        input="hi",
        instructions="Be brief.",
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        metadata={"k": "v"},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        extra_body={"top_k": 3, "stop": "zzz", "seed": 7},
    )
    answer = raw.parse()
    assert answer.output_text == "Hello world"
    assert (answer.model, answer.status, answer.object, answer.error) == (
        "pirate",
        "completed",
        "response",
        None,
    )
    assert (answer.instructions, answer.max_output_tokens, answer.temperature) == ("Be brief.", 50, 0.5)
    assert (answer.top_p, answer.metadata, answer.top_logprobs) == (0.9, {"k": "v"}, 2)
    assert answer.usage is not None
    tokens = len(stand.engine.calls[0].prompt)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (tokens, 3)
    assert answer.usage.total_tokens == tokens + 3
    assert answer.usage.input_tokens_details.cached_tokens == 2
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    (message,) = answer.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert [entry.token for entry in part.logprobs or []] == ["Hello", " world"]
    assert raw.headers["x-adapter-generation"] == "a1b2c3d4e5f60718"
    params = stand.engine.calls[0].params
    assert (params.max_tokens, params.temperature, params.top_k, params.seed) == (50, 0.5, 3, 7)
    assert prompt(stand) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert stand.adapters.leased == []


def test_the_order_of_events(api: openai.OpenAI) -> None:
    events = list(api.responses.create(model="tiny", input="hi", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    created, _, added, part, first, *_, item_done, completed = events
    assert created.type == "response.created"
    assert (created.response.status, created.response.output) == ("in_progress", [])
    assert added.type == "response.output_item.added"
    assert added.item is not None
    assert added.item.type == "message"
    assert (added.item.status, added.item.content) == ("in_progress", [])
    assert part.type == "response.content_part.added"
    assert part.part.type == "output_text"
    assert part.part.text == ""
    assert first.type == "response.output_text.delta"
    assert (first.delta, first.item_id) == ("Hello", added.item.id)
    assert item_done.type == "response.output_item.done"
    assert completed.type == "response.completed"
    assert completed.response.output_text == "Hello world"
    assert completed.response.output == [item_done.item]
    assert completed.response.usage is not None


def test_the_stream_helper_parses(api: openai.OpenAI, stand: Stand) -> None:
    class Person(pydantic.BaseModel):
        name: str

    stand.engine.script = stand.engine.saying('{"name": "Ann"}')
    with api.responses.stream(model="tiny", input="hi", text_format=Person) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == '{"name": "Ann"}'
    assert final.output_parsed == Person(name="Ann")
    parsed = api.responses.parse(model="tiny", input="hi", text_format=Person)
    assert parsed.output_parsed == Person(name="Ann")
    assert stand.engine.calls[0].params.grammar == stand.engine.calls[1].params.grammar
    assert '"name"' in (stand.engine.calls[0].params.grammar or "")
    api.responses.create(model="tiny", input="hi", text={"format": {"type": "json_object"}})
    assert stand.engine.calls[-1].params.grammar is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_output(api: openai.OpenAI, stand: Stand, stream: bool) -> None:
    stand.engine.script = stand.engine.saying(CALL)
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": [{"role": "user", "content": "1 + 1?"}],
        "tools": TOOLS,
    }
    if stream:
        with api.responses.stream(**asked) as events:
            kinds = [event.type for event in events]
            answer: Response = events.get_final_response()
        assert kinds[-4:] == [
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert kinds.count("response.output_item.added") == 2
    else:
        answer = api.responses.create(**asked)
    message, call = answer.output
    assert message.type == "message"
    assert (answer.output_text, message.status) == ("Let me see. ", "completed")
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("add", '{"a": 1}', "completed")
    stand.engine.script = stand.engine.saying("It is 2.")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    again: Any = [*asked["input"], *[item.to_dict() for item in answer.output], output]
    assert api.responses.create(model="tiny", input=again, tools=TOOLS).output_text == "It is 2."
    by_hand = prompt(stand)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in by_hand
    assert "<|im_start|>tool\n2<|im_end|>" in by_hand
    following = api.responses.create(
        model="tiny", input=[output], tools=TOOLS, previous_response_id=answer.id, store=False
    )
    assert prompt(stand) == by_hand
    assert following.previous_response_id == answer.id


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"type": "function", "name": "add"}, '{"a": 1}'),
        ("required", '[{"name": "add", "arguments": {"a": 1}}]'),
    ],
)
def test_forced_calls(api: openai.OpenAI, stand: Stand, choice: Any, text: str) -> None:
    stand.engine.script = stand.engine.saying(text)
    answer = api.responses.create(
        model="tiny", input="hi", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("add", '{"a": 1}')
    assert stand.engine.calls[0].params.grammar is not None
    assert answer.parallel_tool_calls is False
    assert [tool.to_dict()["name"] for tool in answer.tools] == ["add", "stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut(api: openai.OpenAI, stand: Stand, stream: bool) -> None:
    stand.engine.script = stand.engine.saying('{"a": 12', finish="length")
    forced: Any = {"type": "function", "name": "add"}
    asked: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": TOOLS, "tool_choice": forced}
    if stream:
        last = list(api.responses.create(**asked, stream=True))[-1]
        assert last.type == "response.incomplete"
        answer = last.response
    else:
        answer = api.responses.create(**asked)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.arguments, call.status) == ('{"a": 12', "incomplete")


def test_an_empty_answer_is_an_empty_message(api: openai.OpenAI, stand: Stand) -> None:
    stand.engine.script = stand.engine.saying("")
    answer = api.responses.create(model="tiny", input="hi")
    assert (len(answer.output), answer.output_text, answer.status) == (1, "", "completed")


def test_a_stream_that_breaks_off(api: openai.OpenAI, stand: Stand) -> None:
    def script(call: Any) -> Any:
        yield TokenOutput(call.request_id, stand.tokenizer.encode("Hello"))
        yield EngineError("the worker died")

    stand.engine.script = script
    events = list(api.responses.create(model="tiny", input="hi", stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "the worker died")
    assert last.response.output_text == "Hello"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(last.response.id)


def test_before_the_first_token_a_failure_is_a_status(api: openai.OpenAI, stand: Stand) -> None:
    stand.engine.script = lambda call: [Overloaded("the queue is full")]
    with pytest.raises(openai.RateLimitError):
        api.responses.create(model="tiny", input="hi", stream=True)


def test_kept_responses(api: openai.OpenAI, stand: Stand) -> None:
    first = api.responses.create(model="tiny", input="one", instructions="Only now.")
    assert api.responses.retrieve(first.id) == first
    second = api.responses.create(model="pirate", input="two", previous_response_id=first.id)
    assert prompt(stand) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nHello world<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    api.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as error:
        api.responses.retrieve(first.id)
    assert error.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as gone:
        api.responses.create(model="tiny", input="hi", previous_response_id=first.id)
    assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")
    # What went on from it has its own copy.
    items = list(api.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.type for item in items] == ["message"] * 3
    assert items[1].to_dict()["content"][0]["text"] == "Hello world"  # type: ignore[index]
    newest = api.responses.input_items.list(second.id, limit=1)
    assert (newest.data[0].to_dict()["content"], newest.has_more) == (
        [{"type": "input_text", "text": "two"}],
        True,
    )


def test_store_false_is_honoured(api: openai.OpenAI) -> None:
    answer = api.responses.create(model="tiny", input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(answer.id)


def test_an_item_by_reference(api: openai.OpenAI, stand: Stand) -> None:
    first = api.responses.create(model="tiny", input="one")
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    api.responses.create(model="tiny", input=[reference, {"role": "user", "content": "two"}])
    assert "assistant\nHello world<|im_end|>\n<|im_start|>user\ntwo" in prompt(stand)


def test_an_adapters_prompt_and_sampling(api: openai.OpenAI, stand: Stand) -> None:
    stand.adapters.records["poet"] = FakeRecord(
        "poet", "ab" * 8, default_sampling={"temperature": 0.25}, metadata={"system_prompt": "Rhyme."}
    )
    assert api.responses.create(model="poet", input="hi").temperature == 0.25
    assert prompt(stand).startswith("<|im_start|>system\nRhyme.<|im_end|>")
    api.responses.create(model="poet", input="hi", instructions="Prose.")
    assert prompt(stand).startswith("<|im_start|>system\nProse.<|im_end|>")


async def test_instructions_and_a_system_message_are_one(client: httpx.AsyncClient, stand: Stand) -> None:
    parts = [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "hi"}]
    assert (await ask(client, input=messages, instructions="a")).status_code == 200
    assert prompt(stand).startswith("<|im_start|>system\na\n\nb\nc<|im_end|>\n<|im_start|>user\nhi")


async def test_the_events_have_names(client: httpx.AsyncClient) -> None:
    response = await ask(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, end = response.text.split("\n\n")
    assert end == ""
    for block in blocks:
        name, data = block.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "invalid_request"),
        ({"input": []}, "input", "invalid_request"),
        ({"input": [{"role": "user"}]}, "input[0].content", "invalid_request"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_request"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "unsupported_parameter",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", ""),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", ""),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "input[0].call_id", ""),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "",
        ),
        ({"input": "Q" * 40000}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"include": ["file_search_call.results"]}, "include[0]", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_parameter"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", ""),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}},
            "text.format.schema",
            "",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", ""),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name", ""),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", ""),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", ""),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", ""),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_path(
    client: httpx.AsyncClient, stand: Stand, fields: dict[str, Any], param: str, code: str
) -> None:
    message = await refused(await ask(client, **fields), param, code or "invalid_request")
    assert not any(word in message for word in ("messages[", "response_format.", ".function"))
    assert stand.engine.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"background": False, "truncation": "disabled", "service_tier": "auto", "conversation": None},
        {"reasoning": None},
        {"reasoning": {"effort": None, "summary": "auto"}},
        {"include": ["reasoning.encrypted_content"]},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
)
async def test_what_changes_nothing_passes(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    assert (await ask(client, **fields)).status_code == 200


async def test_unknown_fields_are_named(client: httpx.AsyncClient) -> None:
    response = await ask(client, wisdom=1, text={"colour": "red"})
    assert response.headers["x-loramux-ignored-fields"] == "wisdom, text.colour"


async def test_other_methods(client: httpx.AsyncClient) -> None:
    for method in ("PUT", "TRACE", "OPTIONS", "HEAD"):
        response = await client.request(method, "/v1/responses/resp_1")
        assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET")
    assert (await client.get("/v1/responses/resp_1?stream=true")).status_code == 400
    assert (await client.get("/v1/responses/resp_1/input_items")).status_code == 404


class TestStore:
    @staticmethod
    def response(name: str, text: str = "") -> ResponseObject:
        fields: dict[str, Any] = dict.fromkeys(
            ("instructions", "max_output_tokens", "previous_response_id", "user", "prompt_cache_key")
        )
        return ResponseObject(
            id=name,
            created_at=0,
            model="m",
            system_fingerprint="f",
            metadata={},
            parallel_tool_calls=True,
            store=True,
            temperature=1.0,
            top_p=1.0,
            top_logprobs=0,
            text={},
            tool_choice="auto",
            tools=[],
            safety_identifier=None,
            output=[MessageItem(f"msg_{name}", "assistant", [InputText(text)])],
            **fields,
        )

    def test_the_least_recently_used_goes_first(self) -> None:
        store = ResponseStore(2, 10**6)
        for name in ("a", "b"):
            store.put(self.response(name), [])
        store.get("a")
        store.put(self.response("c"), [])
        with pytest.raises(UnknownResponse):
            store.get("b")
        assert store.item("msg_b") is None
        assert store.item("msg_a") is not None
        assert store.get("c").conversation[0].id == "msg_c"

    def test_no_tenant_makes_room_for_another(self) -> None:
        alice, bob = Access("alice"), Access("bob")
        store = ResponseStore(2, 10_000)
        store.put(self.response("a"), [], alice)
        given = [MessageItem("m", "user", [InputText("x" * 6000)])]
        for name in ("b", "c", "d", "e"):
            store.put(self.response(name), given, bob)
        assert store.get("a", alice).owner == "alice"
        assert store.item("msg_a", alice) is not None
        store.delete("a", alice)
        assert store.get("e", bob).given == (given[0],)
        for name in ("b", "c", "d"):
            with pytest.raises(UnknownResponse):
                store.get(name, bob)

    def test_bytes_are_bounded(self) -> None:
        store = ResponseStore(1000, 20_000)
        given = [MessageItem("m", "user", [InputText("x" * 6000)])]
        for name in ("a", "b", "c"):
            store.put(self.response(name), given)
        with pytest.raises(UnknownResponse):
            store.get("a")
        store.put(self.response("huge", "x" * 30_000), [])
        with pytest.raises(UnknownResponse):
            store.get("huge")
        assert store.get("b").given == (given[0],)
        store.delete("b")
        store.put(self.response("d"), given)
        assert store.get("c") is not None
