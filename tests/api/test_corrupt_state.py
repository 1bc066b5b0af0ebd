"""Damaged files below the data directory: named in the log, set aside, and the rest is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import BaseGeometry
from loramux_server.exports.jobs import RECORD, open_jobs
from loramux_server.training.database import open_database
from loramux_server.training.files import FileStore
from tests.adapters.conftest import adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import CatalogStand, Files, make_files, make_stand, roots, stand

__all__ = ["adapter_files", "make_files", "make_lora_weights", "roots", "stand", "tiny_geometry"]  # fixtures

ASK = {"prompt": "x", "max_tokens": 2}


async def test_a_damaged_adapter_is_refused_and_the_others_answer(
    stand: CatalogStand,
    make_files: Callable[[int], Files],
    tmp_path: Path,
    tiny_geometry: BaseGeometry,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number in range(2):
        assert (await stand.upload(f"adapter-{number}", make_files(number))).status_code == 201
    damaged = (await stand.show("adapter-1"))["generation"]
    manifest = stand.catalog.registry.store.path(damaged) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{")
    stand.catalog.close()
    again = make_stand(tmp_path, tiny_geometry, tokenizer)
    assert f"generation {damaged[:12]} has no readable manifest" in caplog.text
    assert ".corrupt-" in caplog.text
    async with again.client as client:
        assert (await client.post("/v1/completions", json=ASK | {"model": "adapter-0"})).status_code == 200
        refused = await client.post("/v1/completions", json=ASK | {"model": "adapter-1"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
        assert (await again.upload("adapter-1", make_files(1))).status_code == 201
        assert (await client.post("/v1/completions", json=ASK | {"model": "adapter-1"})).status_code == 200
    again.catalog.close()


async def test_a_damaged_registry_is_set_aside_with_its_store(
    stand: CatalogStand,
    make_files: Callable[[int], Files],
    tmp_path: Path,
    tiny_geometry: BaseGeometry,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert (await stand.upload("adapter", make_files(0))).status_code == 201
    root = stand.catalog.staging.parent
    stand.catalog.close()
    (root / "adapters.sqlite3").write_bytes(b"not a database, but long enough to be read as one" * 100)
    again = make_stand(tmp_path, tiny_geometry, tokenizer)
    assert "the adapter registry is damaged: file is not a database" in caplog.text
    async with again.client as client:
        assert (await client.post("/v1/completions", json=ASK | {"model": "tiny"})).status_code == 200
        assert (await client.get("/v1/adapters")).json()["data"] == []
        assert (await again.upload("adapter", make_files(0))).status_code == 201
    again.catalog.close()
    assert len(list(root.glob("generations.corrupt-*/??/*/manifest.json"))) == 1


@pytest.mark.parametrize("damage", ["file", "record"])
def test_a_damaged_job_database_keeps_the_files_it_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(tmp_path)
    files = FileStore(tmp_path / "files", database)
    (source := tmp_path / "rows.jsonl").write_text("{}\n")
    kept = files.add(source, "rows.jsonl", "fine-tune")
    (tmp_path / "jobs" / "ftjob-1").mkdir(parents=True)
    if damage == "record":
        database._connection.execute("INSERT INTO jobs (id, record) VALUES ('ftjob-1', '{\"id\": 1')")
    database.close()
    if damage == "file":
        (tmp_path / "training.sqlite3").write_bytes(b"x" * 8192)
    again = open_database(tmp_path)
    assert "the fine-tuning database" in caplog.text
    assert again.jobs() == []
    FileStore(tmp_path / "files", again)
    assert [path.name for path in tmp_path.glob("files.corrupt-*/*")] == [kept.id]
    assert [path.name for path in tmp_path.glob("jobs.corrupt-*/*")] == ["ftjob-1"]
    again.close()


def test_an_export_without_a_readable_record_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "export-1").mkdir()
    (tmp_path / "export-1" / RECORD).write_text("{")
    (tmp_path / "export-2").mkdir()  # half created
    assert list(open_jobs(tmp_path)) == []
    assert "export export-1 has no readable record" in caplog.text
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("export-1.corrupt-")
    assert list(open_jobs(tmp_path)) == []
    assert (kept / RECORD).read_text() == "{"
