"""Proof at load over HTTP: what is refused and leaves nothing, what is shown of the rest, and when nobody can verify."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.errors import EngineError
from loramux_adapters.verify_report import Verdict, VerifyReport
from loramux_server.engine.interface import EngineState
from loramux_server.folders import AdapterFolders
from tests.adapters.conftest import AdapterFiles, adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import (
    CatalogStand,
    Files,
    contents,
    fault,
    files,
    make_files,
    roots,
    stand,
)
from tests.api.test_adapters_api import FakeHub
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


@pytest.fixture
def zeros(adapter_files: AdapterFiles, tmp_path: Path) -> Files:
    """An adapter that changes nothing."""
    tensors = {
        name: torch.zeros_like(tensor) if "lora_B" in name else tensor
        for name, tensor in adapter_files.tensors.items()
    }
    return contents(replace(adapter_files, tensors=tensors), tmp_path / "zeros")


def stored(stand: CatalogStand) -> list[str]:
    return list(stand.catalog.registry.store)


def check_refused(response: httpx.Response, reason: str) -> None:
    error = fault(response)
    assert (response.status_code, error["code"]) == (400, "invalid_adapter")
    assert reason in error["message"]
    assert [one["where"] for one in error["faults"]] == ["adapter_model.safetensors"]


async def test_what_changes_nothing_is_refused_and_leaves_nothing(stand: CatalogStand, zeros: Files) -> None:
    refused = await stand.upload("a", zeros)
    check_refused(
        refused, "adapter 'a' is refused: adapter_model.safetensors: it is zero; allow_noop accepts it"
    )
    assert [one.generation for one in stand.engine.verified] != []
    assert (len(stand.catalog.registry), stored(stand)) == (0, [])
    assert value(stand.metrics, "adapters_rejected_total") == 1
    assert (await stand.client.get("/v1/adapters/a")).status_code == 404


async def test_allow_noop_accepts_it_and_the_report_says_so(stand: CatalogStand, zeros: Files) -> None:
    accepted = await stand.upload("a", zeros, allow_noop="true")
    assert accepted.status_code == 201
    verification = accepted.json()["verification"]
    assert (verification["verdict"], verification["report"]["reason"]) == ("noop", "it is zero")
    assert verification["report"]["weights"]["nonzero_tensors"] == 0.5
    assert len(verification["report"]["weights"]["zero_modules"]) == 4


@pytest.mark.parametrize("verdict", ["disagrees", "not_finite"])
async def test_what_is_wrong_is_refused_whatever_is_allowed(
    stand: CatalogStand, files: Files, verdict: Verdict
) -> None:
    stand.engine.finding = (verdict, "it answers nonsense")
    check_refused(await stand.upload("a", files, allow_noop="true"), "it answers nonsense")
    assert (len(stand.catalog.registry), stored(stand)) == (0, [])


async def test_the_report_is_shown_and_the_list_has_its_verdict(stand: CatalogStand, files: Files) -> None:
    card = (await stand.upload("a", files)).json()
    shown = (await stand.show("a"))["verification"]
    assert shown == card["verification"]
    assert shown["verdict"] == "ok"
    assert 0 <= card["created"] - shown["checked_at"] <= 60
    report = VerifyReport.from_json(shown["report"])
    assert report.generation == card["generation"]
    assert len(report.weights.modules) == 4
    assert all(module.relative > 0 for module in report.weights.modules)
    [listed] = (await stand.client.get("/v1/adapters")).json()["data"]
    assert listed["verification"] == {"verdict": "ok"}
    patched = await stand.client.patch("/v1/adapters/a", json={"description": "d"})
    assert patched.json()["verification"] == shown


async def test_a_refused_replacement_changes_nothing(stand: CatalogStand, files: Files, zeros: Files) -> None:
    await stand.upload("a", files)
    before = await stand.show("a")
    check_refused(await stand.upload("a", zeros, overwrite="true", description="new"), "it is zero")
    assert await stand.show("a") == before
    assert stored(stand) == [before["generation"]]


async def test_verify_false_skips_and_says_so(stand: CatalogStand, zeros: Files) -> None:
    card = (await stand.upload("a", zeros, verify="false")).json()
    assert card["verification"] == {"verdict": "skipped"} == (await stand.show("a"))["verification"]
    assert stand.engine.verified == []
    [listed] = (await stand.client.get("/v1/adapters")).json()["data"]
    assert listed["verification"] == {"verdict": "skipped"}
    await stand.upload("a", zeros, allow_noop="true")
    assert (await stand.show("a"))["verification"]["verdict"] == "noop"
    await stand.upload("b", zeros, verify="no")  # the generation is known by now
    assert (await stand.show("b"))["verification"]["verdict"] == "noop"


async def test_a_refusal_spares_what_has_another_name(stand: CatalogStand, zeros: Files) -> None:
    card = (await stand.upload("kept", zeros, allow_noop="true")).json()
    check_refused(await stand.upload("a", zeros), "it is zero")
    assert (await stand.show("kept"))["verification"] == card["verification"]
    assert stored(stand) == [card["generation"]]


async def test_equal_uploads_of_which_one_is_refused(stand: CatalogStand, zeros: Files) -> None:
    """Both are candidates of one generation at the same time: the refusal of one must not take the other's files."""
    stand.engine.held = asyncio.Event()
    uploads = [
        asyncio.create_task(stand.upload("no", zeros)),
        asyncio.create_task(stand.upload("yes", zeros, allow_noop="true")),
    ]
    while len(stand.engine.verified) < 2:
        await asyncio.sleep(0.005)
    stand.engine.held.set()
    refused, accepted = await asyncio.gather(*uploads)
    check_refused(refused, "it is zero")
    assert accepted.status_code == 201
    stand.catalog.registry.store.verify(accepted.json()["generation"])


async def test_nothing_is_visible_before_the_verdict_and_nothing_is_swept(
    stand: CatalogStand, files: Files
) -> None:
    stand.engine.held = asyncio.Event()
    uploading = asyncio.create_task(stand.upload("a", files, pinned="true"))
    while not stand.engine.verified:
        await asyncio.sleep(0.005)
    assert stored(stand) == [stand.engine.verified[0].generation]
    assert (await stand.client.get("/v1/adapters/a")).status_code == 404
    answer = await stand.client.post("/v1/completions", json={"model": "a", "prompt": "x"})
    assert answer.status_code == 404
    assert stand.engine.pins == []
    await asyncio.to_thread(stand.catalog.sweep, min_age=-1.0)
    stand.engine.held.set()
    assert (await uploading).status_code == 201
    assert [one.generation for one in stand.engine.pins] == stored(stand)


async def test_a_worker_that_dies_meanwhile_is_503_and_leaves_nothing(
    stand: CatalogStand, files: Files
) -> None:
    stand.engine.failure = EngineError("the adapter could not be verified: the engine is restarting")
    failed = await stand.upload("a", files)
    assert (failed.status_code, fault(failed)["code"]) == (503, "engine_unavailable")
    assert failed.headers["retry-after"] == "5"
    assert "could not be verified" in fault(failed)["message"]
    assert (len(stand.catalog.registry), stored(stand), stand.staged) == (0, [], [])
    stand.engine.failure = None
    assert (await stand.upload("a", files)).status_code == 201


@pytest.mark.parametrize("state", ["restarting", "starting"])
async def test_without_a_worker_uploads_are_503(
    stand: CatalogStand, files: Files, state: EngineState
) -> None:
    stand.engine.state = state
    failed = await stand.upload("a", files)
    assert (failed.status_code, failed.headers["retry-after"]) == (503, "5")
    assert fault(failed)["message"].startswith(f"the engine is {state}, and verifies uploads")
    assert (stand.engine.verified, stored(stand)) == ([], [])
    assert (await stand.upload("a", files, verify="false")).status_code == 201


async def test_a_failed_upload_with_a_key_may_be_tried_again(stand: CatalogStand, files: Files) -> None:
    stand.engine.failure = EngineError("restarting")
    answers = await asyncio.gather(*(stand.upload("a", files, key="k") for _ in range(4)))
    assert {answer.status_code for answer in answers} == {503}
    stand.engine.failure = None
    answers = await asyncio.gather(*(stand.upload("a", files, key="k") for _ in range(4)))
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    assert len(stand.engine.verified) == 2


async def test_rollback_shows_what_that_generation_was(
    stand: CatalogStand, files: Files, zeros: Files
) -> None:
    await stand.upload("a", files)
    await stand.upload("a", zeros, overwrite="true", allow_noop="true")
    assert (await stand.show("a"))["verification"]["verdict"] == "noop"
    back = await stand.client.post("/v1/adapters/a/rollback", json={})
    assert back.json()["verification"]["verdict"] == "ok"


async def test_json_uploads_have_the_same_options(
    stand: CatalogStand, zeros: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_server.api.routes.adapters.HuggingFaceHub", FakeHub)
    monkeypatch.setattr(FakeHub, "files", zeros, raising=False)

    async def pull(**fields: Any) -> httpx.Response:
        body = {"name": "a", "source": "hf://org/repo@main", **fields}
        return await stand.client.post("/v1/adapters", json=body)

    check_refused(await pull(), "it is zero")
    assert (await pull(verify="no")).status_code == 400
    assert (await pull(verify=False)).json()["verification"] == {"verdict": "skipped"}
    assert (await pull(allow_noop=True)).json()["verification"]["verdict"] == "noop"
    patched = await stand.client.patch("/v1/adapters/a", json={"verify": False})
    assert (patched.status_code, fault(patched)["param"]) == (400, "verify")


async def test_vllms_route_verifies(
    stand: CatalogStand, zeros: Files, files: Files, roots: tuple[Path, ...]
) -> None:
    folder = roots[0] / "a"
    folder.mkdir(parents=True)

    async def load(content: Files) -> httpx.Response:
        for name in ADAPTER_FILES:
            (folder / name).write_bytes(content[name])
        body = {"lora_name": "a", "lora_path": "a"}
        return await stand.client.post("/v1/load_lora_adapter", json=body)

    check_refused(await load(zeros), "it is zero")
    assert stored(stand) == []
    assert (await load(files)).status_code == 200
    assert (await stand.show("a"))["verification"]["verdict"] == "ok"


async def test_folders_are_not_verified(
    stand: CatalogStand, make_files: Callable[[int], Files], tmp_path: Path
) -> None:
    make_files(3)
    await asyncio.to_thread(AdapterFolders(stand.catalog, []).add_modules, {"a": tmp_path / "adapter-3"})
    assert (await stand.show("a"))["verification"] is None
    [listed] = (await stand.client.get("/v1/adapters")).json()["data"]
    assert listed["verification"] is None
    assert stand.engine.verified == []
