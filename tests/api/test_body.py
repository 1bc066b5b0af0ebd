"""Hostile bytes: whatever is sent as a body, the answer is a 4xx in the envelope, or an honest 200."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.errors import RequestError
from loramux_server.api.body import MAX_DEPTH, parse_object
from tests.api.conftest import Stand, build

ROUTES = ["/v1/completions", "/v1/chat/completions"]
JSON = {"content-type": "application/json"}

NOT_AN_OBJECT = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"{",
    b'{"model"',
    b'{"model":}',
    b'{"model":"tiny",}',
    b"{'model':'tiny'}",
    b'{"model":"tiny"} {}',
    b'{"model":"tiny"}\x00',
    b'{"a":"\x01"}',
    b'{"a":"\\x"}',
    b'{"a":"unterminated',
    b'{"a":"\\',
    b"\xef\xbb\xbf{}",
    b'{"model":"\xff"}',
    b'{"model":"\xed\xa0\x80"}',
    b"\x1f\x8b\x08\x00",
    b"model=tiny&prompt=hi",
]
NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b"0x10", b"01", b"1."]
SURROGATES = [b'"\\ud800"', b'"\\udc00x"', b'"\\ud83d\\u0041"', b'{"\\ud800":1}']
DEEP = [b"[" * 100_000, b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000]
DUPLICATES = [b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b'{"a":1,"\\u0061":2}']
CORPUS = [
    *NOT_AN_OBJECT,
    *(b'{"model":"tiny","prompt":"x","temperature":%s}' % number for number in NUMBERS),
    *(b'{"model":"tiny","prompt":%s}' % text for text in SURROGATES),
    *(b'{"model":"tiny","prompt":%s' % deep for deep in DEEP),
    *DUPLICATES,
]


@pytest.mark.parametrize("route", ROUTES)
async def test_no_hostile_body_is_our_fault(client: httpx.AsyncClient, route: str) -> None:
    for raw in CORPUS:
        response = await client.post(route, content=raw, headers=JSON)
        error = response.json()["error"]
        assert response.status_code == 400, raw[:80]
        assert error["code"] == "invalid_json", raw[:80]
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 300, raw[:80]


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_an_object_or_a_request_error(raw: bytes) -> None:
    with suppress(RequestError):
        assert isinstance(parse_object(raw), dict)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_real_object_is_read_as_it_is(value: dict[str, object], escaped: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=escaped).encode()) == value


def test_brackets_in_strings_are_no_depth() -> None:
    text = '[{"' * 1000 + "\\"
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}
    deepest = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    parse_object(b'{"a":%s}' % deepest.encode())
    with pytest.raises(RequestError, match="deeper"):
        parse_object(b'{"a":[%s]}' % deepest.encode())


class TestSize:
    @pytest.fixture
    def stand(self, stand: Stand) -> Stand:
        return build(stand.tokenizer, max_body_bytes=200)

    @pytest.mark.parametrize("route", ROUTES)
    async def test_a_declared_size_is_refused_unread(self, client: httpx.AsyncClient, route: str) -> None:
        response = await client.post(route, content=b"x" * 201, headers=JSON)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    async def test_a_lying_or_missing_size_is_refused_while_reading(self, client: httpx.AsyncClient) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b" " * 10

        response = await client.post(ROUTES[0], content=chunks(), headers=JSON)
        assert response.status_code == 413

    async def test_the_limit_itself_is_allowed(self, client: httpx.AsyncClient) -> None:
        raw = b'{"model":"tiny","prompt":"x"}'.ljust(200)
        assert (await client.post(ROUTES[0], content=raw, headers=JSON)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {},
        {**JSON, "content-encoding": "gzip"},
    ],
)
async def test_only_plain_json_is_accepted(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await client.post(ROUTES[0], content=b'{"model":"tiny","prompt":"x"}', headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
