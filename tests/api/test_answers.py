"""The shapes of answers, whole and streamed, for completions and chat."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from loramux_server.engine.messages import TokenLogprobs, TokenOutput
from tests.api.conftest import Call, Stand

HELLO = [{"role": "user", "content": "hi"}]


async def ask(client: httpx.AsyncClient, chat: bool, **fields: Any) -> httpx.Response:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"messages": HELLO} if chat else {"prompt": "hi"}
    response = await client.post(path, json={"model": "tiny"} | body | fields)
    assert response.status_code == 200, response.text
    return response


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a finished stream, which must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    *chunks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: ") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def shared(chunks: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {
        (one["id"], one["created"], one["model"], one["object"], one["system_fingerprint"]) for one in chunks
    }


async def test_a_completion(client: httpx.AsyncClient) -> None:
    body = (await ask(client, False)).json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "lmx-01234567-base",
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_a_chat_completion_of_an_adapter(client: httpx.AsyncClient, stand: Stand) -> None:
    response = await ask(client, True, model="tiny:pirate")
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "pirate")
    assert body["system_fingerprint"] == "lmx-01234567-a1b2c3d4e5f6"
    message = {"role": "assistant", "content": "Hello world", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert response.headers["x-adapter-generation"] == "a1b2c3d4e5f60718"
    adapter = stand.engine.calls[0].adapter
    assert adapter is not None
    assert (adapter.generation, adapter.path) == ("a1b2c3d4e5f60718", "/store/a1b2c3d4e5f60718")
    assert stand.adapters.leased == []


@pytest.mark.parametrize("chat", [False, True])
async def test_finish_reason_length(client: httpx.AsyncClient, stand: Stand, chat: bool) -> None:
    stand.engine.script = stand.engine.saying("Hello world", finish="length")
    body = (await ask(client, chat)).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_a_streamed_chat(client: httpx.AsyncClient) -> None:
    response = await ask(client, True, stream=True, model="pirate")
    chunks = events(response)
    assert len(shared(chunks)) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert response.headers["x-adapter-generation"] == "a1b2c3d4e5f60718"
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


async def test_a_streamed_completion(client: httpx.AsyncClient) -> None:
    chunks = events(await ask(client, False, stream=True))
    assert len(shared(chunks)) == 1
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hello", " world", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]


@pytest.mark.parametrize("chat", [False, True])
async def test_usage_in_a_last_chunk_of_its_own(client: httpx.AsyncClient, chat: bool) -> None:
    options = {"include_usage": True}
    chunks = events(await ask(client, chat, stream=True, stream_options=options))
    whole = (await ask(client, chat)).json()
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert len(shared(chunks)) == 1


async def test_usage_in_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await ask(client, False, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_many_prompts_and_choices(client: httpx.AsyncClient, stand: Stand, stream: bool) -> None:
    def by_index(call: Call) -> Iterable[TokenOutput | Exception | float]:
        words = ["Hello", " world", "Hello world", " this"]
        index = int(call.request_id.rpartition("-")[2])
        for output in stand.engine.saying(words[index])(call):
            if isinstance(output, TokenOutput) and index % 2:
                output.cached_tokens = 100  # a second choice finds the whole prompt in the cache
            yield output

    stand.engine.script = by_index
    fields = {"prompt": [[5, 6], [7, 8, 9]], "n": 2, "seed": 40}
    if stream:
        options = {"include_usage": True}
        chunks = events(await ask(client, False, stream=True, stream_options=options, **fields))
        texts = [""] * 4
        for chunk in chunks[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        usage = chunks[-1]["usage"]
    else:
        body = (await ask(client, False, **fields)).json()
        texts = [choice["text"] for choice in body["choices"]]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        usage = body["usage"]
    assert texts == ["Hello", " world", "Hello world", " this"]
    calls = stand.engine.calls
    assert sorted((call.prompt[0], call.params.seed or 0) for call in calls) == [
        (5, 40),
        (5, 41),
        (7, 40),
        (7, 41),
    ]
    assert len({call.request_id for call in calls}) == 4
    assert usage["prompt_tokens"] == 5
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4
    assert usage["completion_tokens"] == 2 + 2 + 3 + 2


@pytest.mark.parametrize("prompt", ["hi", [73, 74], ["hi"], [[73, 74]]])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: httpx.AsyncClient, prompt: Any, stream: bool) -> None:
    response = await ask(client, False, prompt=prompt, echo=True, stream=stream)
    answers = events(response) if stream else [response.json()]
    assert "".join(answer["choices"][0]["text"] for answer in answers) == "hiHello world"


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, False, logprobs=3)).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["Hello", " world"]
    assert whole["token_logprobs"] == [-0.5, -0.5]
    assert whole["text_offset"] == [0, 5]
    assert whole["top_logprobs"][0] == {"Hello": -0.5, "$": -9999.0, "%": -3.0}
    chunks = events(await ask(client, False, logprobs=0, stream=True))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [item["tokens"] for item in streamed] == [["Hello"], [" world"], []]
    assert [item["text_offset"] for item in streamed] == [[0], [5], []]
    assert streamed[0]["top_logprobs"] == [{"Hello": -0.5}]


async def test_chat_logprobs(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, True, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    assert whole["refusal"] is None
    assert [entry["token"] for entry in whole["content"]] == ["Hello", " world"]
    assert whole["content"][0]["bytes"] == list(b"Hello")
    assert whole["content"][0]["top_logprobs"][1] == {"token": "$", "logprob": -9999.0, "bytes": [36]}
    chunks = events(await ask(client, True, logprobs=True, stream=True))
    assert [bool(chunk["choices"][0]["logprobs"]) for chunk in chunks] == [False, True, True, False]
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_logprobs_of_a_torn_character_name_its_bytes(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.engine.script = stand.engine.saying("☃")
    content = (await ask(client, True, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "☃"
    # In a stream they come with the text they belong to, and nothing comes without text.
    plain = events(await ask(client, False, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in plain] == ["☃", ""]
    chunks = events(await ask(client, True, logprobs=True, stream=True))
    assert chunks[1]["choices"][0]["delta"] == {"content": "☃"}
    assert len(chunks[1]["choices"][0]["logprobs"]["content"]) == 3


class TestStop:
    @pytest.mark.parametrize(
        ("stop", "text"),
        [
            ("o w", "Hell"),
            (["zzz", "wor"], "Hello "),
            ("Hello", ""),
            ("worlds", "Hello world"),
            (["d", "ld"], "Hello wor"),
        ],
    )
    @pytest.mark.parametrize("chat", [False, True])
    async def test_text_ends_before_it(
        self, client: httpx.AsyncClient, stand: Stand, chat: bool, stop: Any, text: str
    ) -> None:
        body = (await ask(client, chat, stop=stop)).json()["choices"][0]
        assert (body["message"]["content"] if chat else body["text"]) == text
        assert body["finish_reason"] == "stop"
        chunks = events(await ask(client, chat, stop=stop, stream=True))
        choices = [chunk["choices"][0] for chunk in chunks]
        parts = [choice["delta"].get("content", "") if chat else choice["text"] for choice in choices]
        assert "".join(parts) == text
        assert choices[-1]["finish_reason"] == "stop"
        assert "" not in parts[1:-1]

    async def test_the_engine_is_told_to_stop(self, client: httpx.AsyncClient, stand: Stand) -> None:
        stand.engine.script = stand.engine.saying("Hello world, this is a small test", finish="length")
        body = (await ask(client, False, stop=" world", logprobs=0)).json()
        call = stand.engine.calls[0]
        assert (call.outputs, call.closed_early) == (2, True)
        assert body["usage"]["completion_tokens"] == 2
        assert body["choices"][0]["logprobs"]["tokens"] == ["Hello"]

    async def test_a_sequence_that_ends_by_itself_is_not_closed_early(
        self, client: httpx.AsyncClient, stand: Stand
    ) -> None:
        await ask(client, False)
        await ask(client, False, stream=True, n=2)
        assert not any(call.closed_early for call in stand.engine.calls)

    async def test_not_before_min_tokens(self, client: httpx.AsyncClient, stand: Stand) -> None:
        stand.engine.script = stand.engine.saying("Hello Hello Hello", finish="length")
        tokens = len(stand.tokenizer.encode("Hello Hello"))
        body = (await ask(client, False, stop="Hello", min_tokens=tokens)).json()
        assert body["choices"][0]["text"] == "Hello Hello "

    async def test_the_end_token_is_no_text(self, client: httpx.AsyncClient, stand: Stand) -> None:
        def ends_with_a_word(call: Call) -> list[TokenOutput]:
            hello, world = stand.tokenizer.encode("Hello world")
            return [TokenOutput(call.request_id, [hello, world], finish="stop")]

        stand.engine.script = ends_with_a_word
        body = (await ask(client, False, stop_token_ids=[1])).json()
        assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == ("Hello", 2)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"stop": "wor"}, {"stop": "o w", "logprobs": 0}])
@pytest.mark.parametrize("stream", [False, True])
async def test_several_tokens_in_an_output_are_as_good_as_one_each(
    client: httpx.AsyncClient, stand: Stand, stream: bool, fields: dict[str, Any]
) -> None:
    """As a server with drafts gives them: the same text, scores, usage and finish, stop strings in between included."""
    one_each = stand.engine.saying("Hello world, this is Grüße 😀")

    def by_three(call: Call) -> list[TokenOutput]:
        single = list(one_each(call))
        joined = []
        for first in range(0, len(single), 3):
            group = single[first : first + 3]
            scores = [score for one in group if isinstance(one, TokenOutput) for score in one.logprobs or []]
            tokens = [token for one in group if isinstance(one, TokenOutput) for token in one.tokens]
            last = group[-1]
            assert isinstance(last, TokenOutput)
            joined.append(TokenOutput(call.request_id, tokens, last.finish, scores or None, cached_tokens=2))
        return joined

    answers = []
    for script in (one_each, by_three):
        stand.engine.script = script
        response = (
            await ask(client, False, stream=stream, stream_options={"include_usage": True}, **fields)
            if stream
            else await ask(client, False, **fields)
        )
        chunks = events(response) if stream else [response.json()]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        scores = [value for one in choices if one["logprobs"] for value in one["logprobs"]["token_logprobs"]]
        answers.append(
            (
                "".join(one["text"] for one in choices),
                scores,
                choices[-1]["finish_reason"],
                chunks[-1]["usage"],
            )
        )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_is_scored(client: httpx.AsyncClient, stand: Stand, stream: bool) -> None:
    """One entry for each token, the end token's too: whoever counts from the prompt's length finds the answer."""
    prompt = stand.tokenizer.encode("Grüße <|im_end|> you")
    response = await ask(
        client, False, prompt=[prompt, [5]], echo=True, logprobs=1, n=2, max_tokens=4, stream=stream
    )
    parts: list[dict[str, Any]] = [{} for _ in range(4)]
    texts = [""] * 4
    for chunk in events(response) if stream else [response.json()]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            for name, values in choice["logprobs"].items():
                parts[choice["index"]].setdefault(name, []).extend(values)
    words = ["Grüße  you", "Grüße  you", stand.tokenizer.decode([5]), stand.tokenizer.decode([5])]
    for index, logprobs in enumerate(parts):
        tokens = prompt if index < 2 else [5]
        assert texts[index] == words[index] + "Hello world"
        scores = [None, *(-float(place) for place in range(1, len(tokens)))]
        answer = stand.tokenizer.encode("Hello world<|im_end|>")
        assert logprobs["token_logprobs"] == [*scores, *[-0.5] * len(answer)]
        assert logprobs["top_logprobs"][0] is None
        assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == len(tokens) + len(answer)
        assert logprobs["text_offset"][len(tokens)] == len(words[index])
        if index < 2:
            assert logprobs["top_logprobs"][1][logprobs["tokens"][1]] == -1.0
            assert logprobs["tokens"][1:][logprobs["tokens"][1:].index("<|im_end|>")] == "<|im_end|>"


@pytest.mark.parametrize("stream", [False, True])
async def test_max_tokens_0_only_scores(client: httpx.AsyncClient, stand: Stand, stream: bool) -> None:
    tokens = stand.tokenizer.encode("Grüße you")
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await ask(client, False, prompt=tokens, echo=True, logprobs=1, max_tokens=0, n=2, **options)
    chunks = events(response) if stream else [response.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == "Grüße you"
        assert own[-1]["finish_reason"] == "length"
        scores = [score for choice in own for score in choice["logprobs"]["token_logprobs"]]
        assert scores == [None, *(-float(place) for place in range(1, len(tokens)))]
    assert chunks[-1]["usage"]["completion_tokens"] == 0
    assert {call.params.max_tokens for call in stand.engine.calls} == {1}


async def test_the_best_answers_are_returned(client: httpx.AsyncClient, stand: Stand) -> None:
    texts = ["one", "two", "three", "four"]

    def script(call: Call) -> list[TokenOutput]:
        place = int(call.request_id.rpartition("-")[2])
        assert call.params.logprobs == 0
        outputs = stand.engine.saying(texts[place % 4])(call)
        for output in outputs:
            assert isinstance(output, TokenOutput)
            output.logprobs = [TokenLogprobs(-1.0 * [3, 1, 4, 2][place % 4], [])]
        return outputs  # type: ignore[return-value]

    stand.engine.script = script
    answer = (await ask(client, False, prompt=["a", "b"], n=2, best_of=4)).json()
    assert [(one["index"], one["text"]) for one in answer["choices"]] == [
        (0, "two"),
        (1, "four"),
        (2, "two"),
        (3, "four"),
    ]
    assert answer["choices"][0]["logprobs"] is None
    generated = 2 * sum(len(stand.tokenizer.encode(text)) + 1 for text in texts)
    assert answer["usage"]["completion_tokens"] == generated


@pytest.mark.parametrize("chat", [False, True])
async def test_prompt_logprobs(client: httpx.AsyncClient, stand: Stand, chat: bool) -> None:
    answer = (await ask(client, chat, prompt_logprobs=2)).json()
    given = answer["prompt_logprobs"] if chat else answer["choices"][0]["prompt_logprobs"]
    prompt = stand.engine.calls[0].prompt
    assert given[0] is None
    assert len(given) == len(prompt)
    name = stand.tokenizer.decode([5])
    for place, (token, entry) in enumerate(zip(prompt[1:], given[1:], strict=True), 1):
        assert entry[str(token)]["logprob"] == -float(place)
        assert entry[str(token)]["rank"] == place
        if token != 5:
            assert entry["5"] == {"logprob": -0.25, "rank": 1, "decoded_token": name}
    plain = (await ask(client, chat)).json()
    assert "prompt_logprobs" not in plain
    assert "prompt_logprobs" not in plain["choices"][0]
