"""The OpenAPI document. Bodies are read by hand (body.py), so they are described here, from the same models.

Schemas go under `components/schemas`; what is refused by name is left out of them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from loramux_server.api.errors import ErrorEnvelope
from loramux_server.api.scopes import OPEN, scopes_of

_REF = "#/components/schemas/{name}"


def describe(body: type[BaseModel], answer: type[msgspec.Struct]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `body` and gives `answer`."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        **describe_answer(answer),
    }


def describe_answer(answer: type[msgspec.Struct]) -> dict[str, Any]:
    return _describe("application/json", _ref(answer))


def describe_download(answer: type[Response]) -> dict[str, Any]:
    """Of a route that gives a file. What it is added with has to say that there is no JSON: `response_class=Response`."""
    return _describe(str(answer.media_type), {"type": "string", "format": "binary"})


def _describe(media_type: str, schema: dict[str, str]) -> dict[str, Any]:
    return {
        "responses": {
            "200": {"description": "OK", "content": {media_type: {"schema": schema}}},
            "default": {
                "description": "Error",
                "content": {"application/json": {"schema": _ref(ErrorEnvelope)}},
            },
        }
    }


def install(app: FastAPI, bodies: list[type[BaseModel]], answers: list[type[msgspec.Struct]]) -> None:
    """Add the schemas that `describe` points at to the application's document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()  # kept by the application, so this runs on the same object every time
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if ErrorEnvelope.__name__ not in schemas:
            for body in bodies:
                schema = body.model_json_schema(ref_template=_REF.format(name="{model}"))
                schemas.update(schema.pop("$defs", {}))
                schemas[body.__name__] = schema
            _, components = msgspec.json.schema_components([*answers, ErrorEnvelope], ref_template=_REF)
            schemas.update(components)
            _describe_keys(document)
        return document

    # FastAPI's documented way to extend the document is to replace this method.
    app.openapi = openapi  # type: ignore[method-assign]


def _describe_keys(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if scopes_of(method.upper(), path) == OPEN:
                operation["security"] = []


def _ref(schema: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=schema.__name__)}
