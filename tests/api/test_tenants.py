"""What one tenant can find out about another: nothing. Every route is asked with another tenant's key."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.access import Access
from loramux_adapters.spec import BaseGeometry
from loramux_server.api.scopes import OPEN, scopes_of
from loramux_server.engine.stats import DeviceSlot
from loramux_server.quotas import Quota
from tests.adapters.conftest import AdapterFiles, adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import Files, contents, stats, variant
from tests.api.tenants_support import TenantStand, refused, served
from tests.api.training_support import PATIENCE_S

__all__ = ["adapter_files", "make_lora_weights", "tiny_geometry"]  # fixtures

Make = Callable[..., TenantStand]


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


@pytest.fixture
def stand(make: Make) -> TenantStand:
    return make()


@pytest.fixture
def make_files(adapter_files: AdapterFiles, tmp_path: Path) -> Callable[[int], Files]:
    return lambda number: contents(variant(adapter_files, number), tmp_path / f"adapter-{number}")


# --- every route, with another tenant's key ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Belongings:
    """Names of things, of a tenant or of nobody. `generation` is of the adapter."""

    name: str
    generation: str
    checkpoint: str
    file: str
    job: str
    export: str
    response: str
    item: str  # of the response's output

    def url(self, template: str) -> str:
        for parameter, value in (
            ("{name:path}", self.name),
            ("{model:path}", self.name),
            ("{response_id}", self.response),
            ("{file_id}", self.file),
            ("{job_id}", self.job),
            ("{export_id:export_id}", self.export),
            ("{name}", "app.css"),
        ):
            template = template.replace(parameter, value)
        return template

    def hidden(self, text: str) -> str:
        """Without the names."""
        for value in sorted(vars(self).values(), key=len, reverse=True):
            text = text.replace(value, "?")
        return text.replace(self.generation[:8], "?")


NOBODYS = Belongings(
    name="nobodys",
    generation="0" * 64,
    checkpoint="ft:of-nobody:step-2",
    file="file-0123456789abcdef01234567",
    job="ftjob-0123456789abcdef01234567",
    export="export-0123456789abcdef",
    response="resp_0123456789abcdef0123456789abcdef",
    item="msg_0123456789abcdef0123456789abcdef",
)


async def belongings(stand: TenantStand, who: str, files: Files) -> Belongings:
    """One of everything that a tenant can have. The job goes on."""
    stand.jobs.start()
    uploaded = await stand.upload(who, f"{who}s", files)
    assert uploaded.status_code == 201, uploaded.text
    file = await stand.upload_rows(who, f"{who}.jsonl")
    wanted = {"model": "tiny", "training_file": file, "suffix": who}
    job = (await stand.ok(who, "POST", "/v1/fine_tuning/jobs", json=wanted))["id"]
    checkpoint = await stand.until_checkpoint(job)
    export = await stand.ok(who, "POST", f"/v1/adapters/{who}s/exports", json={})
    answer = await stand.ok(who, "POST", "/v1/responses", json={"model": f"{who}s", "input": "Hello"})
    generation = uploaded.json()["generation"]
    item = answer["output"][0]["id"]
    return Belongings(f"{who}s", generation, checkpoint, file, job, export["id"], answer["id"], item)


def continuing(model: str) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": {"init_from": model}}}


def bodies(of: Belongings, own_file: str) -> dict[str, list[dict[str, Any]]]:
    """What a body can say about somebody's things, by `METHOD template`."""
    models = [of.name, f"{of.name}@{of.generation[:8]}", f"tiny:{of.name}", of.checkpoint]
    message = {"messages": [{"role": "user", "content": "hi"}]}
    jobs = [
        {"model": "tiny", "training_file": of.file},
        {"model": "tiny", "training_file": own_file, "validation_file": of.file},
        *({"model": model, "training_file": own_file} for model in models),
        *({"model": "tiny", "training_file": own_file, "method": continuing(model)} for model in models),
    ]
    return {
        "POST /v1/completions": [{"model": model, "prompt": "hi"} for model in models],
        "POST /v1/chat/completions": [{"model": model, **message} for model in models],
        "POST /v1/responses": [
            *({"model": model, "input": "hi"} for model in models),
            {"model": "tiny", "input": "hi", "previous_response_id": of.response},
            {"model": "tiny", "input": [{"type": "item_reference", "id": of.item}]},
        ],
        "POST /tokenize": [{"model": model, "prompt": "hi"} for model in models],
        "POST /detokenize": [{"model": model, "tokens": [1]} for model in models],
        "POST /v1/adapters/plan": [{"name": of.name}],
        "POST /v1/adapters/{name:path}/rollback": [{}, {"generation": of.generation[:8]}],
        "POST /v1/adapters/{name:path}/exports": [{}],
        "PATCH /v1/adapters/{name:path}": [{"description": "mine now"}],
        "POST /v1/unload_lora_adapter": [{"lora_name": of.name}],
        "POST /v1/fine_tuning/jobs": jobs,
        "POST /v1/fine_tuning/plan": jobs,
        "POST /v1/fine_tuning/jobs/{job_id}/cancel": [{}],
        "POST /v1/fine_tuning/jobs/{job_id}/pause": [{}],
        "POST /v1/fine_tuning/jobs/{job_id}/resume": [{}],
        "POST /v1/adapters/{name:path}/exports/{export_id:export_id}/cancel": [{}],
    }


# These take names that are to be new: that one is taken, everybody is told (see the test of it).
NEW_NAMES = {"POST /v1/adapters", "POST /v1/load_lora_adapter", "POST /v1/files"}
NOBODY_HAS = {"GET /v1/embeddings", "POST /v1/embeddings"}
# Routes that no tenant gets to: see test_keys.py and test_keys_api.py.
ADMINS = {"GET /v1/keys", "POST /v1/keys", "DELETE /v1/keys/{key_id}"}


@pytest.fixture
async def alices(stand: TenantStand, make_files: Callable[[int], Files]) -> Belongings:
    return await belongings(stand, "alice", make_files(0))


def requests(
    stand: TenantStand, of: Belongings, own_file: str
) -> list[tuple[str, str, str, dict[str, Any] | None]]:
    """(route, method, url, body) of everything that can be asked about somebody's things."""
    told = bodies(of, own_file)
    found: list[tuple[str, str, str, dict[str, Any] | None]] = []
    routes = [f"{method} {path}" for method, path in served(stand.app)]
    assert set(told) <= set(routes)
    for route in routes:
        method, path = route.split(" ", 1)
        assert (scopes_of(method, path) == ("admin",)) == (route in ADMINS), route
        if route in NEW_NAMES | NOBODY_HAS | ADMINS:
            continue
        assert route in told or method in ("GET", "HEAD", "DELETE"), f"say what {route} can be asked"
        found += [(route, method, of.url(path), body) for body in told.get(route, [None])]
    found.append(("GET /v1/models/{model:path}", "GET", f"/v1/models/tiny:{of.name}", None))
    for model in (f"{of.name}@{of.generation[:8]}", f"{of.name}@{'1' * 8}", of.checkpoint):
        found.append(("GET /v1/models/{model:path}", "GET", f"/v1/models/{model}", None))
        found.append(("GET /v1/adapters/{name:path}", "GET", f"/v1/adapters/{model}", None))
    for page in ("/v1/files", "/v1/fine_tuning/jobs"):
        after = of.file if page == "/v1/files" else of.job
        found.append((f"GET {page}", "GET", f"{page}?after={after}", None))
    exports = f"/v1/adapters/{of.name}/exports"
    found.append(("GET /v1/adapters/{name:path}/exports", "GET", f"{exports}?after={of.export}", None))
    return found


def said(response: httpx.Response, of: Belongings) -> tuple[int, str]:
    text = of.hidden(response.text)
    return response.status_code, re.sub(r'"(created|created_at)": ?\d+', "", text)


async def test_others_things_are_as_if_they_did_not_exist(stand: TenantStand, alices: Belongings) -> None:
    own_file = await stand.upload_rows("bob", "bobs.jsonl")
    before = stand.catalog.registry.list()
    theirs = requests(stand, alices, own_file)
    nobodys = requests(stand, NOBODYS, own_file)
    asked = 0
    for (route, method, url, body), (_, _, other_url, other_body) in zip(theirs, nobodys, strict=True):
        response = await stand.ask("bob", method, url, json=body)
        text = response.text + str(response.headers)
        if (
            body is None and url == route.partition(" ")[2]
        ):  # nothing of hers was named: nothing of hers may come
            assert scopes_of(method, url) == OPEN or response.status_code in (200, 403), route
            leaked = [value for value in vars(alices).values() if value in text]
            assert (leaked, "alice" in text) == ([], False), (route, response.text)
            continue
        control = await stand.ask("bob", method, other_url, json=other_body)
        assert response.status_code in (400, 404) or scopes_of(*route.split(" ", 1)) == OPEN, (route, body)
        assert said(response, alices) == said(control, NOBODYS), (route, body)
        asked += 1
    assert asked > 60
    assert stand.catalog.registry.list() == before
    assert not stand.jobs.get(alices.job).record.ended
    assert stand.exports.get(alices.name, alices.export).job.status == "queued"


async def test_the_same_requests_work_for_whose_things_they_are(
    stand: TenantStand, alices: Belongings
) -> None:
    """Else the test above would find nothing where there is nothing."""
    own_file = await stand.upload_rows("alice", "second.jsonl")
    skipped = ("DELETE", "PATCH")
    changing = re.compile(r"/(cancel|pause|resume|rollback|download)$|unload_lora_adapter|11111111")
    for who in ("alice", "admin"):
        for route, method, url, body in requests(stand, alices, own_file):
            if method in skipped or changing.search(f"{url}") or changing.search(str(body)):
                continue
            response = await stand.ask(who, method, url, json=body)
            if route in ("GET /metrics", "HEAD /metrics"):
                assert response.status_code == (403 if who == "alice" else 200)
                continue
            if "/plan" in route and body and "training_file" in body:
                continue  # this engine's base has no shape to plan with
            assert response.is_success, (who, route, body, response.text)
    listed = (await stand.ok("alice", "GET", "/v1/models"))["data"]
    assert {alices.name, alices.checkpoint} <= {model["id"] for model in listed}
    items = await stand.ok("alice", "GET", f"/v1/responses/{alices.response}/input_items")
    assert items["data"]


async def test_their_owner_may_change_and_delete_them(stand: TenantStand, alices: Belongings) -> None:
    job = f"/v1/fine_tuning/jobs/{alices.job}"
    export = f"/v1/adapters/{alices.name}/exports/{alices.export}"
    for method, url in (
        ("PATCH", f"/v1/adapters/{alices.name}"),
        ("POST", f"{export}/cancel"),
        ("DELETE", export),
        ("POST", f"{job}/pause"),
        ("POST", f"{job}/resume"),
        ("POST", f"{job}/cancel"),
        ("DELETE", f"/v1/files/{alices.file}"),
        ("DELETE", f"/v1/responses/{alices.response}"),
        ("DELETE", f"/v1/models/{alices.checkpoint}"),
        ("DELETE", f"/v1/adapters/{alices.name}"),
    ):
        response = await stand.ask(
            "alice", method, url, json={"description": "x"} if method == "PATCH" else None
        )
        assert response.status_code == 200, (url, response.text)


# --- names ---------------------------------------------------------------------------------------------------------------


async def test_a_name_that_somebody_has_is_taken(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    await stand.upload("alice", "hers", make_files(0))
    for number, more in ((0, {}), (1, {}), (1, {"overwrite": "true"})):
        response = await stand.upload("bob", "hers", make_files(number), **more)
        assert refused(response) == (409, "name_taken")
        assert response.headers["x-should-retry"] == "false"
        assert "alice" not in response.text
    pull = {"name": "hers", "source": "hf://org/repo", "overwrite": True}
    assert refused(await stand.ask("bob", "POST", "/v1/adapters", json=pull)) == (409, "name_taken")
    load = {"lora_name": "hers", "lora_path": "x", "load_inplace": True}
    assert refused(await stand.ask("bob", "POST", "/v1/load_lora_adapter", json=load)) == (409, "name_taken")
    assert (await stand.ok("alice", "GET", "/v1/adapters/hers"))["generation"]
    assert stand.catalog.registry.get("hers").owner == "alice"
    assert (await stand.upload("bob", "his", make_files(0))).status_code == 201  # the same files


async def test_a_name_that_is_taken_while_an_upload_comes_in(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    stand.engine.held = asyncio.Event()
    upload = asyncio.create_task(stand.upload("bob", "new", make_files(0)))
    async with asyncio.timeout(PATIENCE_S):
        while not stand.engine.verified:
            await asyncio.sleep(0.01)
    record = stand.catalog.registry.put(
        "new", stand.engine.verified[0].generation, source="upload", access=Access("alice")
    )
    stand.engine.held.set()
    assert refused(await upload) == (409, "name_taken")
    assert stand.catalog.registry.get("new") == record


async def test_shared_adapters_are_seen_by_all_and_changed_by_the_admin(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    await stand.upload("admin", "shared", make_files(0))
    await stand.upload("admin", "shared", make_files(1), overwrite="true")
    for who in ("alice", "bob"):
        assert [one["id"] for one in (await stand.ok(who, "GET", "/v1/adapters"))["data"]] == ["shared"]
        answer = await stand.ask(who, "POST", "/v1/completions", json={"model": "shared", "prompt": "hi"})
        assert answer.status_code == 200
        for method, url, body in (
            ("PATCH", "/v1/adapters/shared", {"description": "x"}),
            ("POST", "/v1/adapters/shared/rollback", {}),
            ("DELETE", "/v1/adapters/shared", None),
            ("DELETE", "/v1/models/shared", None),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "shared"}),
            (
                "POST",
                "/v1/load_lora_adapter",
                {"lora_name": "shared", "lora_path": "x", "load_inplace": True},
            ),
        ):
            response = await stand.ask(who, method, url, json=body)
            assert refused(response) == (403, "permission_denied"), url
        response = await stand.upload(who, "shared", make_files(2), overwrite="true")
        assert refused(response) == (403, "permission_denied")
        assert (await stand.ask(who, "GET", "/v1/adapters/shared/download")).status_code == 200
    exports = [
        await stand.ok(who, "POST", "/v1/adapters/shared/exports", json={}) for who in ("alice", "bob")
    ]
    for who, export in zip(("alice", "bob"), exports, strict=True):
        listed = await stand.ok(who, "GET", "/v1/adapters/shared/exports")
        assert [one["id"] for one in listed["data"]] == [export["id"]]
    listed = await stand.ok("admin", "GET", "/v1/adapters/shared/exports")
    assert {one["id"] for one in listed["data"]} == {export["id"] for export in exports}
    assert (await stand.ok("admin", "PATCH", "/v1/adapters/shared", json={"description": "x"}))[
        "description"
    ] == "x"


async def test_the_admin_may_do_everything_and_takes_nothing_over(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    await stand.upload("alice", "hers", make_files(0))
    replaced = await stand.upload("admin", "hers", make_files(1), overwrite="true")
    assert replaced.status_code == 201
    assert (await stand.ok("alice", "GET", "/v1/adapters/hers"))["generation"] == replaced.json()[
        "generation"
    ]
    assert (await stand.ask("bob", "GET", "/v1/adapters/hers")).status_code == 404
    assert (await stand.ask("admin", "DELETE", "/v1/adapters/hers")).status_code == 200


async def test_several_keys_of_a_tenant_are_one_tenant(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    stand.keys["second"] = stand.key("alice", "infer")[1]
    await stand.upload("alice", "hers", make_files(0))
    assert [one["id"] for one in (await stand.ok("second", "GET", "/v1/models"))["data"]] == [
        "tiny",
        "gpt-4",
        "hers",
    ]


async def test_only_the_admin_pins(stand: TenantStand, make_files: Callable[[int], Files]) -> None:
    response = await stand.upload("alice", "hers", make_files(0), pinned="true")
    assert refused(response) == (403, "permission_denied")
    assert (await stand.upload("alice", "hers", make_files(0))).status_code == 201
    response = await stand.ask("alice", "PATCH", "/v1/adapters/hers", json={"pinned": True})
    assert refused(response) == (403, "permission_denied")
    assert (await stand.ok("admin", "PATCH", "/v1/adapters/hers", json={"pinned": True}))["pinned"] is True


# --- side channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("salt", [None, "x"])
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_tenants_share_nothing_in_the_prefix_cache(
    url: str, salt: str | None, stand: TenantStand
) -> None:
    said_as: Mapping[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/responses": {"input": "hi"},
    }
    body = {"model": "tiny", **said_as[url], **({"cache_salt": salt} if salt else {})}
    stand.keys["second"] = stand.key("alice", "infer")[1]
    for who in ("alice", "second", "bob", "admin"):
        assert (await stand.ask(who, "POST", url, json=body)).status_code == 200
    alice, second, bob, admin = (call.params.cache_salt for call in stand.engine.calls)
    assert alice == second
    assert len({alice, bob, admin}) == 3
    assert admin == salt


async def test_a_salt_does_not_open_another_tenants_cache(stand: TenantStand) -> None:
    for who, salt in (("alice", None), ("al", "ice"), ("bob", '["alice", null]'), ("bob", "alice")):
        body = {"model": "tiny", "prompt": "hi", **({"cache_salt": salt} if salt else {})}
        assert (await stand.ask(who, "POST", "/v1/completions", json=body)).status_code == 200
    assert len({call.params.cache_salt for call in stand.engine.calls}) == 4


async def test_equal_idempotency_keys_of_two_tenants_are_two(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    headers = {"idempotency-key": "same"}
    parts = {"file": ("rows.jsonl", b'{"a": 1}\n', "application/octet-stream")}
    ids = [
        (
            await stand.ok(
                who, "POST", "/v1/files", files=parts, data={"purpose": "fine-tune"}, headers=headers
            )
        )["id"]
        for who in ("alice", "alice", "bob")
    ]
    assert ids[0] == ids[1] != ids[2]


async def test_a_plan_names_nobody_elses_adapters(
    stand: TenantStand, make_files: Callable[[int], Files]
) -> None:
    hers = (await stand.upload("alice", "hers", make_files(0))).json()["generation"]
    await stand.upload("bob", "his", make_files(1))
    slot = DeviceSlot(hers, 0, 64, 0, False, False)
    stand.engine.stats = stats(device_adapters=[hers], device_slots=[slot], host_adapters=[hers])
    for who, shown in (("bob", "another tenant's"), ("admin", "hers")):
        plan = await stand.ok(who, "POST", "/v1/adapters/plan", json={"name": "his"})
        assert plan["device"]["would_evict"] == [shown]


# --- quotas --------------------------------------------------------------------------------------------------------------


async def test_a_quota_of_adapters(make: Make, make_files: Callable[[int], Files]) -> None:
    stand = make(quota=Quota(adapters=1))
    file = await stand.upload_rows("alice")
    job = {"model": "tiny", "training_file": file}
    assert (await stand.upload("alice", "one", make_files(0))).status_code == 201
    for response in (
        await stand.upload("alice", "two", make_files(1)),
        await stand.ask("alice", "POST", "/v1/fine_tuning/jobs", json=job),
    ):
        assert refused(response) == (403, "quota_exceeded")
        assert "has 1 adapters, and may have 1" in response.text
    assert stand.engine.verified[1:] == []  # it was known before the files were read
    assert (await stand.upload("alice", "one", make_files(1), overwrite="true")).status_code == 201
    assert (await stand.upload("bob", "his", make_files(1))).status_code == 201
    for number in range(2):
        assert (await stand.upload("admin", f"shared-{number}", make_files(number))).status_code == 201
    await stand.ok("alice", "DELETE", "/v1/adapters/one")
    assert (await stand.upload("alice", "two", make_files(1))).status_code == 201


async def test_a_quota_of_bytes(make: Make, make_files: Callable[[int], Files]) -> None:
    size = 1792  # of one adapter's tensors
    stand = make(quota=Quota(num_bytes=2 * size))
    assert (await stand.upload("alice", "one", make_files(0))).status_code == 201
    assert (await stand.upload("alice", "again", make_files(0))).status_code == 201  # the same bytes
    assert (await stand.upload("alice", "one", make_files(1), overwrite="true")).status_code == 201
    response = await stand.upload("alice", "one", make_files(2), overwrite="true")
    assert refused(response) == (403, "quota_exceeded")
    assert f"take {2 * size} bytes" in response.text
    left = stand.catalog.registry.get("one")
    assert len(left.history) == 2
    await stand.ok("alice", "DELETE", "/v1/adapters/one")
    assert (await stand.upload("alice", "one", make_files(2))).status_code == 201


async def test_training_is_not_lost_to_a_quota(make: Make) -> None:
    stand = make(quota=Quota(adapters=1))
    file = await stand.upload_rows("alice")
    job = (
        await stand.ok("alice", "POST", "/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file})
    )["id"]
    stand.jobs.start()
    assert stand.engine.gate is not None
    for _ in range(4):
        stand.engine.gate.release()
    async with asyncio.timeout(PATIENCE_S):
        while (shown := await stand.ok("alice", "GET", f"/v1/fine_tuning/jobs/{job}"))[
            "status"
        ] != "succeeded":
            await asyncio.sleep(0.02)
    owners = {record.owner for record in stand.catalog.registry.list()}
    assert owners == {"alice"}
    assert len(stand.catalog.registry) > 1
    for result in shown["result_files"]:
        assert (await stand.ask("alice", "GET", f"/v1/files/{result}/content")).status_code == 200
        assert (await stand.ask("bob", "GET", f"/v1/files/{result}/content")).status_code == 404


# --- what was there before keys --------------------------------------------------------------------------------------------


async def test_what_was_made_without_keys_is_the_operators(
    make: Make, make_files: Callable[[int], Files]
) -> None:
    stand = make(admin_keys=())
    open_client = stand.client
    parts = [(part, (part, data)) for part, data in make_files(0).items()]
    uploaded = await open_client.post("/v1/adapters", data={"name": "old"}, files=parts)
    assert uploaded.status_code == 201
    rows = {"file": ("rows.jsonl", b"{}\n", "application/octet-stream")}
    file = (await open_client.post("/v1/files", files=rows, data={"purpose": "fine-tune"})).json()["id"]
    stand.keys["admin"] = stand.key("default", "admin")[1]
    assert (await stand.ask("alice", "GET", "/v1/adapters/old")).status_code == 200
    assert (await stand.ask("alice", "DELETE", "/v1/adapters/old")).status_code == 403
    assert (await stand.ask("alice", "GET", f"/v1/files/{file}")).status_code == 404
    assert (await stand.ask("admin", "GET", f"/v1/files/{file}")).status_code == 200
