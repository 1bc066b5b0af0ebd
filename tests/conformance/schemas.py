"""Random JSON schemas on the real server: whatever the model is, an answer that ends by itself matches its schema."""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any

import httpx
import jsonschema

from tests.conformance.environment import Environment
from tests.conformance.outcome import Outcome
from tests.server.schemas import random_schema

COUNT = 1000
SEED = 0
_AT_ONCE = 16
_MAX_TOKENS = 400
_PROMPT = "Fill in the form."
_MODELS = ("demo", "pirate")


def run_schemas(url: str, _: Environment) -> Outcome:
    return answers_to_schemas(url)


def answers_to_schemas(url: str, count: int = COUNT, seed: int = SEED) -> Outcome:
    return asyncio.run(_run(url, count, seed))


async def _run(url: str, count: int, seed: int) -> Outcome:
    random = Random(seed)
    schemas = [random_schema(random) for _ in range(count)]
    outcome = Outcome(figures={"schemas": count, "seed": seed})
    gate = asyncio.Semaphore(_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(number: int, schema: dict[str, Any]) -> None:
            async with gate:
                text, finished = await _ask(client, number, schema)
            if not finished:
                outcome.skipped[f"schema {number}"] = "cut off by the limit of tokens"
                return
            try:
                jsonschema.validate(json.loads(text), schema)
                outcome.passed += 1
            except (ValueError, jsonschema.ValidationError) as error:
                outcome.failures[f"schema {number}"] = (
                    f"{text[:100]!r} for {json.dumps(schema)[:150]}: {error}"
                )

        async with asyncio.TaskGroup() as tasks:
            for number, schema in enumerate(schemas):
                tasks.create_task(one(number, schema))
    outcome.figures["finished"] = outcome.passed + len(outcome.failures)
    return outcome


async def _ask(client: httpx.AsyncClient, number: int, schema: dict[str, Any]) -> tuple[str, bool]:
    """The answer and whether it ended by itself; a refusal matches nothing. Models and routes take turns."""
    common = {"model": _MODELS[number % 2], "seed": number}
    if number % 3 == 0:
        format_ = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
        body = {**common, "input": _PROMPT, "text": format_, "max_output_tokens": _MAX_TOKENS, "store": False}
        response = await client.post("/v1/responses", json=body)
    else:
        messages = [{"role": "user", "content": _PROMPT}]
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        body = {**common, "messages": messages, "response_format": wanted, "max_tokens": _MAX_TOKENS}
        response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        return response.text, True
    answer = response.json()
    if number % 3 == 0:
        return answer["output"][0]["content"][0]["text"], answer["status"] == "completed"
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["finish_reason"] == "stop"
