"""The official client, unmodified, against the application on a real port."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from loramux_adapters.errors import EngineError, LoramuxError, Overloaded
from loramux_server.engine.messages import TokenOutput
from tests.api.conftest import Stand

HELLO: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def api(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_api(server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny", "gpt-4", "pirate", "team/x:v2"]
    card = api.models.retrieve("team/x:v2")
    assert (card.id, card.object, card.owned_by) == ("team/x:v2", "model", "loramux")


def test_chat(api: openai.OpenAI) -> None:
    raw = api.chat.completions.with_raw_response.create(
        model="pirate", messages=HELLO, logprobs=True, top_logprobs=2, extra_body={"top_k": 3}
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["Hello", " world"]
    assert raw.headers["x-adapter-generation"] == "a1b2c3d4e5f60718"
    assert answer._request_id == raw.headers["x-request-id"]


def test_chat_streamed(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="pirate", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.usage is not None
    assert (last.choices, last.usage.completion_tokens) == ([], 3)


def test_the_stream_helper_accumulates(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(model="tiny", messages=HELLO, n=2) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello world", "Hello world"]


def test_completions(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=4, logprobs=2, n=2)
    assert [choice.text for choice in answer.choices] == ["Hello world"] * 4
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 5]
    stream = api.completions.create(model="tiny", prompt="hi", stream=True, stop=" wor")
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


async def test_async_streams_side_by_side(async_api: openai.AsyncOpenAI, stand: Stand) -> None:
    stand.engine.delay = 0.01
    one = await async_api.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    two = await async_api.chat.completions.create(model="pirate", messages=HELLO, stream=True)
    texts = ["", ""]
    for place, stream in enumerate((two, one)):
        async for chunk in stream:
            texts[place] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello world", "Hello world"]


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "invalid_request", "tools[0].function"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "unsupported_parameter", "functions"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded", "messages"),
    ],
)
def test_mistakes(
    api: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str
) -> None:
    with pytest.raises(error) as caught:
        api.chat.completions.create(**({"model": "tiny", "messages": HELLO} | fields))
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (Overloaded("the queue is full"), openai.RateLimitError),
        (EngineError("restarting"), openai.InternalServerError),
        (ValueError("a fault of ours"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_trouble(
    api: openai.OpenAI, stand: Stand, trouble: Exception, error: type[openai.APIStatusError], stream: bool
) -> None:
    stand.engine.script = lambda call: [trouble]
    with pytest.raises(error):
        api.chat.completions.create(model="tiny", messages=HELLO, stream=stream)


def test_the_client_retries_a_full_queue(api: openai.OpenAI, stand: Stand) -> None:
    answers: list[LoramuxError | None] = [Overloaded("the queue is full"), None]

    def full_once(call: object) -> Any:
        trouble = answers.pop(0)
        return [trouble] if trouble else stand.engine.saying("at last")(call)  # type: ignore[arg-type]

    stand.engine.script = full_once
    answer = api.with_options(max_retries=1).chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "at last"


def test_trouble_in_the_middle_of_a_stream(api: openai.OpenAI, stand: Stand) -> None:
    stand.engine.script = lambda call: [TokenOutput(call.request_id, [40]), EngineError("the worker died")]
    stream = api.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the worker died"):
        list(stream)


TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = 'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture
def roomy(stand: Stand) -> Stand:
    stand.engine.max_model_len = 4096
    return stand


def test_tool_calls(api: openai.OpenAI, roomy: Stand) -> None:
    roomy.engine.script = roomy.engine.saying(CALL)
    answer = api.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see. ")
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
    # the answer can be sent back as it is, with a result
    again: Any = [
        *HELLO,
        choice.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "2"},
    ]
    api.chat.completions.create(model="tiny", messages=again, tools=TOOLS)
    prompt = roomy.tokenizer.decode(roomy.engine.calls[-1].prompt)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt


@pytest.mark.parametrize(
    ("choice", "text", "content"),
    [
        ("auto", CALL, "Let me see. "),
        ("required", '[{"name": "add", "arguments": {"a": 1}}]', ""),
        ({"type": "function", "function": {"name": "add"}}, '{"a": 1}', ""),
    ],
)
def test_tool_calls_streamed(api: openai.OpenAI, roomy: Stand, choice: Any, text: str, content: str) -> None:
    roomy.engine.script = roomy.engine.saying(text)
    with api.chat.completions.stream(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice, n=2, logprobs=True
    ) as stream:
        deltas = [
            (chunk.chunk.choices[0].index, call)
            for chunk in stream
            if chunk.type == "chunk" and chunk.chunk.choices
            for call in chunk.chunk.choices[0].delta.tool_calls or []
        ]
        final = stream.get_final_completion()
    for index in range(2):
        first, *rest = [call for place, call in deltas if place == index]
        assert first.id
        assert first.function is not None
        assert (first.index, first.type, first.function.name) == (0, "function", "add")
        assert first.function.arguments == ""
        assert all(call.id is None and call.function is not None and not call.function.name for call in rest)
        message = final.choices[index].message
        assert (final.choices[index].finish_reason, message.content or "") == ("tool_calls", content)
        assert message.tool_calls is not None
        assert message.tool_calls[0].function.arguments == '{"a": 1}'
        logprobs = final.choices[index].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert "".join(entry.token for entry in logprobs.content) == text


def test_text_beside_tools_is_text(api: openai.OpenAI, roomy: Stand) -> None:
    roomy.engine.script = roomy.engine.saying("No need <tool")
    answer = api.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
    assert answer.choices[0].message.content == "No need <tool"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    roomy.engine.script = roomy.engine.saying('{"a": 1', finish="length")
    forced: Any = {"type": "function", "function": {"name": "add"}}
    cut = api.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=forced)
    assert cut.choices[0].finish_reason == "length"


def test_parsed_answers(api: openai.OpenAI, roomy: Stand) -> None:
    class Point(pydantic.BaseModel):
        x: int

    roomy.engine.script = roomy.engine.saying('{"x": 3}')
    answer = api.chat.completions.parse(model="tiny", messages=HELLO, response_format=Point)
    assert answer.choices[0].message.parsed == Point(x=3)
    assert roomy.engine.calls[-1].params.grammar is not None


def test_the_embeddings_are_a_clear_404(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        api.embeddings.create(model="tiny", input="x")


def test_models_by_base_and_adapter(api: openai.OpenAI) -> None:
    assert api.models.retrieve("tiny:pirate").id == "pirate"


@pytest.mark.parametrize("size", [70_000, 20_000_000])
def test_huge_headers_are_the_callers_fault(server_url: str, size: int) -> None:
    """Also when they come to the real HTTP server, which may refuse them before we do."""
    address = httpx.URL(server_url)
    with socket.create_connection((address.host, address.port or 80), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # it may stop reading in the middle
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nx-big: " + b"a" * size + b"\r\n\r\n")
        status = connection.recv(4096).split(b" ", 2)[1]
    assert status in (b"400", b"431")
    assert httpx.get(f"{server_url}/v1/models").status_code == 200


async def test_large_headers_are_431(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models", headers={"x-big": "a" * 70_000})
    assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")
    assert (await client.get("/v1/models", headers={"x-big": "a" * 60_000})).status_code == 200
