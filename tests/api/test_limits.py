"""Every list, text and number of a request has a bound, and a body a pace: one sentence each, naming the field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from loramux_server.api import pace
from loramux_server.api.pace import MIN_RATE, BodyTimeout, paced
from loramux_server.api.protocol import MAX_MESSAGES, MAX_PARTS
from loramux_server.engine.messages import TokenOutput
from tests.api.conftest import Call, Stand

LIMITS: list[tuple[str, object, object]] = [  # field, the most that is accepted, what is not
    ("n", 128, 129),
    ("stop", ["a", "b", "c", "d"], ["a", "b", "c", "d", "e"]),
    ("stop", "x" * 256, "x" * 257),
    ("stop_token_ids", [1] * 64, [1] * 65),
    ("logit_bias", {str(n): 0 for n in range(200)}, {str(n): 0 for n in range(1025)}),
    ("prompt", ["x"] * 128, ["x"] * 129),
    ("logprobs", 5, 6),
    ("best_of", 20, 21),
    ("cache_salt", "x" * 256, "x" * 257),
]


@pytest.mark.parametrize(
    ("field", "most", "more"), LIMITS, ids=[f"{limit[0]}-{place}" for place, limit in enumerate(LIMITS)]
)
async def test_a_bound(client: httpx.AsyncClient, field: str, most: object, more: object) -> None:
    plain = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    accepted = await client.post("/v1/completions", json=plain | {field: most})
    assert accepted.status_code == 200, accepted.text
    refused = await client.post("/v1/completions", json=plain | {field: more})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert str(error["param"]).startswith(field)
    assert field in error["message"]
    assert len(error["message"]) < 300, "the input is repeated"


def _said(parts: int) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "text", "text": ""}] * parts}


@pytest.mark.parametrize(
    ("messages", "where"),
    [([_said(1)] * (MAX_MESSAGES + 1), ""), ([_said(MAX_PARTS + 1)], "[0].content")],
    ids=["messages", "parts"],
)
async def test_what_a_conversation_is_made_of_is_bounded(
    client: httpx.AsyncClient, messages: list[dict[str, object]], where: str
) -> None:
    for path, field in (
        ("/v1/chat/completions", "messages"),
        ("/tokenize", "messages"),
        ("/v1/responses", "input"),
    ):
        refused = await client.post(path, json={"model": "tiny", field: messages})
        assert refused.status_code == 400, path
        assert refused.json()["error"]["param"] == field + where
        assert "at most" in refused.json()["error"]["message"]
    most = await client.post("/tokenize", json={"model": "tiny", "messages": [_said(MAX_PARTS)]})
    assert most.status_code == 200, most.text[:300]


async def test_prompts_times_choices_are_bounded_together(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": ["x"] * 16, "n": 8, "max_tokens": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    refused = await client.post("/v1/completions", json=body | {"n": 9})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] in ("n", "prompt")


async def _read(body: AsyncIterator[bytes]) -> int:
    return sum([len(chunk) async for chunk in body])


async def chunks(count: int, size: int, every: float) -> AsyncIterator[bytes]:
    for _ in range(count):
        await asyncio.sleep(every)
        yield b"x" * size


async def test_a_body_that_stops_coming_is_given_up() -> None:
    with pytest.raises(BodyTimeout, match="nothing of the body came for 0.05 seconds"):
        await anext(paced(chunks(3, 10, 30.0), idle_s=0.05))


async def test_a_body_that_trickles_is_given_up() -> None:
    body = paced(chunks(1000, 1, 0.01), idle_s=0.2)
    for _ in range(3):
        await anext(body)  # it is given time
    with pytest.raises(BodyTimeout, match=f"less than {MIN_RATE} bytes a second"):
        await _read(body)


async def test_a_slow_body_that_keeps_coming_is_read() -> None:
    assert await _read(paced(chunks(20, MIN_RATE, 0.02), idle_s=0.05)) == 20 * MIN_RATE


async def test_a_stalled_json_body_is_a_408(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace.paced, "__defaults__", (0.05,))

    async def body() -> AsyncIterator[bytes]:
        yield b'{"model": "tiny", '
        await asyncio.sleep(0.5)
        yield b'"prompt": "x"}'

    transport = httpx.ASGITransport(stand.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {"content-type": "application/json"}
        late = await client.post("/v1/completions", content=body(), headers=headers)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "body_timeout")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long(client: httpx.AsyncClient, stand: Stand, stream: bool) -> None:
    def late(call: Call) -> list[TokenOutput]:
        return [
            *([TokenOutput(call.request_id, [5])] if stream else []),
            TokenOutput(call.request_id, [], "error", error="too late", error_code="request_timeout"),
        ]

    stand.engine.script = late
    body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": stream}
    answer = await client.post("/v1/completions", json=body)
    if stream:
        last = json.loads(answer.text.strip().rpartition("data: ")[2])
        assert (answer.status_code, last["error"]["code"]) == (200, "request_timeout")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        assert answer.headers["x-should-retry"] == "false"
