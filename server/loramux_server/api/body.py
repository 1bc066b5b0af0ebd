"""Read a JSON request body strictly: bounded size, depth and time, unique keys, finite numbers, whole characters.

Every fault is a 4xx with one sentence that never repeats the input. It promises a JSON object; what the
fields mean is protocol.py's business.
"""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

import anyio.to_thread
from starlette.requests import Request

from loramux_adapters.errors import RequestError
from loramux_server.api.pace import paced

MAX_DEPTH = 64
LONG_BODY = 128 * 1024  # bytes; milliseconds of reading, which others are not to wait for

_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BodyTooLarge(RequestError):
    code = "request_too_large"


class HeadersTooLarge(RequestError):
    code = "headers_too_large"


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"


async def read_object(request: Request, limit: int) -> dict[str, object]:
    """The body as a JSON object, or a RequestError."""
    _check_headers(request, limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in paced(request.stream()):
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    raw = b"".join(chunks)
    if size > LONG_BODY:
        return await anyio.to_thread.run_sync(parse_object, raw)  # asyncio's few threads may all take uploads
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, object]:
    """`raw` as a JSON object. Separate from the reading, so that a corpus of bytes can be thrown at it."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid("it is not valid UTF-8") from error
    # Depth first: json.loads recurses, and how deep it may go depends on the stack it is called from.
    _check_depth(raw)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno} column {error.colno}") from error
    except RequestError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise _invalid("a number is too long") from error
    if not isinstance(value, dict):
        raise _invalid("it must be a JSON object")
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value)
    return value


def _check_headers(request: Request, limit: int) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A browser sends a cross-site form or text/plain without asking; it must ask before it sends JSON.
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("the request needs the header 'Content-Type: application/json'")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed request bodies are not accepted; send the JSON as it is")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)


def _check_depth(raw: bytes) -> None:
    depth = 0
    for match in _STRUCTURE.finditer(raw):
        first = raw[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _invalid(f"it is nested deeper than {MAX_DEPTH} levels")
        elif first in b"]}":
            depth -= 1


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid("a string has a lone surrogate, which is no character") from error


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _invalid("a key appears twice in one object")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid("NaN and Infinity are not JSON numbers")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _invalid("a number is too large")
    return value


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the request body cannot be read as JSON: {reason}", code="invalid_json")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit} bytes")
