"""Every error has one shape, on every route, before and after a stream began."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from loramux_adapters import errors
from loramux_adapters.errors import (
    AdapterUnavailable,
    EngineError,
    LoramuxError,
    NameTaken,
    Overloaded,
    QueueFull,
)
from loramux_server.api.errors import FINAL, STATUSES, reply_to
from loramux_server.engine.messages import TokenOutput
from tests.api.conftest import Call, Stand

PROMPT = {"model": "tiny", "prompt": "hi"}
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def envelope(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, dict[str, Any]] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body["error"]


def tree(cls: type[LoramuxError]) -> list[type[LoramuxError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in tree(child))]


def test_every_exception_has_a_status() -> None:
    for cls in tree(LoramuxError):
        error = cls.__new__(cls)
        LoramuxError.__init__(error, "what happened")
        reply = reply_to(error, "req_1")
        known = any(parent in STATUSES for parent in cls.__mro__)
        assert (reply.status == 500) != known
        assert ("retry-after" in reply.headers) == (reply.status in (429, 503))
        # What is our own fault may hold paths; only its id leaves the house.
        assert ("what happened" in reply.error.message) == known


def test_a_conflict_is_answered_409_only_where_clients_are_told_not_to_repeat() -> None:
    assert [error for error, (status, _) in STATUSES.items() if status == 409] == [NameTaken]
    assert NameTaken in FINAL
    reply = reply_to(NameTaken("name: 'x' is taken; choose another name", param="name"), "req_1")
    assert (reply.status, reply.headers["x-should-retry"]) == (409, "false")
    assert reply_to(errors.AdapterConflict("taken"), "").status == 400


def test_a_retry_hint_is_passed_on() -> None:
    error = Overloaded("full")
    error.retry_after = 2.1  # type: ignore[attr-defined]
    assert reply_to(error, "").headers["retry-after"] == "3"


def routes(stand: Stand) -> list[tuple[str, set[str]]]:
    """All of them, so that a new one is held to this too. /metrics is not in the document."""
    paths = {"/metrics": {"get": {}, "head": {}}, **stand.app.openapi()["paths"]}
    assert len(paths) >= 7
    return [(re.sub(r"\{.*?\}", "nobody", path), set(map(str.upper, paths[path]))) for path in paths]


async def test_every_route_answers_a_wrong_method_with_allow(client: httpx.AsyncClient, stand: Stand) -> None:
    for path, methods in routes(stand):
        response = await client.request("PATCH", path)
        assert response.status_code == 405
        assert set(response.headers["allow"].split(", ")) == methods
        assert envelope(response)["code"] == "method_not_allowed"


async def test_every_route_answers_nonsense_with_the_envelope(
    client: httpx.AsyncClient, stand: Stand
) -> None:
    stand.engine.not_ready = EngineError("the base model is still loading")
    stand.engine.state = "starting"
    for path, methods in routes(stand):
        if "POST" in methods:
            response = await client.post(path, json={})
            assert response.status_code == 400
            assert envelope(response)["param"]
        elif path not in ("/version", "/metrics", "/health"):
            response = await client.get(path)
            assert response.status_code == (404 if "nobody" in path else 503)
            envelope(response)


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/models/", "/v1/chat/completions/", "/v1/embeddings", "/docs"]
)
async def test_unknown_routes(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert envelope(response)["type"] == "invalid_request_error"


async def test_an_unknown_model_never_falls_back(client: httpx.AsyncClient, stand: Stand) -> None:
    for name in (
        "nobody",
        "tiny:nobody",
        "tiny@a1b2c3d4",
        "pirate@00000000",
        "PIRATE",
        "tiny:tiny",
        "x" * 5000,
    ):
        for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", HELLO)):
            response = await client.post(path, json=body | {"model": name})
            error = envelope(response)
            assert response.status_code == 404
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert len(error["message"]) < 400
    assert stand.engine.calls == []


async def test_a_full_engine_refuses_before_it_reads_the_body(stand: Stand) -> None:
    stand.engine.full = QueueFull("the queue is full")
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    transport = httpx.ASGITransport(app=stand.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
            response = await client.post(path, content=body())
            assert (response.status_code, envelope(response)["code"]) == (503, "queue_full")
            assert response.headers["retry-after"] == "1"
        assert read == 0
        assert (await client.post("/tokenize", json={"prompt": "Hello"})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (Overloaded("16 uploads are being received already"), 429, "overloaded", "1"),
        (QueueFull("the queue is full"), 503, "queue_full", "1"),
        (EngineError("restarting"), 503, "engine_unavailable", "5"),
        (AdapterUnavailable("no room"), 503, "adapter_unavailable", "5"),
    ],
)
async def test_an_engine_that_does_not_accept(
    client: httpx.AsyncClient,
    stand: Stand,
    stream: bool,
    error: LoramuxError,
    status: int,
    code: str,
    retry: str,
) -> None:
    stand.engine.script = lambda call: [error]
    for path, body in (("/v1/completions", PROMPT | {"n": 2}), ("/v1/chat/completions", HELLO)):
        response = await client.post(path, json=body | {"stream": stream, "model": "pirate"})
        assert (response.status_code, envelope(response)["code"]) == (status, code)
        assert response.headers["retry-after"] == retry
    assert stand.adapters.leased == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [("adapter_unavailable", 503), ("overloaded", 429), ("invalid_request", 400), ("anything_else", 503)],
)
async def test_a_sequence_that_the_engine_ends_with_an_error(
    client: httpx.AsyncClient, stand: Stand, stream: bool, code: str, status: int
) -> None:
    def fails(call: Call) -> list[TokenOutput]:
        return [TokenOutput(call.request_id, [], finish="error", error="no slot", error_code=code)]

    stand.engine.script = fails
    response = await client.post("/v1/completions", json=PROMPT | {"stream": stream})
    error = envelope(response)
    assert (response.status_code, error["message"], error["code"]) == (status, "no slot", code)


async def test_an_engine_that_ends_without_finishing(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.engine.script = lambda call: [TokenOutput(call.request_id, [5])]
    response = await client.post("/v1/completions", json=PROMPT)
    assert (response.status_code, envelope(response)["code"]) == (503, "engine_unavailable")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("error", "code"),
    [(EngineError("the worker died"), "engine_unavailable"), (ValueError("x"), "internal_error")],
)
async def test_an_error_after_the_stream_began_is_an_event(
    client: httpx.AsyncClient, stand: Stand, n: int, error: Exception, code: str
) -> None:
    stand.engine.script = lambda call: [TokenOutput(call.request_id, [5]), error]
    body = HELLO | {"stream": True, "model": "pirate", "n": n}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert end == ""
    assert "[DONE]" not in response.text
    assert stand.adapters.leased == []


async def test_a_fault_of_ours_says_nothing_but_its_id(
    client: httpx.AsyncClient, stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    stand.engine.script = lambda call: [ZeroDivisionError("/secret/path")]
    with caplog.at_level(logging.ERROR):
        response = await client.post("/v1/completions", json=PROMPT, headers={"x-request-id": "mine"})
    error = envelope(response)
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in response.text
    assert "mine" in error["message"]
    assert "/secret/path" in caplog.text  # with its traceback, in the log
    assert 'request_errors_total{code="internal_error"} 1.0' in stand.metrics.render("")[0].decode()


async def test_request_ids_are_echoed_if_harmless(client: httpx.AsyncClient) -> None:
    for given, kept in (("abc-1", True), ("x" * 129, False), ("a b", False), ("", False)):
        response = await client.get("/version", headers={"x-request-id": given})
        assert (response.headers["x-request-id"] == given) == kept
    made = response.headers["x-request-id"]
    assert re.fullmatch(r"req_[0-9a-f]{32}", made)
    assert response.headers["openai-version"] == "2020-10-01"
    assert response.headers["openai-processing-ms"].isdigit()
