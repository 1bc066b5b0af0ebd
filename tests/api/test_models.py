"""Which names mean what."""

from __future__ import annotations

import httpx
import pytest

from tests.api.conftest import FakeRecord, Stand


async def test_the_list_has_the_base_and_every_adapter(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.adapters.records.update((f"many-{i}", FakeRecord(f"many-{i}", f"{i:04x}")) for i in range(300))
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    cards = {card["id"]: card for card in body["data"]}
    assert len(cards) == 2 + 2 + 300
    base, adapter = cards["tiny"], cards["pirate"]
    assert set(base) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
    assert (base["object"], base["root"], base["parent"], base["max_model_len"]) == (
        "model",
        "org/tiny",
        None,
        256,
    )
    assert adapter == {
        "id": "pirate",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "loramux",
        "root": "pirate",
        "parent": "tiny",
        "max_model_len": 256,
        "generation": "a1b2c3d4e5f60718",
    }


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("tiny", "tiny"),
        ("gpt-4", "gpt-4"),
        ("pirate", "pirate"),
        ("tiny:pirate", "pirate"),
        ("gpt-4:team/x:v2", "team/x:v2"),
        ("team/x:v2", "team/x:v2"),
        ("team%2Fx:v2", "team/x:v2"),
        ("pirate@a1b2c3d4", "pirate"),
        ("tiny:pirate@a1b2c3d4", "pirate"),
    ],
)
async def test_one_model_by_any_of_its_names(client: httpx.AsyncClient, name: str, listed: str) -> None:
    response = await client.get(f"/v1/models/{name}")
    assert (response.status_code, response.json()["id"]) == (200, listed)


@pytest.mark.parametrize("name", ["nobody", "tiny:nobody", "tiny:tiny", "pirate@ffffffff", "tiny/pirate"])
async def test_no_model_of_that_name(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/v1/models/{name}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("name", "answers"), [("gpt-4", "tiny"), ("tiny:team/x:v2", "team/x:v2"), ("pirate@a1b2c3d4", "pirate")]
)
async def test_an_answer_says_who_answered(
    client: httpx.AsyncClient, stand: Stand, name: str, answers: str
) -> None:
    response = await client.post("/v1/completions", json={"model": name, "prompt": "hi"})
    assert response.json()["model"] == answers
    adapter = stand.engine.calls[0].adapter
    assert response.headers.get("x-adapter-generation") == (adapter.generation if adapter else None)


async def test_a_name_of_the_base_wins_over_an_adapter(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.adapters.records["tiny"] = FakeRecord("tiny", "0" * 16)
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    assert stand.engine.calls[0].adapter is None
