"""The files API: what goes in comes out, durable when it is answered, and nothing stays of what was refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import BaseGeometry
from loramux_server.api.routes import files as files_route
from loramux_server.api.uploads import Form
from tests.adapters.conftest import tiny_geometry
from tests.api.catalog_support import fault
from tests.api.training_support import ROWS, TrainingStand

__all__ = ["tiny_geometry"]  # fixtures


@pytest.fixture
async def stand(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> AsyncIterator[TrainingStand]:
    stand = TrainingStand.open(tmp_path, tiny_geometry, tokenizer)
    yield stand
    staging = stand.catalog.staging
    assert not staging.exists() or not list(staging.iterdir())
    await stand.close()


async def post(
    stand: TrainingStand, files: dict[str, Any] | None, data: dict[str, str], key: str | None = None
) -> httpx.Response:
    headers = {"idempotency-key": key} if key else {}
    return await stand.client.post("/v1/files", files=files, data=data, headers=headers)


async def test_the_life_of_a_file(stand: TrainingStand) -> None:
    created = await post(stand, {"file": ("träin.jsonl", ROWS)}, {"purpose": "fine-tune"})
    file = created.json()
    assert created.status_code == 200
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(ROWS),
        "created_at": file["created_at"],
        "filename": "träin.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
    url = f"/v1/files/{file['id']}"
    assert await stand.get(url) == file
    content = await stand.client.get(f"{url}/content")
    assert content.content == ROWS
    assert "tr%C3%A4in.jsonl" in content.headers["content-disposition"]
    assert (await stand.client.delete(url)).json() == {"id": file["id"], "object": "file", "deleted": True}
    for gone in (
        await stand.client.get(url),
        await stand.client.delete(url),
        await stand.client.get(f"{url}/content"),
    ):
        assert (gone.status_code, fault(gone)["code"], fault(gone)["param"]) == (404, "file_not_found", "id")
    assert stand.left("files") == []


async def test_lists(stand: TrainingStand) -> None:
    ids = [await stand.upload(name=f"{number}.jsonl") for number in range(3)]
    newest = await stand.get("/v1/files?limit=2")
    assert ([f["id"] for f in newest["data"]], newest["has_more"]) == ([ids[2], ids[1]], True)
    assert (newest["object"], newest["first_id"], newest["last_id"]) == ("list", ids[2], ids[1])
    rest = await stand.get(f"/v1/files?after={ids[1]}")
    assert ([f["id"] for f in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    oldest = await stand.get(f"/v1/files?order=asc&after={ids[0]}&purpose=fine-tune")
    assert [f["id"] for f in oldest["data"]] == ids[1:]
    assert (await stand.get("/v1/files?purpose=batch"))["data"] == []
    for query, param, status in (
        ("after=file-x", "after", 404),
        ("order=up", "order", 400),
        ("limit=0", "limit", 400),
    ):
        refused = await stand.client.get(f"/v1/files?{query}")
        assert (refused.status_code, fault(refused)["param"]) == (status, param)


async def test_what_was_answered_outlives_a_crash(
    stand: TrainingStand, tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> None:
    kept = await stand.upload()
    (stand.base / "files" / "file-leftover").write_bytes(b"of a crash")
    stand.catalog.close()  # its lock; everything else is as a killed server leaves it
    again = TrainingStand.open(tmp_path, tiny_geometry, tokenizer)
    assert again.left("files") == [kept]
    assert (await again.client.get(f"/v1/files/{kept}/content")).content == ROWS
    await again.close()


FILE = {"file": ("a.jsonl", ROWS)}
REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, str], str, str]] = {
    "no purpose": (FILE, {}, "purpose", "purpose: is missing"),
    "purpose": (
        FILE,
        {"purpose": "batch"},
        "purpose",
        "purpose: is 'batch', this server takes files for 'fine-tune'",
    ),
    "no file": ({"purpose": (None, b"fine-tune")}, {}, "file", "file: is missing"),
    "empty": ({"file": ("a.jsonl", b"")}, {"purpose": "fine-tune"}, "file", "file: is empty"),
    "expiry": (
        FILE,
        {"purpose": "fine-tune", "expires_after[anchor]": "created_at"},
        "expires_after",
        "'expires_after' is not supported",
    ),
    "unknown part": (FILE, {"purpose": "fine-tune", "name": "x"}, "name", "'name' is no part of an upload"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_bad_uploads(stand: TrainingStand, case: str) -> None:
    files, data, param, sentence = REFUSED[case]
    response = await post(stand, files, data)
    assert (response.status_code, fault(response)["param"]) == (400, param), response.text
    assert fault(response)["message"].startswith(sentence), response.text
    assert stand.left("files") == []


async def test_too_large_and_no_form(stand: TrainingStand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_route, "_FORM", Form({"file": 100}, ("purpose",), 10**6))
    large = await post(stand, {"file": ("a.jsonl", bytes(101))}, {"purpose": "fine-tune"})
    assert (large.status_code, fault(large)["param"]) == (413, "file")
    json_body = await stand.client.post("/v1/files", json={"purpose": "fine-tune"})
    assert "multipart/form-data" in fault(json_body)["message"]
    wrong = await stand.client.put("/v1/files", content=b"")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")
    assert stand.left("files") == []


async def test_a_key_makes_one_file(stand: TrainingStand) -> None:
    answers = await asyncio.gather(
        *(post(stand, {"file": ("a.jsonl", ROWS)}, {"purpose": "fine-tune"}, "k") for _ in range(2))
    )
    assert answers[0].content == answers[1].content
    assert len(stand.left("files")) == 1
    other = await post(stand, {"file": ("b.jsonl", ROWS)}, {"purpose": "fine-tune"}, "k")
    assert fault(other)["code"] == "idempotency_key_reused"


async def test_names_are_only_names(stand: TrainingStand) -> None:
    head = b'--XyZ\r\nContent-Disposition: form-data; name="'
    named = head + b'file"; filename="../../etc/pass\x07wd"\r\n\r\n' + ROWS + b"\r\n"
    body = named + head + b'purpose"\r\n\r\nfine-tune\r\n--XyZ--\r\n'
    form = {"content-type": "multipart/form-data; boundary=XyZ"}
    response = await stand.client.post("/v1/files", content=body, headers=form)
    assert response.json()["filename"] == "passwd"
    job = await stand.create(training_file=await stand.upload(name="../..x"))
    kept = stand.live(job).folder.file("training_file")
    assert kept is not None
    assert kept.name == "x"
