"""What a request may say: types, ranges, what is refused by name, what is passed to the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from loramux_server.api.protocol import UNSUPPORTED_CHAT, UNSUPPORTED_COMPLETION
from tests.api.conftest import MAX_MODEL_LEN, Stand

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


async def completion(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(COMPLETIONS, json={"model": "tiny", "prompt": "hi"} | fields)


async def chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(CHAT, json={"model": "tiny", "messages": HELLO} | fields)


async def refused(response: httpx.Response, param: str | None, code: str = "invalid_request") -> str:
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert (error["param"], error["code"]) == (param, code), error
    return str(error["message"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("n", 0),
        ("n", 129),
        ("n", "2"),
        ("n", 1.0),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", [1]),
        ("max_tokens", int("9" * 4300)),
        ("min_tokens", int("9" * 4300)),
        ("min_tokens", -1),
        ("ignore_eos", 1),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("seed", 2**63),
        ("seed", 10**40),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", []),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"-1": 1}),
        ("stop", 1),
        ("stop", ""),
        ("stop", "x" * 257),
        ("stop", ["a"] * 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "1"),
        ("cache_salt", ""),
        ("cache_salt", 1),
        ("cache_salt", "x" * 257),
        ("priority", "1"),
        ("priority", 2**31),
        ("priority", 1.0),
        ("stream", "true"),
        ("user", 1),
        ("metadata", {"a": 1}),
        ("model", 1),
        ("model", None),
        ("model", ""),
    ],
)
@pytest.mark.parametrize("ask", [completion, chat])
async def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    client: httpx.AsyncClient, ask: Any, field: str, value: object
) -> None:
    error = (await ask(client, **{field: value})).json()["error"]
    assert error["param"].partition("[")[0].partition(".")[0] == field
    assert error["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", 1, "prompt"),
        ("prompt", None, "prompt"),
        ("prompt", {}, "prompt"),
        ("prompt", [], "prompt"),
        ("prompt", "", "prompt"),
        ("prompt", ["a", ""], "prompt[1]"),
        ("prompt", ["a", 1], "prompt[1]"),
        ("prompt", [1, "a"], "prompt[1]"),
        ("prompt", [1, True], "prompt[1]"),
        ("prompt", [True], "prompt[0]"),
        ("prompt", [1, -1], "prompt[1]"),
        ("prompt", [1, 10**30], "prompt[1]"),
        ("prompt", [[1], []], "prompt[1]"),
        ("prompt", [[1], [2, "a"]], "prompt[1][1]"),
        ("prompt", [[1], [100_000]], "prompt[1]"),
        ("prompt", [None], "prompt[0]"),
        ("logprobs", 6, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("best_of", 21, "best_of"),
        ("stop", ["a", ""], "stop[1]"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
    ],
)
async def test_completion_faults_have_a_path(
    client: httpx.AsyncClient, field: str, value: object, param: str
) -> None:
    await refused(await completion(client, **{field: value}), param)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([*HELLO, {"role": "robot", "content": "x"}], "messages[1].role"),
        ([*HELLO, {"role": "user"}], "messages[1].content"),
        ([*HELLO, {"role": "user", "content": 3}], "messages[1].content"),
        ([*HELLO, {"role": "user", "content": ["x"]}], "messages[1].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": 1}]}], "messages[0].content[0].type"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}],
                }
            ],
            "messages[0].tool_calls",
        ),
    ],
)
async def test_message_faults_have_a_path(client: httpx.AsyncClient, messages: object, param: str) -> None:
    await refused(await chat(client, messages=messages), param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content[0].type"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
    ],
)
async def test_what_messages_cannot_carry_is_named(
    client: httpx.AsyncClient, message: object, param: str
) -> None:
    await refused(
        await chat(client, messages=[*HELLO, message]), f"messages[1].{param}", "unsupported_parameter"
    )


REFUSED = {
    "functions": [{"name": "f"}],
    "function_call": "f",
    "audio": {"voice": "x"},
    "moderation": {"model": "x"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "store": True,
    "guided_json": {},
    "skip_special_tokens": False,
    "return_token_ids": True,
    "prompt_embeds": "AAAA",
    "echo": True,
    "chat_template": "x",
}


@pytest.mark.parametrize("field", REFUSED)
async def test_what_we_cannot_honour_is_refused_by_name(client: httpx.AsyncClient, field: str) -> None:
    assert field in UNSUPPORTED_COMPLETION or field in UNSUPPORTED_CHAT
    for ask, known in ((completion, UNSUPPORTED_COMPLETION), (chat, UNSUPPORTED_CHAT)):
        if field in known:
            message = await refused(
                await ask(client, **{field: REFUSED[field]}), field, "unsupported_parameter"
            )
            assert field in message
            assert (await ask(client, **{field: None})).status_code == 200
            for neutral in known[field]:
                response = await ask(client, **{field: neutral})
                assert response.status_code == 200
                assert "x-loramux-ignored-fields" not in response.headers


async def test_combinations_that_make_no_sense(client: httpx.AsyncClient) -> None:
    await refused(
        await completion(client, stream_options={"include_usage": True}), "stream_options", "invalid_request"
    )
    await refused(await completion(client, n=3, best_of=2), "best_of")
    await refused(await completion(client, best_of=2, stream=True), "best_of")
    await refused(await completion(client, prompt=["a"] * 20, best_of=20), "n")
    await refused(await completion(client, prompt_logprobs=1, stream=True), "prompt_logprobs")
    await refused(await completion(client, min_tokens=5, max_tokens=4), "min_tokens")
    await refused(await chat(client, top_logprobs=3), "top_logprobs")
    await refused(await completion(client, prompt=["a"] * 2, n=65), "n")
    await refused(await completion(client, prompt=["a"] * 129), "prompt")
    for fields in ({"best_of": 1}, {"n": 3, "best_of": 3}, {"n": 3, "best_of": 0}, {"n": 128}):
        assert (await completion(client, **fields)).status_code == 200


async def test_unknown_fields_are_accepted_and_listed(client: httpx.AsyncClient) -> None:
    response = await chat(
        client, foo=1, **{"b\n,ä": 2}, messages=[{"role": "user", "content": "x", "annotations": []}]
    )
    assert response.status_code == 200
    assert response.headers["x-loramux-ignored-fields"] == "foo, b???, messages[].annotations"
    streamed = await completion(client, stream=True, stream_options={"x": 1})
    assert streamed.headers["x-loramux-ignored-fields"] == "stream_options.x"
    part = {"type": "text", "text": "x", "cache_control": {}}
    nested = await chat(
        client,
        messages=[{"role": "user", "content": [part, part]}],
        response_format={"type": "text", "a": 1, "json_schema": {"b": 2}},
        structured_outputs={"choice": ["x"], "c": 3},
    )
    assert nested.headers["x-loramux-ignored-fields"] == (
        "structured_outputs.c, response_format.a, response_format.json_schema.b, messages[].content[].cache_control"
    )


async def test_all_of_a_tool_is_the_templates(client: httpx.AsyncClient, stand: Stand) -> None:
    """What we do not know of it is given to the model, so it is not ignored."""
    stand.engine.max_model_len = 2048
    response = await chat(client, tools=[{"type": "function", "function": {"name": "f", "returns": "x"}}])
    assert '"returns": "x"' in stand.tokenizer.decode(stand.engine.calls[0].prompt)
    assert "x-loramux-ignored-fields" not in response.headers


async def test_every_parameter_reaches_the_engine(client: httpx.AsyncClient, stand: Stand) -> None:
    await completion(
        client,
        max_tokens=9,
        temperature=0,
        top_p=0,
        top_k=5,
        min_p=0.1,
        seed=-7,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={"7": -100, "8": 1.5},
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3, 4],
        logprobs=2,
        cache_salt="ours",
    )
    params = stand.engine.calls[0].params
    assert (params.max_tokens, params.temperature, params.top_k, params.min_p) == (9, 0.0, 5, 0.1)
    assert (params.seed, params.presence_penalty, params.frequency_penalty) == (-7, 0.5, -0.5)
    assert (params.repetition_penalty, params.logit_bias) == (1.1, {7: -100.0, 8: 1.5})
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (2, True, (3, 4))
    assert (params.logprobs, params.cache_salt) == (2, "ours")
    assert 0 < params.top_p < 0.001


@pytest.mark.parametrize("ask", [completion, chat])
async def test_priorities_are_for_servers_that_honour_them(
    ask: Callable[..., Awaitable[httpx.Response]], client: httpx.AsyncClient, stand: Stand
) -> None:
    await ask(client, priority=0)
    assert stand.engine.calls[-1].params.priority == 0
    assert "--scheduling-policy priority" in await refused(await ask(client, priority=-3), "priority")
    stand.engine.scheduling_policy = "priority"
    await ask(client, priority=-3)
    assert stand.engine.calls[-1].params.priority == -3


async def test_defaults_are_openais(client: httpx.AsyncClient, stand: Stand) -> None:
    await completion(client, top_k=-1)
    await chat(client)
    await chat(client, max_tokens=7, max_completion_tokens=5, logprobs=True)
    plain, talk, limited = (call for call in stand.engine.calls)
    assert (plain.params.max_tokens, plain.params.temperature, plain.params.top_k) == (16, 1.0, 0)
    assert (plain.params.logprobs, plain.params.seed, plain.params.cache_salt) == (None, None, None)
    assert talk.params.max_tokens == MAX_MODEL_LEN - len(talk.prompt)
    assert (limited.params.max_tokens, limited.params.logprobs) == (5, 0)
