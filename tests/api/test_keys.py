"""Keys at the door: who gets in, by which header, to which routes, how often; and what is never told of a key."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.errors import EngineError, StorageError
from loramux_adapters.spec import BaseGeometry
from loramux_server.api import middleware
from loramux_server.api.scopes import OPEN, ROUTES, scopes_of
from loramux_server.engine.messages import TokenOutput
from loramux_server.keys.limits import Limits
from loramux_server.keys.principal import SCOPES, Scope, current_principal
from loramux_server.keys.store import KeyStore
from loramux_server.logs import LogFormat, set_up_logging
from loramux_server.observed import ObservedRequest
from tests.adapters.conftest import tiny_geometry
from tests.api.tenants_support import ADMIN, TenantStand, refused, served

__all__ = ["tiny_geometry"]  # a fixture

Make = Callable[..., TenantStand]
HI = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


@pytest.fixture
async def make(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> AsyncIterator[Make]:
    stands: list[TenantStand] = []

    def make(**options: Any) -> TenantStand:
        stands.append(TenantStand.open(tmp_path, tiny_geometry, tokenizer, **options))
        return stands[-1]

    yield make
    for stand in stands:
        await stand.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def url_of(template: str) -> str:
    for parameter in ("{name:path}", "{model:path}", "{name}"):
        template = template.replace(parameter, "x")
    for parameter in ("{response_id}", "{file_id}", "{job_id}", "{key_id}"):
        template = template.replace(parameter, "y")
    return template.replace("{export_id:export_id}", "export-" + "0" * 16)


# --- the table ---------------------------------------------------------------------------------------------------------


def test_every_route_is_in_the_table(make: Make) -> None:
    found = served(make().app)
    assert len(found) > 40
    assert {path for _, path in found} - set(ROUTES) == set(), "give these routes scopes in api/scopes.py"
    paths = {path for _, path in found} | {f"{method} {path}" for method, path in found}
    assert set(ROUTES) - paths == set(), "these are no routes"


def test_few_routes_are_open() -> None:
    opened = {template for template, scopes in ROUTES.items() if scopes == OPEN}
    assert opened == {"/", "/page/{name}", "/health", "/ready"}
    assert scopes_of("GET", "/new") == ("admin",)
    assert get_args(Scope) == SCOPES


async def test_no_route_answers_without_a_key(make: Make) -> None:
    stand = make()
    _, expired = stand.key(expires=time.time() - 1)
    record, revoked = stand.key()
    stand.revoke(record.id)
    for method, path in served(stand.app):
        url = url_of(path)
        for headers in ({}, bearer("lmx-guessed"), bearer(""), bearer(expired), bearer(revoked)):
            response = await stand.client.request(method, url, headers=headers)
            if scopes_of(method, path) == OPEN:
                assert response.status_code in (200, 404), path  # 404: no page of that name
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert refused(response) == (401, "invalid_api_key")


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_scope_opens_its_routes_and_no_others(
    scope: Scope, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = make()
    _, key = stand.key("acme", scope)
    answered: list[ObservedRequest] = []
    monkeypatch.setattr(middleware, "log_access", answered.append)
    for method, path in served(stand.app):
        needed = scopes_of(method, path)
        response = await stand.client.request(method, url_of(path), headers=bearer(key))
        assert answered[-1].route == path  # where the request went is what the gate took it for
        if needed == OPEN:
            continue
        assert answered[-1].key_id not in (None, key)
        if scope == "admin" or scope in needed:
            assert response.status_code not in (401, 403), (method, path)
            continue
        assert response.status_code == 403, (method, path)
        if method != "HEAD":
            assert refused(response) == (403, "missing_scope")
            message = response.json()["error"]["message"]
            assert all(name in message for name in needed), message
            assert scope in message


async def test_what_has_no_route_needs_a_key_too(make: Make) -> None:
    stand = make()
    for method, url in (("GET", "/v1/nowhere"), ("PUT", "/v1/models"), ("OPTIONS", "/v1/completions")):
        assert refused(await stand.client.request(method, url)) == (401, "invalid_api_key")
        response = await stand.client.request(method, url, headers=bearer(ADMIN))
        assert response.status_code in (404, 405)


# --- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("Authorization", "Bearer {}"),
        ("authorization", "bearer {}"),
        ("Authorization", "Bearer  {} "),
        ("api-key", "{}"),
        ("X-API-Key", "{}"),
    ],
)
async def test_the_headers_people_know(header: str, form: str, make: Make) -> None:
    stand = make()
    response = await stand.client.get("/v1/models", headers={header: form.format(ADMIN)})
    assert response.status_code == 200


@pytest.mark.parametrize("form", ["{}", "Basic {}", "Token {}", "Bearer{}"])
async def test_other_schemes_are_no_key(form: str, make: Make) -> None:
    headers = {"authorization": form.format(ADMIN)}
    response = await make().client.get("/v1/models", headers=headers)
    assert refused(response) == (401, "invalid_api_key")
    assert "Authorization: Bearer" in response.json()["error"]["message"]


async def test_keys_count_from_the_next_request_on(make: Make) -> None:
    stand = make(admin_keys=())
    assert (await stand.client.get("/v1/models")).status_code == 200  # there never was a key
    record, key = stand.key("acme", "infer")
    assert (await stand.client.get("/v1/models")).status_code == 401
    assert (await stand.client.get("/v1/models", headers=bearer(key))).status_code == 200
    stand.revoke(record.id)
    assert (await stand.client.get("/v1/models", headers=bearer(key))).status_code == 401
    assert (await stand.client.get("/v1/models")).status_code == 401  # closed, though no key is left


async def test_several_keys_of_the_configuration(make: Make) -> None:
    stand = make(admin_keys=("one", "two"))
    statuses = [
        (await stand.client.get("/metrics", headers=bearer(key))).status_code for key in ("one", "two", "on")
    ]
    assert statuses == [200, 200, 401]


async def test_without_keys_everything_is_open(make: Make) -> None:
    stand = make(admin_keys=())
    for method, path in served(stand.app):
        response = await stand.client.request(method, url_of(path), headers=bearer("anything"))
        assert response.status_code not in (401, 403), (method, path)


def test_outside_of_a_request_nobody_acts() -> None:
    with pytest.raises(LookupError):
        current_principal()


async def test_a_key_database_that_cannot_be_read_lets_nobody_in(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: KeyStore) -> tuple[int, int]:
        raise StorageError("the key database cannot be read: disk I/O error")

    stand = make(admin_keys=())
    monkeypatch.setattr(KeyStore, "version", fails)
    response = await stand.client.get("/v1/models")
    assert refused(response) == (500, "internal_error")
    assert (await stand.client.get("/health")).status_code == 200
    assert (await stand.client.head("/health")).status_code == 200


# --- what is told ------------------------------------------------------------------------------------------------------


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.usefixtures("logging_restored")
async def test_keys_are_in_no_log_line_and_no_answer(
    log_format: LogFormat, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = io.StringIO()
    set_up_logging("debug", log_format, "front", sink)
    stand = make()
    record, key = stand.key("acme", "infer")
    guessed = "lmx-guessed-by-somebody"

    def fails() -> None:
        raise RuntimeError("a fault of our own")

    answers = []
    for headers in (
        bearer(key),
        bearer(guessed),
        {"x-api-key": ADMIN},
        {"authorization": f"Basic {guessed}"},
    ):
        for method, url in (
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
            ("GET", "/metrics"),
            ("GET", "/x"),
        ):
            answers.append(await stand.client.request(method, url, headers=headers, content=b"{"))
    monkeypatch.setattr(stand.metrics, "render", fails)
    broken = await stand.client.get("/metrics", headers=bearer(ADMIN))
    assert broken.status_code == 500
    text = sink.getvalue() + "".join(f"{one.text} {one.headers}" for one in [*answers, broken])
    assert record.id in sink.getvalue()  # what may be told of it
    assert "api-key-1" in sink.getvalue()
    for secret in (key, guessed, ADMIN, record.digest.hex()):
        assert secret not in text
    assert key not in repr(stand.guard)
    assert key not in repr(record)


# --- limits ------------------------------------------------------------------------------------------------------------


async def complete(stand: TenantStand, key: str, **body: Any) -> httpx.Response:
    return await stand.client.post("/v1/completions", json={**HI, **body}, headers=bearer(key))


async def test_requests_a_minute(make: Make) -> None:
    stand = make(limits=Limits(requests_per_minute=2))
    _, one = stand.key()
    _, other = stand.key()
    _, more = stand.key(requests_per_minute=3)
    _, free = stand.key(requests_per_minute=0)
    first = await complete(stand, one)
    left = await stand.client.get(
        "/v1/nowhere", headers=bearer(one)
    )  # errors count, and have the headers, too
    assert [r.headers["x-ratelimit-remaining-requests"] for r in (first, left)] == ["1", "0"]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert 0 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert "x-ratelimit-limit-tokens" not in first.headers
    response = await complete(stand, one)
    assert refused(response) == (429, "rate_limit_exceeded")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert 0 < int(response.headers["retry-after"]) <= 60
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await stand.client.get("/health", headers=bearer(one))).status_code == 200
    assert (await complete(stand, other)).status_code == 200
    assert [(await complete(stand, more)).status_code for _ in range(4)] == [200, 200, 200, 429]
    answers = [await complete(stand, free) for _ in range(5)]
    assert {one.status_code for one in answers} == {200}
    assert "x-ratelimit-limit-requests" not in answers[0].headers


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_a_minute(stream: bool, make: Make) -> None:
    stand = make()
    _, key = stand.key(tokens_per_minute=8)
    first = await complete(
        stand, key, stream=stream, stream_options={"include_usage": True} if stream else None
    )
    assert first.headers["x-ratelimit-remaining-tokens"] == "8"
    second = await complete(stand, key)  # what is left is not known to be too little
    used = 8 - int(second.headers["x-ratelimit-remaining-tokens"])
    usage = second.json()["usage"]
    assert used == usage["total_tokens"] > 0
    while second.status_code == 200:
        second = await complete(stand, key)
    assert refused(second) == (429, "rate_limit_exceeded")
    assert "tokens a minute" in second.json()["error"]["message"]
    assert second.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_requests_at_once(make: Make) -> None:
    stand = make(limits=Limits(queued=1))
    _, one = stand.key()
    _, other = stand.key()
    seen: list[httpx.Response] = []

    def script(call: Any) -> Any:
        yield 0.05
        yield from stand.engine.saying("Hello")(call)

    stand.engine.script = script

    async def asks(key: str) -> None:
        seen.append(await complete(stand, key))

    await asyncio.gather(asks(one), asks(one), asks(other))
    assert sorted(response.status_code for response in seen) == [200, 200, 429]
    shut = next(response for response in seen if response.status_code == 429)
    assert refused(shut) == (429, "rate_limit_exceeded")
    assert shut.headers["retry-after"] == "1"
    assert (await complete(stand, one)).status_code == 200  # its place is free again


async def test_the_document_says_how_to_send_a_key(make: Make) -> None:
    document = (await make().client.get("/openapi.json", headers=bearer(ADMIN))).json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    paths = document["paths"]
    assert paths["/health"]["get"].get("security") == []
    assert document["security"] == [{"key": []}]
    assert json.dumps(document).count('"security": []') == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_of_a_request_counts(stream: bool, make: Make) -> None:
    stand = make(limits=Limits(queued=4))
    _, one = stand.key()
    _, other = stand.key()

    def script(call: Any) -> Any:
        yield 0.3
        yield from stand.engine.saying("Hello")(call)

    stand.engine.script = script
    running = asyncio.create_task(complete(stand, one, n=3, stream=stream))
    while len(stand.engine.calls) < 3:
        await asyncio.sleep(0.01)
    beside = [await complete(stand, one, n=2), await complete(stand, one, prompt=["a", "b"])]
    assert [refused(response) for response in beside] == [(429, "rate_limit_exceeded")] * 2
    assert "has 4 answers waiting or running, and may have 4" in beside[0].text  # its own first among them
    assert beside[0].headers["retry-after"] == "1"
    never = await complete(stand, one, prompt=["a", "b"], n=3)
    assert never.status_code == 400, "no waiting would help"
    assert "n: the request asks for 6 answers" in never.text
    assert len(stand.engine.calls) == 3
    fitting = await asyncio.gather(complete(stand, one), complete(stand, other, n=4))
    assert [response.status_code for response in [*fitting, await running]] == [200] * 3
    assert (await complete(stand, one, n=4)).status_code == 200, "every place was given back"


async def test_who_got_nothing_is_not_charged(make: Make) -> None:
    stand = make()
    _, key = stand.key(tokens_per_minute=1000)

    async def left() -> int:
        answer = await stand.client.get("/v1/models", headers=bearer(key))
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    def refuses(call: Any) -> Any:
        yield EngineError("the engine is restarting")

    def breaks(call: Any) -> Any:
        yield TokenOutput(call.request_id, [5])
        yield EngineError("the engine is restarting")

    stand.engine.script = refuses
    for stream in (False, True):
        assert (await complete(stand, key, prompt="Hello world", stream=stream)).status_code == 503
    assert await left() == 1000
    stand.engine.script = breaks
    assert (await complete(stand, key, prompt="Hello world")).status_code == 503
    assert 0 < 1000 - await left() < 20, "what was computed is"
