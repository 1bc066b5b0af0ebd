"""What an answer has to match, as one grammar: response_format, structured_outputs, or forced tool calls.

Promises: what cannot be followed exactly is a 400 with one sentence, never an answer that is only nearly right; checking
happens on a thread and within a time limit. The worker compiles the same text again and follows it (engine/constraints.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from loramux_adapters.errors import RequestError
from loramux_server.api.body import parse_object
from loramux_server.api.protocol import ResponseFormat, SamplingBody, StructuredOutputs

COMPILE_TIMEOUT_S = 5.0
MAX_GRAMMAR_BYTES = 512 * 1024

# Unbounded white space between JSON tokens is a place where small models stay until they are cut off.
WHITE_SPACE = r"[ \n\r\t]{1,24}"
_JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": WHITE_SPACE, "lenient": False}
_AT_ONCE = anyio.CapacityLimiter(2)
# Keywords that compose schemas, so that closing one changes what another means.
_COMPOSING = frozenset(("allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties"))
# By which an object says itself what else it may have.
_OPENING = frozenset(("additionalProperties", "patternProperties", "minProperties", "$ref", "anyOf"))
_PARTS = frozenset(("items", "prefixItems", "additionalProperties", "anyOf"))  # schemas, or lists of them
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))


Build = Callable[[], str]
OfJson = Callable[[dict[str, Any]], str]  # a schema's grammar


def of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(bounded(schema))


async def grammar_of(body: SamplingBody, of_json: OfJson = of_schema) -> str | None:
    """The grammar that the body asks for, checked; None for free text. `of_json` writes it where JSON is asked for."""
    wanted, outputs = body.response_format, body.structured_outputs
    if wanted is not None and wanted.type != "text":
        if outputs is not None:
            raise RequestError(
                "structured_outputs: not together with response_format; give one of them",
                param="structured_outputs",
            )
        return await checked(body, *_of_response_format(wanted, of_json))
    return None if outputs is None else await checked(body, *_of_structured_outputs(outputs, of_json))


async def checked(body: SamplingBody, path: str, build: Build) -> str:
    """The grammar that `build` makes, if it can be followed. `path` is the field that it comes from."""
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise RequestError(
                f"{name}: not together with {path}, which says where the answer ends", param=name
            )
    work = anyio.to_thread.run_sync(_compile, path, build, abandon_on_cancel=True, limiter=_AT_ONCE)
    try:
        return await asyncio.wait_for(work, COMPILE_TIMEOUT_S)
    except TimeoutError:
        raise RequestError(
            f"{path}: takes longer than {COMPILE_TIMEOUT_S:g} seconds to compile; make it simpler", param=path
        ) from None


def _compile(path: str, build: Build) -> str:
    try:
        grammar = build()
    except (ValueError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RequestError(f"{path}: cannot be read: {reason}", param=path) from error
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{path}: is larger than {MAX_GRAMMAR_BYTES} bytes", param=path)
    if fault := LLMatcher.validate_grammar(grammar):
        reason = " ".join(fault.split())[:300]
        raise RequestError(f"{path}: cannot be followed: {reason}", param=path)
    return grammar


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with our options, whatever options it came with, and closed where it may be."""
    closed: Any = schema if _is_composed(schema) else _close(schema)
    return {**closed, "x-guidance": _JSON_OPTIONS}


def _is_composed(value: object) -> bool:
    """Whether objects may get properties from more than one place: then nobody can close them one by one."""
    if isinstance(value, list):
        return any(map(_is_composed, value))
    return isinstance(value, dict) and (
        not _COMPOSING.isdisjoint(value) or any(map(_is_composed, value.values()))
    )


def _close(value: object) -> object:
    """Objects that name their properties get no others unless the schema says so: what is left out of it is not wanted.

    A model that may go on with properties of its own does. What matches the closed schema matches the given one, too.
    """
    if isinstance(value, list):
        return [_close(one) for one in value]
    if not isinstance(value, dict):
        return value
    closed = dict(value)
    for name in _PARTS & value.keys():
        closed[name] = _close(value[name])
    for name in _MAPS & value.keys():
        if isinstance(value[name], dict):
            closed[name] = {key: _close(inner) for key, inner in value[name].items()}
    named = value.get("properties")
    if isinstance(named, dict) and _OPENING.isdisjoint(value):
        required = value.get("required")
        if not isinstance(required, list) or all(name in named for name in required if isinstance(name, str)):
            closed["additionalProperties"] = False
    return closed


def _of_response_format(wanted: ResponseFormat, of_json: OfJson) -> tuple[str, Build]:
    if wanted.type == "json_object":
        return "response_format", partial(of_json, {"type": "object"})
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        path = "response_format.json_schema" + (".schema" if wanted.json_schema else "")
        raise RequestError(f"{path}: is required with the type 'json_schema'", param=path)
    return "response_format.json_schema.schema", partial(of_json, wanted.json_schema.schema_)


def _of_structured_outputs(wanted: StructuredOutputs, of_json: OfJson) -> tuple[str, Build]:
    """vLLM's: exactly one kind."""
    kinds = {
        "json": wanted.json_,
        "regex": wanted.regex,
        "choice": wanted.choice,
        "grammar": wanted.grammar,
        "json_object": wanted.json_object or None,
    }
    given = [kind for kind, value in kinds.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            f"structured_outputs: give exactly one of {', '.join(kinds)}", param="structured_outputs"
        )
    path = f"structured_outputs.{given[0]}"
    match kinds[given[0]]:
        case dict() as schema:
            return path, partial(of_json, schema)
        case list() as choices:
            return path, partial(_of_choices, choices)
        case True:
            return path, partial(of_json, {"type": "object"})
        case str() as text if given[0] == "json":
            return path, partial(of_json, _read_schema(text, path))
        case str() as text if given[0] == "regex":
            return path, partial(LLMatcher.grammar_from_regex, text)
        case text:
            return path, partial(_of_grammar, str(text))


def _of_choices(choices: list[str]) -> str:
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(lark_string, choices)))


def _of_grammar(text: str) -> str:
    """Lark's notation is taken as it is, GBNF's is translated."""
    if len(text) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")
    try:
        lark = any_to_lark(text)
    # The translator says with any exception that a text is no grammar.
    except Exception as error:
        raise ValueError(str(error)) from error
    return LLMatcher.grammar_from_lark(lark)


def lark_string(text: str) -> str:
    """`text` as a literal of a Lark grammar."""
    return json.dumps(text)


def _read_schema(text: str, path: str) -> dict[str, Any]:
    try:
        return parse_object(text.encode())
    except RequestError:
        raise RequestError(f"{path}: is no JSON object", param=path) from None
