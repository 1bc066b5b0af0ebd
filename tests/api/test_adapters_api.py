"""/v1/adapters over a real registry, store and gate: every operation, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import zstandard
from transformers import PreTrainedTokenizerFast

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterUnavailable, ConfigError
from loramux_adapters.sources import HubRevision
from loramux_adapters.spec import BaseGeometry
from loramux_server.engine.messages import AdapterEviction, AdapterLoad, DeviceSlot, StepOutput
from tests.adapters.conftest import AdapterFiles, adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import (
    CatalogStand,
    Files,
    fault,
    files,
    make_files,
    make_stand,
    roots,
    stand,
    stats,
    tarred,
    variant,
)
from tests.api.test_metrics import value

__all__ = [
    "adapter_files",
    "files",
    "make_files",
    "make_lora_weights",
    "roots",
    "stand",
    "tiny_geometry",
]  # fixtures


async def test_an_upload_is_an_adapter(stand: CatalogStand, files: Files) -> None:
    response = await stand.upload(
        "team/sql:v2",
        files,
        description="writes SQL",
        metadata='{"ticket": 7}',
        default_sampling='{"temperature": 0.5}',
        pinned="false",
    )
    assert response.status_code == 201
    card = response.json()
    assert card.pop("warnings") == []
    assert (
        card == await stand.show("team/sql:v2") == await stand.show(f"team/sql:v2@{card['generation'][:8]}")
    )
    record = stand.catalog.registry.get("team/sql:v2")
    assert stand.catalog.registry.store.path(record.generation).is_dir()
    stand.catalog.registry.store.verify(record.generation)
    assert {name: card[name] for name in ("object", "id", "state", "tier", "rank", "bytes", "source", "pinned")} == {
        "object": "adapter", "id": "team/sql:v2", "state": "available", "tier": "disk", "rank": 4, "bytes": 1792,
        "source": "upload", "pinned": False,
    }  # fmt: skip
    assert (card["description"], card["metadata"]) == ("writes SQL", {"ticket": 7})
    assert (card["target_modules"], card["dtype"], card["base_model"]) == (
        ["q_proj", "v_proj"],
        "F32",
        "org/tiny",
    )
    assert [one["generation"] for one in card["generations"]] == [card["generation"]]
    answer = await stand.client.post("/v1/completions", json={"model": "team/sql:v2", "prompt": "hi"})
    assert answer.headers["x-adapter-generation"] == card["generation"]


async def test_every_archive_format_is_the_same_generation(stand: CatalogStand, files: Files) -> None:
    plain = (await stand.upload("plain", files)).json()["generation"]
    zipped = BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"folder/{name}", data)
    packed = tarred(files)
    for number, data in enumerate(
        (packed, gzip.compress(packed), zstandard.compress(packed), zipped.getvalue())
    ):
        response = await stand.upload(f"archive-{number}", {"archive": data})
        assert (response.status_code, response.json()["generation"]) == (201, plain)


async def test_another_base_by_name_is_a_warning(stand: CatalogStand, files: Files) -> None:
    config = json.loads(files[CONFIG_FILE]) | {"base_model_name_or_path": "org/other"}
    response = await stand.upload("odd", files | {CONFIG_FILE: json.dumps(config).encode()})
    assert response.status_code == 201
    [warning] = response.json()["warnings"]
    assert '"org/other"' in warning
    assert '"org/tiny"' in warning
    alias = json.loads(files[CONFIG_FILE]) | {"base_model_name_or_path": "somebody/GPT-4"}
    response = await stand.upload("even", files | {CONFIG_FILE: json.dumps(alias).encode()})
    assert response.json()["warnings"] == []


async def test_a_taken_name_needs_overwrite(stand: CatalogStand, make_files: Callable[[int], Files]) -> None:
    first = (await stand.upload("a", make_files(0))).json()
    taken = await stand.upload("a", make_files(1), description="lost")
    assert (taken.status_code, fault(taken)["code"], fault(taken)["param"]) == (
        400,
        "adapter_conflict",
        "name",
    )
    assert len(list(stand.catalog.registry.store)) == 1
    again = await stand.upload("a", make_files(0))
    assert (again.status_code, again.json()["generation"]) == (201, first["generation"])
    second = (await stand.upload("a", make_files(1), overwrite="true")).json()
    assert second["generation"] != first["generation"]
    assert [one["generation"] for one in second["generations"]] == [second["generation"], first["generation"]]
    assert (await stand.show(f"a@{first['generation'][:12]}"))["generation"] == first["generation"]


async def test_rollback_and_back(stand: CatalogStand, make_files: Callable[[int], Files]) -> None:
    one, two = [
        (await stand.upload("a", make_files(n), overwrite="true")).json()["generation"] for n in range(2)
    ]
    rollback = "/v1/adapters/a/rollback"
    assert (await stand.client.post(rollback, json={})).json()["generation"] == one
    assert (await stand.client.post(rollback, json={"generation": two[:8]})).json()["generation"] == two
    keyed = [await stand.client.post(rollback, json={}, headers={"idempotency-key": "k"}) for _ in range(2)]
    assert [response.json()["generation"] for response in keyed] == [one, one]  # a repeat does not undo it
    unknown = await stand.client.post(rollback, json={"generation": "ffffffff"})
    assert (unknown.status_code, fault(unknown)["param"]) == (404, "generation")
    misspelt = await stand.client.post(rollback, json={"generaton": one})
    assert (misspelt.status_code, fault(misspelt)["param"]) == (400, "generaton")


async def test_change_keeps_what_is_not_named(stand: CatalogStand, files: Files) -> None:
    await stand.upload("a/b", files, description="d", metadata='{"k": 1}')
    response = await stand.client.patch("/v1/adapters/a/b", json={"metadata": {"k": 2}})
    assert (response.json()["metadata"], response.json()["description"]) == ({"k": 2}, "d")
    for body, param in (
        ({"name": "x"}, "name"),
        ({"pinned": "yes"}, "pinned"),
        ({"metadata": {"x": "y" * 20_000}}, "metadata"),
        ({"default_sampling": {"temperature": 3}}, "default_sampling.temperature"),
        ({"default_sampling": {"max_tokens": 3}}, "default_sampling.max_tokens"),
        ({"description": "\ud800"}, None),
    ):
        refused = await stand.client.patch("/v1/adapters/a/b", content=json.dumps(body), headers={
            "content-type": "application/json"})  # fmt: skip
        assert (refused.status_code, fault(refused)["param"]) == (400, param)
    missing = await stand.client.patch("/v1/adapters/a", json={})
    assert missing.status_code == 404


async def test_default_sampling_is_for_requests_that_say_nothing(stand: CatalogStand, files: Files) -> None:
    await stand.upload("a", files, default_sampling='{"temperature": 0.25, "top_k": 7}')
    for body, expected in (({}, (0.25, 7)), ({"temperature": 1.5}, (1.5, 7)), ({"top_k": None}, (0.25, 7))):
        await stand.client.post("/v1/completions", json={"model": "tiny:a", "prompt": "hi", **body})
        params = stand.engine.calls[-1].params
        assert (params.temperature, params.top_k) == expected
    await stand.client.post(
        "/v1/chat/completions", json={"model": "a", "messages": [{"role": "user", "content": "x"}]}
    )
    assert stand.engine.calls[-1].params.top_k == 7
    await stand.client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    assert stand.engine.calls[-1].params.temperature == 1.0


async def test_delete_is_at_once_for_new_requests_and_waits_for_old_ones(
    stand: CatalogStand, files: Files
) -> None:
    generation = (await stand.upload("a", files)).json()["generation"]
    say = stand.engine.saying("Hello")
    stand.engine.script = lambda call: [0.4, *say(call)]  # type: ignore[list-item]
    body = {"model": "a", "prompt": "hi"}
    running = asyncio.create_task(stand.client.post("/v1/completions", json=body))
    while not stand.engine.calls:
        await asyncio.sleep(0.01)
    assert (await stand.show("a"))["in_flight"] == 1
    early = await stand.client.delete("/v1/adapters/a", params={"timeout": 0})
    assert (early.status_code, early.json()) == (
        202,
        {"object": "adapter.deleted", "id": "a", "in_flight": 1, "deleted": True},
    )
    assert (await stand.client.post("/v1/completions", json=body)).status_code == 404
    assert (await stand.client.get("/v1/adapters/a")).status_code == 404
    stand.catalog.sweep(min_age=0)
    assert generation in stand.catalog.registry.store  # the request may still need it
    assert (await running).headers["x-adapter-generation"] == generation
    stand.catalog.sweep(min_age=0)
    assert generation not in stand.catalog.registry.store
    gone = await stand.client.delete("/v1/adapters/a")
    assert (gone.status_code, fault(gone)["code"]) == (404, "model_not_found")


async def test_delete_waits_and_takes_the_series_along(stand: CatalogStand, files: Files) -> None:
    await stand.upload("a", files)
    say = stand.engine.saying("Hello")
    stand.engine.script = lambda call: [0.2, *say(call)]  # type: ignore[list-item]
    running = asyncio.create_task(stand.client.post("/v1/completions", json={"model": "a", "prompt": "hi"}))
    while not stand.engine.calls:
        await asyncio.sleep(0.01)
    done = await stand.client.delete("/v1/adapters/a")
    assert (done.status_code, done.json()["in_flight"]) == (200, 0)
    assert (await running).status_code == 200
    assert 'adapter="a"' not in stand.metrics.render("")[0].decode()


async def test_pages(stand: CatalogStand, files: Files) -> None:
    names = [f"n{number}" for number in range(5)]
    for name in names:
        await stand.upload(name, files)
    first = (await stand.client.get("/v1/adapters", params={"limit": 2})).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["n0", "n1"], True)
    assert (first["object"], first["first_id"], first["last_id"]) == ("list", "n0", "n1")
    rest = (await stand.client.get("/v1/adapters", params={"after": "n1"})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (["n2", "n3", "n4"], False)
    empty = (await stand.client.get("/v1/adapters", params={"after": "zzz"})).json()
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)
    for limit in ("0", "1001", "x"):
        wrong = await stand.client.get("/v1/adapters", params={"limit": limit})
        assert (wrong.status_code, fault(wrong)["param"]) == (400, "limit")


async def test_a_download_is_an_upload(stand: CatalogStand, make_files: Callable[[int], Files]) -> None:
    old = (await stand.upload("team/a", make_files(0))).json()["generation"]
    new = (await stand.upload("team/a", make_files(1), overwrite="on")).json()["generation"]
    for model, generation in (("team/a", new), (f"team/a@{old[:16]}", old)):
        response = await stand.client.get(f"/v1/adapters/{model}/download")
        assert response.headers["x-adapter-generation"] == generation
        assert f'filename="team-a-{generation[:12]}.tar.gz"' in response.headers["content-disposition"]
        back = await stand.upload("back", {"archive": response.content}, overwrite="1")
        assert back.json()["generation"] == generation
        assert (await stand.client.get(f"/v1/adapters/{model}/download")).content == response.content
    assert (await stand.show("team/a"))["in_flight"] == 0
    assert (await stand.client.get("/v1/adapters/nobody/download")).status_code == 404
    await stand.upload("team/download", make_files(0))
    assert (await stand.show("team/download"))["id"] == "team/download"


async def test_a_pinned_name_does_not_grow_beyond_what_pins_may_take(
    stand: CatalogStand, make_files: Callable[[int], Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may replace it need not be who may pin."""
    kept = (await stand.upload("n0", make_files(0), pinned="true")).json()["generation"]
    monkeypatch.setattr(stand.catalog._pins, "_max_rank", 64)  # all the rows there are
    refused = await stand.upload("n0", make_files(1), overwrite="true")
    assert (refused.status_code, fault(refused)["param"]) == (400, "pinned")
    assert stand.catalog.registry.get("n0").generation == kept
    assert (await stand.upload("n0", make_files(1), overwrite="true", pinned="false")).status_code == 201


async def test_pins_reach_the_engine_and_leave_a_slot(
    stand: CatalogStand, make_files: Callable[[int], Files]
) -> None:
    generations = [
        (await stand.upload(f"n{n}", make_files(n), pinned="true")).json()["generation"] for n in range(3)
    ]
    assert [one.generation for one in stand.engine.pins] == generations
    assert all(Path(one.path).is_dir() for one in stand.engine.pins)
    refused = await stand.upload("n3", make_files(3), pinned="true")
    assert (refused.status_code, fault(refused)["param"]) == (400, "pinned")
    assert "3 of 4 slots are pinned" in fault(refused)["message"]
    assert "n3" not in stand.catalog.registry
    replaced = (await stand.upload("n0", make_files(4), overwrite="true")).json()
    assert replaced["pinned"]
    assert {one.generation for one in stand.engine.pins} == {replaced["generation"], *generations[1:]}
    await stand.client.post("/v1/adapters/n0/rollback", json={})
    assert {one.generation for one in stand.engine.pins} == set(generations)
    await stand.client.patch("/v1/adapters/n1", json={"pinned": False})
    await stand.client.delete("/v1/adapters/n2")
    assert [one.generation for one in stand.engine.pins] == generations[:1]
    assert (await stand.client.patch("/v1/adapters/n1", json={"pinned": True})).json()["pinned"]


async def test_states_follow_the_engine(stand: CatalogStand, files: Files) -> None:
    generation = (await stand.upload("a", files)).json()["generation"]

    def step(loads: list[AdapterLoad], **fields: Any) -> None:
        stand.engine.stats = stats(**fields)
        for listener in stand.engine.listeners:
            listener(StepOutput([], stand.engine.stats, loads, [AdapterEviction("g", "host", "capacity")]))

    async def seen() -> tuple[str, str]:
        card = await stand.show("a")
        return card["state"], card["tier"]

    assert await seen() == ("available", "disk")
    step([], loading_adapters=[generation])
    assert await seen() == ("loading", "disk")
    step([AdapterLoad(generation, "host", 0.1, True)], host_adapters=[generation])
    assert await seen() == ("available", "host")
    slot = DeviceSlot(generation, 0, 4, 1, False, False)
    step(
        [],
        host_adapters=[generation],
        device_adapters=[generation],
        device_slots=[slot],
        host_bytes=9,
        device_bytes=8,
    )
    assert await seen() == ("ready", "device")
    m = stand.metrics
    assert value(m, "adapters", state="ready") == 1
    assert (value(m, "adapter_slots_used"), value(m, "adapter_slots")) == (1, 4)
    assert [value(m, "adapter_bytes", tier=tier) for tier in ("disk", "host", "device")] == [1792, 9, 8]
    assert value(m, "adapter_evictions_total", tier="host", reason="capacity") == 3
    step([AdapterLoad(generation, "host", 0.1, False, "the files are damaged")])
    assert (await stand.show("a"))["failure"] == "the files are damaged"
    assert value(m, "adapters", state="failed") == 1
    step([AdapterLoad(generation, "host", 0.1, True)])
    assert await seen() == ("available", "disk")


async def test_a_damaged_generation_is_shown_as_failed(stand: CatalogStand, files: Files) -> None:
    generation = (await stand.upload("a", files)).json()["generation"]
    weights = stand.catalog.registry.store.path(generation) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"short")
    stand.catalog._manifests.clear()
    card = await stand.show("a")
    assert (card["state"], card["rank"]) == ("failed", None)
    assert "is damaged" in card["failure"]
    assert (await stand.client.get("/v1/adapters")).status_code == 200


async def test_plan(stand: CatalogStand, make_files: Callable[[int], Files]) -> None:
    ids = [(await stand.upload(f"n{n}", make_files(n))).json()["generation"] for n in range(5)]

    async def plan(**body: Any) -> Any:
        response = await stand.client.post("/v1/adapters/plan", json=body)
        return response.json() if response.status_code == 200 else fault(response)

    empty = await plan(name="n0")
    assert (empty["fits"], empty["rank"], empty["reason"]) == (True, 4, None)
    assert (empty["device"]["slots"], empty["device"]["rows"], empty["device"]["rows_needed"]) == (4, 64, 4)
    # Numbers of A and B: rank times the sizes of the two targeted linears of two layers.
    assert empty["host"]["bytes"] == 4 * 4 * 2 * (16 + 16 + 8 + 16)
    assert empty["device"]["would_evict"] == empty["host"]["would_evict"] == []
    slots = [DeviceSlot(ids[n], 16 * n, 16, int(n == 0), n == 1, False) for n in range(4)]
    stand.engine.stats = stats(device_slots=slots, device_adapters=ids[:4], host_adapters=[*ids[:4], *"wxyz"])
    full = await plan(name="n4")
    assert full["device"]["would_evict"] == ["n2"]  # n0 is in use, n1 is pinned
    assert full["host"]["would_evict"] == ["n0"]
    assert (full["device"]["slots_used"], full["device"]["rows_used"]) == (4, 64)
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 8, "target_modules": ["q_proj"]}
    large = await plan(config=config)
    assert (large["fits"], large["device"]["would_evict"]) == (False, None)
    assert "--max-lora-rank" in large["reason"]
    assert (await plan(config=config | {"r": 16}))["device"]["would_evict"] == ["n2"]
    assert (await plan(name="n2"))["device"]["resident"]
    stand.engine.stats = stats(
        device_slots=[DeviceSlot(one, 16 * n, 16, 1, False, False) for n, one in enumerate(ids[:4])]
    )
    assert (await plan(name="n4"))["device"]["would_evict"] is None
    assert (await plan(config=config | {"use_dora": True}))["faults"][0]["where"] == "use_dora"
    for body in ({}, {"name": "n0", "config": config}, {"config": config | {"target_modules": ["none"]}}):
        assert (await plan(**body))["code"] == "invalid_request"
    assert (await plan(name="nobody"))["code"] == "model_not_found"


class FakeHub:
    """A repository with the files of one adapter."""

    files: Files
    reachable = True

    def resolve(self, repo: str, revision: str) -> HubRevision:
        if not self.reachable:
            raise AdapterUnavailable("source: not reachable", param="source", code="source_unavailable")
        return HubRevision("c0ffee", {name: len(data) for name, data in self.files.items()})

    def download(self, repo: str, commit: str, file: str, directory: Path) -> None:
        (directory / file).write_bytes(self.files[file])


async def test_a_hub_source_records_the_commit(
    stand: CatalogStand, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_server.api.routes.adapters.HuggingFaceHub", FakeHub)
    monkeypatch.setattr(FakeHub, "files", files, raising=False)
    body = {"name": "a", "source": "hf://org/repo@main", "metadata": {"k": 1}}
    response = await stand.client.post("/v1/adapters", json=body)
    assert response.status_code == 201
    card = response.json()
    assert (card["source"], card["origin"], card["metadata"]) == ("hub", "hf://org/repo@c0ffee", {"k": 1})
    for source in ("https://example.org/a", "hf://../..", "/etc", "hf://org/repo@../x"):
        refused = await stand.client.post("/v1/adapters", json=body | {"source": source})
        assert (refused.status_code, fault(refused)["code"]) == (400, "invalid_adapter")
    monkeypatch.setattr(FakeHub, "reachable", False)
    offline = await stand.client.post("/v1/adapters", json={"name": "b", "source": "hf://org/repo"})
    assert (offline.status_code, fault(offline)["code"]) == (503, "source_unavailable")
    assert (await stand.client.post("/v1/adapters", json={"name": "b"})).status_code == 400


async def test_the_hub_offline_is_a_clear_error(stand: CatalogStand) -> None:
    """The real client; the tests run with HF_HUB_OFFLINE."""
    response = await stand.client.post("/v1/adapters", json={"name": "a", "source": "hf://org/repo@main"})
    assert (response.status_code, fault(response)["code"]) == (503, "source_unavailable")
    assert "cannot be reached" in fault(response)["message"]


async def test_a_restart_keeps_what_was_uploaded_and_cleans_up(
    stand: CatalogStand,
    files: Files,
    tmp_path: Path,
    tiny_geometry: BaseGeometry,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    card = (await stand.upload("a", files, pinned="true", description="d")).json()
    with pytest.raises(ConfigError, match="another server keeps the adapters of this base there"):
        make_stand(tmp_path, tiny_geometry, tokenizer)
    stand.catalog.close()
    (stand.catalog.staging / "left by a crash").mkdir()
    again = make_stand(tmp_path, tiny_geometry, tokenizer)
    await again.catalog.keep_pinned()
    assert again.staged == []
    assert (await again.show("a")) == {name: card[name] for name in card if name != "warnings"}
    assert [one.generation for one in again.engine.pins] == [card["generation"]]
    await again.client.aclose()
    again.catalog.close()


@pytest.mark.parametrize(
    "body", [{"lora_name": "x", "lora_path": "a"}, {"lora_name": "team/x", "lora_path": None}]
)
async def test_vllm_load_and_unload(
    stand: CatalogStand,
    adapter_files: AdapterFiles,
    roots: tuple[Path, ...],
    body: dict[str, Any],
) -> None:
    folder = adapter_files.write(roots[0] / "a")
    body = body | {"lora_path": body["lora_path"] or str(folder), "is_3d_lora_weight": False}
    loaded = await stand.client.post("/v1/load_lora_adapter", json=body)
    name = body["lora_name"]
    assert (loaded.status_code, loaded.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    assert loaded.headers["content-type"].startswith("text/plain")
    card = await stand.show(name)
    assert (card["source"], card["origin"]) == ("path", None)
    variant(adapter_files, 1).write(folder)
    taken = await stand.client.post("/v1/load_lora_adapter", json=body)
    assert (taken.status_code, fault(taken)["code"]) == (400, "adapter_conflict")
    await stand.client.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
    assert (await stand.show(name))["generation"] != card["generation"]
    unloaded = await stand.client.post("/v1/unload_lora_adapter", json={"lora_name": name, "lora_int_id": 3})
    assert (unloaded.status_code, unloaded.text) == (
        200,
        f"Success: LoRA adapter '{name}' removed successfully.",
    )
    again = await stand.client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert (again.status_code, fault(again)["code"]) == (404, "model_not_found")


async def test_vllm_paths_stay_below_the_roots(
    stand: CatalogStand,
    adapter_files: AdapterFiles,
    roots: tuple[Path, ...],
    tmp_path: Path,
) -> None:
    outside = adapter_files.write(tmp_path / "outside")
    roots[0].mkdir()
    (roots[0] / "link").symlink_to(outside)
    for path in (str(outside), "../outside", "link", f"{roots[0]}/../outside", "/etc", "nowhere", "/nowhere"):
        refused = await stand.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert (refused.status_code, fault(refused)["code"]) == (400, "invalid_adapter")
        assert str(tmp_path) not in fault(refused)["message"]
        if path != "nowhere":
            assert "outside the folders adapters may be loaded from" in fault(refused)["message"]
    assert "x" not in stand.catalog.registry


async def test_a_wrong_method_is_told_the_right_ones(stand: CatalogStand) -> None:
    for path, allow in (("/v1/adapters", "GET, POST"), ("/v1/adapters/a/b", "DELETE, GET, PATCH")):
        response = await stand.client.put(path)
        assert (response.status_code, response.headers["allow"]) == (405, allow)
        assert fault(response)["code"] == "method_not_allowed"


async def test_the_document_has_the_routes(stand: CatalogStand) -> None:
    document = (await stand.client.get("/openapi.json")).json()
    create = document["paths"]["/v1/adapters"]["post"]
    assert set(create["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"Adapter", "AdapterList", "AdapterPlan", "PulledAdapter", "PlanBody"} <= set(
        document["components"]["schemas"]
    )
