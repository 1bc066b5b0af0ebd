"""/v1/keys: what admins do with keys over HTTP, what nobody else can, and what is never told."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import BaseGeometry
from loramux_server.keys.principal import SCOPES
from tests.adapters.conftest import tiny_geometry
from tests.api.conftest import build
from tests.api.tenants_support import ADMIN, TenantStand, refused, stand

__all__ = ["stand", "tiny_geometry"]  # fixtures

FIELDS = {
    *("object", "id", "name", "tenant", "scopes", "state", "current", "created", "expires", "revoked"),
    *("requests_per_minute", "tokens_per_minute"),
}


@pytest.fixture
async def open_stand(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> AsyncIterator[TenantStand]:
    stand = TenantStand.open(tmp_path, tiny_geometry, tokenizer, admin_keys=())
    yield stand
    await stand.close()


async def made(stand: TenantStand, who: str = "admin", **body: Any) -> dict[str, Any]:
    response = await stand.ask(who, "POST", "/v1/keys", json=body)
    assert response.status_code == 201, response.text
    assert response.headers["cache-control"] == "no-store"
    answer: dict[str, Any] = response.json()
    return answer


async def listed(stand: TenantStand, who: str = "admin") -> list[dict[str, Any]]:
    keys: list[dict[str, Any]] = (await stand.ok(who, "GET", "/v1/keys"))["data"]
    return keys


async def test_a_key_is_told_once_and_works_at_once(stand: TenantStand) -> None:
    key = await made(stand, name="ci", tenant="acme", scopes=["train", "infer"], expires_in=3600)
    assert set(key) == FIELDS | {"key"}
    assert key["object"] == "api_key"
    assert (key["name"], key["tenant"], key["state"], key["current"]) == ("ci", "acme", "active", False)
    assert key["scopes"] == ["infer", "train"]
    assert 3590 < key["expires"] - time.time() <= 3600
    [kept] = await listed(stand)
    assert kept == {name: value for name, value in key.items() if name != "key"}
    stand.keys["ci"] = key["key"]
    assert (await stand.ask("ci", "GET", "/v1/fine_tuning/jobs")).status_code == 200
    assert refused(await stand.ask("ci", "GET", "/v1/adapters")) == (403, "missing_scope")


async def test_what_is_left_out_is_as_little_as_possible(stand: TenantStand) -> None:
    key = await made(stand)
    assert (key["name"], key["tenant"], key["scopes"]) == ("", "default", ["infer"])
    assert (key["expires"], key["requests_per_minute"], key["tokens_per_minute"]) == (None, None, None)


async def test_the_list_is_that_of_the_command(stand: TenantStand) -> None:
    """Made by the one, seen by the other, in the same words."""
    await made(stand, name="http", requests_per_minute=5, tokens_per_minute=0)
    record, _ = stand.key("acme", "infer", name="command")
    revoked = await stand.ok("admin", "DELETE", f"/v1/keys/{record.id}")
    assert (revoked["id"], revoked["state"]) == (record.id, "revoked")
    command = [
        sys.executable,
        "-m",
        "loramux_server",
        "keys",
        "list",
        "--json",
        "--data-dir",
        str(stand.data),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    seen = await listed(stand)
    assert [key["name"] for key in seen] == ["http", "command"]
    assert [{k: v for k, v in key.items() if k not in ("object", "current")} for key in seen] == json.loads(
        out
    )


async def test_a_revoked_key_opens_nothing_and_stays_listed(stand: TenantStand) -> None:
    key = await made(stand, scopes=["admin"])
    stand.keys["second"] = key["key"]
    assert [one["current"] for one in await listed(stand, "second")] == [True]
    for _ in range(2):  # again changes nothing
        gone = await stand.ok("admin", "DELETE", f"/v1/keys/{key['id']}")
        assert gone["state"] == "revoked"
    assert refused(await stand.ask("second", "GET", "/v1/keys")) == (401, "invalid_api_key")
    assert [one["state"] for one in await listed(stand)] == ["revoked"]
    nobodys = await stand.ask("admin", "DELETE", "/v1/keys/key_0")
    assert refused(nobodys) == (404, "key_not_found")
    assert nobodys.json()["error"]["param"] == "id"


async def test_keys_of_the_configuration_are_not_in_the_list(stand: TenantStand) -> None:
    assert await listed(stand) == []
    for key_id in ("api-key-1", ADMIN):
        assert refused(await stand.ask("admin", "DELETE", f"/v1/keys/{key_id}")) == (404, "key_not_found")
    assert await listed(stand) == []


async def test_only_admins_see_make_and_revoke(stand: TenantStand) -> None:
    """Whatever else a key may do: none can make one that may do more than itself."""
    victim, _ = stand.key("alice")
    stand.keys["bob"] = stand.key("bob", *[scope for scope in SCOPES if scope != "admin"])[1]
    before = await listed(stand)
    for method, url, body in (
        ("GET", "/v1/keys", None),
        ("POST", "/v1/keys", {"scopes": ["admin"]}),
        ("POST", "/v1/keys", {"tenant": "bob", "scopes": ["infer"]}),
        ("DELETE", f"/v1/keys/{victim.id}", None),
        ("DELETE", f"/v1/keys/{before[-1]['id']}", None),
        ("DELETE", "/v1/keys/key_0", None),
    ):
        response = await stand.ask("bob", method, url, json=body)
        assert refused(response) == (403, "missing_scope")
        assert victim.id not in response.text
    assert await listed(stand) == before


async def test_the_first_key_is_not_made_over_http(open_stand: TenantStand) -> None:
    client = open_stand.client
    assert (await client.get("/v1/keys")).json()["data"] == []
    response = await client.post("/v1/keys", json={"scopes": ["admin"]})
    assert refused(response) == (400, "no_keys_yet")
    assert "loramux keys create --scope admin" in response.json()["error"]["message"]
    assert (await client.get("/v1/models")).status_code == 200  # still open


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes[0]"),
        ({"scopes": "infer"}, "scopes"),
        ({"scope": ["infer"]}, "scope"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a/b"}, "tenant"),
        ({"name": "two\nlines"}, "name"),
        ({"name": 1}, "name"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": "30d"}, "expires_in"),
        ({"expires_in": 10**12}, "expires_in"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"tokens_per_minute": 10**30}, "tokens_per_minute"),
        ({"id": "key_0"}, "id"),
    ],
)
async def test_mistakes_name_the_field(body: dict[str, Any], param: str, stand: TenantStand) -> None:
    response = await stand.ask("admin", "POST", "/v1/keys", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert await listed(stand) == []


async def test_no_form_of_another_site_makes_a_key(stand: TenantStand) -> None:
    response = await stand.ask(
        "admin", "POST", "/v1/keys", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert response.status_code == 415
    assert await listed(stand) == []


async def test_secrets_and_digests_are_told_nowhere_else(
    stand: TenantStand, caplog: pytest.LogCaptureFixture
) -> None:
    sink = io.StringIO()
    with caplog.at_level(logging.DEBUG):
        key = await made(stand, name="quiet", scopes=["admin"])
        stand.keys["quiet"] = key["key"]
        for method, url in (
            ("GET", "/v1/keys"),
            ("GET", "/metrics"),
            ("DELETE", f"/v1/keys/{key['id']}"),
            ("GET", "/v1/keys"),
        ):
            response = await stand.ask("quiet" if method == "DELETE" else "admin", method, url)
            assert response.status_code == 200
            sink.write(f"{response.text} {response.headers}")
    [record] = stand.guard.changes.all() if stand.guard.changes else []
    told = sink.getvalue() + caplog.text
    for secret in (key["key"], record.digest.hex(), ADMIN):
        assert secret not in told
    assert f"key {key['id']} of tenant default is made by api-key-1" in caplog.text
    assert f"key {key['id']} is revoked by {key['id']}" in caplog.text


async def test_the_routes_are_there_where_keys_can_be(
    stand: TenantStand, tokenizer: PreTrainedTokenizerFast
) -> None:
    described = stand.app.openapi()
    assert set(described["paths"]["/v1/keys"]) == {"get", "post"}
    assert {"KeyBody", "KeyObject", "NewKeyObject", "KeyList"} <= set(described["components"]["schemas"])
    assert "key" not in described["components"]["schemas"]["KeyObject"]["properties"]
    assert "/v1/keys" not in build(tokenizer).app.openapi()["paths"]
