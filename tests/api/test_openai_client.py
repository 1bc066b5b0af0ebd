"""The official client, unmodified, against the application on a real port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
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
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_parameter", "tools"),
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
