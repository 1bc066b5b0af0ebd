"""Random JSON schemas on the real server: whatever the model is, an answer that ends by itself matches its schema.

What a schema came to is written down as soon as its answer is there, so that a run which was interrupted can go on: the
schemas, and the seeds of their answers, depend on their numbers alone. Says nothing about answers that the limit cut off.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
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
_VALID, _CUT_OFF = "valid", "cut off"  # what a schema may come to; anything else is what was wrong
_FEWEST_FINISHED = 0.9


def run_schemas(url: str, environment: Environment) -> Outcome:
    """Goes on with what an interrupted run left if the environment says so."""
    journal = environment.folder / "answered.jsonl"
    if not environment.resume:
        journal.unlink(missing_ok=True)
    outcome = answers_to_schemas(url, journal=journal)
    outcome.figures |= {name: version(name) for name in ("loramux", "llguidance", "jsonschema")}
    return outcome


def answers_to_schemas(
    url: str, count: int = COUNT, seed: int = SEED, journal: Path | None = None
) -> Outcome:
    results = _answered(journal, seed)

    def note(number: int, result: str) -> None:
        results[number] = result
        if journal is not None:
            with journal.open("a") as file:
                file.write(json.dumps({"seed": seed, "number": number, "result": result}) + "\n")

    asyncio.run(_run(url, count, seed, skip=set(results), note=note))
    return _outcome(results, seed)


def _answered(journal: Path | None, seed: int) -> dict[int, str]:
    """Of schemas of this seed, from an earlier run."""
    if journal is None or not journal.is_file():
        return {}
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return {line["number"]: line["result"] for line in lines if line["seed"] == seed}


async def _run(url: str, count: int, seed: int, skip: set[int], note: Callable[[int, str], None]) -> None:
    random = Random(seed)
    schemas = [random_schema(random) for _ in range(count)]
    gate = asyncio.Semaphore(_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(number: int, schema: dict[str, Any]) -> None:
            async with gate:
                text, finished = await _ask(client, number, schema)
            note(number, _judge(text, schema) if finished else _CUT_OFF)

        async with asyncio.TaskGroup() as tasks:
            for number, schema in enumerate(schemas):
                if number not in skip:
                    tasks.create_task(one(number, schema))


def _judge(text: str, schema: dict[str, Any]) -> str:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text[:100]!r} for {json.dumps(schema)[:150]}: {error}"
    return _VALID


def _outcome(results: dict[int, str], seed: int) -> Outcome:
    """Few answers may be cut off, or next to nothing was shown."""
    kinds = [results[number] for number in sorted(results)]
    cut_off = kinds.count(_CUT_OFF)
    outcome = Outcome(passed=kinds.count(_VALID))
    outcome.failures = {
        f"schema {number}": results[number]
        for number in sorted(results)
        if results[number] not in (_VALID, _CUT_OFF)
    }
    finished = len(kinds) - cut_off
    outcome.figures = {"schemas": len(kinds), "seed": seed, "finished": finished, "cut_off": cut_off}
    if finished < _FEWEST_FINISHED * len(kinds):
        outcome.failures["finished"] = f"only {finished} of {len(kinds)} answers ended by themselves"
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
