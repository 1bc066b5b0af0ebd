"""Health, version, the OpenAPI document."""

from __future__ import annotations

import subprocess
import sys

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest

from loramux_server.engine.interface import EngineState
from tests.api.conftest import Stand


async def test_ready_follows_the_engine_and_health_does_not(client: httpx.AsyncClient, stand: Stand) -> None:
    assert (await client.get("/ready")).json() == {"status": "ready"}
    states: list[EngineState] = ["starting", "restarting", "draining", "dead"]
    for state in states:
        stand.engine.state = state
        response = await client.get("/ready")
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert state in response.json()["error"]["message"]
        assert (await client.get("/health")).json() == {"status": "live"}


async def test_a_worker_that_stands_still_is_neither_live_nor_ready(
    client: httpx.AsyncClient, stand: Stand
) -> None:
    stand.engine.stall = "the worker has not moved for 61 s"
    for path in ("/health", "/ready"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == stand.engine.stall


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": "9.9"}


async def test_the_document_describes_bodies_and_answers(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document == (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]

    def conforms(value: object, name: str) -> None:
        jsonschema.validate(
            value, {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        )

    for path, body, answer in (
        ("/v1/completions", "CompletionBody", "Completion"),
        ("/v1/chat/completions", "ChatBody", "ChatCompletion"),
    ):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{body}"}
        values = {
            "model": "tiny",
            "prompt": [[5]],
            "messages": [{"role": "user", "content": "x"}],
            "stop": ["a"],
        }
        conforms(values, body)
        with pytest.raises(jsonschema.ValidationError):
            conforms(values | {"n": 129}, body)
        conforms((await client.post(path, json=values)).json(), answer)
    for path, answer in (
        ("/v1/models", "ModelList"),
        ("/v1/models/pirate", "ModelCard"),
        ("/health", "Health"),
        ("/ready", "Readiness"),
    ):
        conforms((await client.get(path)).json(), answer)
    conforms((await client.get("/v1/models/nobody")).json(), "ErrorEnvelope")


def test_the_http_side_does_not_load_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import loramux_server.api.app, loramux_server.metrics\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
