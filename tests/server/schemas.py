"""Random JSON schemas of what people use: objects, arrays, enums, numbers, strings, alternatives, references."""

from __future__ import annotations

from random import Random
from typing import Any

_WORDS = ["name", "age", "city", "tags", "größe", "a b", 'q"uote', "x"]


def random_schema(random: Random, depth: int = 3) -> dict[str, Any]:
    """Everything in it is bounded, so that a model that knows nothing comes to an end."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "number", "pattern"]
    if depth:
        kinds += ["object", "object", "array", "anyOf"]
    if depth == 3:  # a reference means the root's definitions, so it cannot be inside another schema
        kinds.append("ref")
    match random.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": random.randint(0, 6)}
        case "integer":
            low = random.randint(-500, 500)
            return {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 2000)}
        case "number":
            return {"enum": [random.randint(-9, 9) / 4, random.randint(0, 10**9)]}
        case "enum":
            return {"enum": random.sample([*_WORDS, 1, 2.5, None, True, [1], {"a": 1}], random.randint(1, 4))}
        case "const":
            return {"const": random.choice([*_WORDS, 7])}
        case "pattern":
            return {
                "type": "string",
                "pattern": random.choice(["^[a-c]{2,4}$", "^\\d{4}-\\d{2}$", "^(on|off)$"]),
            }
        case "array":
            return {
                "type": "array",
                "items": random_schema(random, depth - 1),
                "minItems": random.randint(0, 2),
                "maxItems": random.randint(2, 3),
            }
        case "anyOf":
            return {"anyOf": [random_schema(random, depth - 1) for _ in range(random.randint(1, 3))]}
        case "ref":
            return _object(random, {"$ref": "#/$defs/part"}, depth) | {
                "$defs": {"part": random_schema(random, 0)}
            }
        case kind:
            return {"type": kind} if kind != "object" else _object(random, None, depth)


def _object(random: Random, inner: dict[str, Any] | None, depth: int) -> dict[str, Any]:
    names = random.sample(_WORDS, random.randint(0, 3) if inner is None else 2)
    properties = {name: inner or random_schema(random, depth - 1) for name in names}
    required = [name for name in names if random.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
