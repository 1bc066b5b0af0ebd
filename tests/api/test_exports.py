"""Exports over HTTP with real child processes: life, queue, cancel, restart, deletion, download, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.export import (
    ExportOptions,
    Format,
    VerifyOptions,
    WeightedAdapter,
    plan_export,
    run_export,
)
from loramux_server.exports import manager
from loramux_server.exports.jobs import JobFault
from loramux_server.exports.process import ExportProcess, Observer
from tests.api.catalog_support import fault
from tests.api.export_support import (
    PATIENCE_S,
    SHORT,
    ExportStand,
    TinyBase,
    contents,
    make_tiny_base,
    unpacked,
    url_of,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return make_tiny_base(tmp_path_factory.mktemp("exports"))


@pytest.fixture
async def stand(
    tmp_path: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast
) -> AsyncIterator[ExportStand]:
    stand = ExportStand.open(tmp_path, base, tokenizer)
    stand.exports.start()
    yield stand
    await stand.close()


async def test_the_life_of_an_export(stand: ExportStand, base: TinyBase, tmp_path: Path) -> None:
    job = await stand.create(shard_size="50KB", **SHORT)
    assert (job["object"], job["adapter"], job["shard_size"]) == ("adapter.export", "plain", 50_000)
    done = await stand.ended(job)
    assert (done["status"], done["error"], done["progress"]["fraction"]) == ("succeeded", None, 1.0)
    assert done["report"]["verification"]["passed"] is True
    assert done["report"]["base"]["quantization_identity"] == base.geometry.identity

    # the same program as the command: the same bytes
    verify = VerifyOptions(prompts=1, tokens=16)
    adapters = (WeightedAdapter(base.adapters["plain"]),)
    options = ExportOptions(base.directory, adapters, tmp_path / "by-hand", shard_bytes=50_000, verify=verify)
    expected = contents(run_export(plan_export(options)).out)
    response = await stand.client.get(f"{url_of(job)}/download")
    tops, files = unpacked(response.content)
    assert tops == {"plain-bf16"}
    assert files == expected
    assert len(files) > 8, "several shards"
    assert int(response.headers["content-length"]) == len(response.content)
    assert done["bytes"] == sum(map(len, files.values()))

    events = (await stand.get(f"{url_of(job)}/events"))["data"]
    said = [event["message"] for event in events]
    assert [said[0], said[1], said[-1]] == ["created", "started", "succeeded"]
    assert said.index("merging") < said.index("comparing with the served model")
    stream = (await stand.client.get(f"{url_of(job)}/events", params={"stream": True})).text.split("\n\n")
    assert stream[-2:] == ["data: [DONE]", ""]
    objects = [json.loads(line.removeprefix("data: ")) for line in stream[:-2]]
    assert [o for o in objects if o["object"] == "adapter.export.event"] == events
    assert objects[-1]["fraction"] == 1.0

    listed = await stand.get("/v1/adapters/plain/exports")
    assert [item["id"] for item in listed["data"]] == [job["id"]]
    assert listed["data"][0]["report"] is None
    assert (await stand.get("/v1/adapters/team/some/exports"))["data"] == []
    foreign = await stand.client.get(url_of(job | {"adapter": "team/some"}))
    assert (foreign.status_code, fault(foreign)["code"]) == (404, "export_not_found")
    ended = await stand.client.post(f"{url_of(job)}/cancel")
    assert (ended.status_code, fault(ended)["code"]) == (400, "export_ended")

    gone = await stand.client.delete(url_of(job))
    assert gone.json() == {"object": "adapter.export.deleted", "id": job["id"], "deleted": True}
    assert (await stand.client.get(url_of(job))).status_code == 404
    assert stand.folders == []


async def test_an_adapter_deleted_meanwhile_is_exported_all_the_same(stand: ExportStand) -> None:
    both = [{"name": "team/some", "weight": -0.25}, {"name": "plain", "weight": 2}]
    job = await stand.create("team/some", adapters=both, format="fp32", **SHORT)
    registry = stand.catalog.registry
    for name in ("team/some", "plain"):
        registry.delete(name)
    assert len(registry.sweep(min_age=0)) == 2
    done = await stand.ended(job)
    assert done["status"] == "succeeded", done
    merged = {a["name"]: (a["weight"], a["generation"]) for a in done["report"]["adapters"]}
    assert merged == {a["name"].replace("/", "-"): (a["weight"], a["generation"]) for a in job["adapters"]}
    assert merged["team-some"][0] == -0.25
    assert [item["id"] for item in (await stand.get("/v1/adapters/team/some/exports"))["data"]] == [job["id"]]


async def test_one_at_a_time_and_cancelled(stand: ExportStand) -> None:
    first, second, third = [await stand.create(**SHORT) for _ in range(3)]
    await stand.until_running(first)
    assert [stand.live(job).job.status for job in (second, third)] == ["queued", "queued"]
    response = await stand.client.post(f"{url_of(second)}/cancel")
    assert response.json()["status"] == "cancelled"
    response = await stand.client.post(f"{url_of(first)}/cancel")
    assert response.json()["status"] == "cancelled"
    assert not stand.live(first).folder.partial.exists()
    refused = await stand.client.get(f"{url_of(first)}/download")
    assert (refused.status_code, fault(refused)["code"]) == (400, "export_not_ready")
    await stand.until_running(third)
    assert (await stand.client.delete(url_of(third))).status_code == 200, "a running one is cancelled first"
    assert stand.folders == sorted([first["id"], second["id"]])


async def test_a_restart_goes_on(tmp_path: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast) -> None:
    """The first server ends in the middle of an export; the second has it, and the one that waited behind it."""
    body: dict[str, Any] = {"shard_size": "20KB", "verify": 8}
    one = ExportStand.open(tmp_path, base, tokenizer)
    one.exports.start()
    running, waiting = await one.create(**body), await one.create(**body)
    partial = one.live(running).folder.partial
    async with asyncio.timeout(PATIENCE_S):
        while len(list(partial.glob("*.safetensors"))) < 3:
            await asyncio.sleep(0.002)
    await one.close()
    assert partial.exists(), "it had ended before it was interrupted"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}

    two = ExportStand.open(tmp_path, base, tokenizer)
    shown = await two.get(url_of(running))
    assert (shown["status"], shown["started"] is not None) == ("queued", True)
    two.exports.start()
    done = [await two.ended(job) for job in (running, waiting)]
    assert [job["status"] for job in done] == ["succeeded", "succeeded"]
    said = [event["message"] for event in (await two.get(f"{url_of(running)}/events"))["data"]]
    assert {"interrupted by the end of the server", "goes on with what was written"} <= set(said)
    out = two.live(running).folder.out
    again = [name for name, written in kept.items() if (out / name).stat().st_mtime_ns != written]
    assert len(again) <= 1, "only a shard that was not in the journal yet is written a second time"
    assert contents(out) == contents(two.live(waiting).folder.out)
    await two.close()


async def test_a_restart_finds_what_ended_in_between(
    tmp_path: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    one = ExportStand.open(tmp_path, base, tokenizer)  # its queue is never worked off
    ended, cut, half = [await one.create() for _ in range(3)]
    await one.close()
    folder = one.live(ended).folder
    folder.out.mkdir()
    (folder.out / "model.safetensors").write_bytes(b"12345")
    folder.save(msgspec.structs.replace(one.live(ended).job, status="running"))
    one.live(cut).folder.forget()  # a deletion that was interrupted
    (one.live(half).folder.path / ".job.json.0.partial").write_bytes(b"{")
    two = ExportStand.open(tmp_path, base, tokenizer)
    shown = await two.get(url_of(ended))
    assert (shown["status"], shown["bytes"]) == ("succeeded", 5)
    assert two.folders == sorted([ended["id"], half["id"]])
    await two.close()


async def test_another_base_is_refused_without_paths(
    tmp_path: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    stand = ExportStand.open(tmp_path, base, tokenizer, replace(base.served, identity="0" * 64))
    stand.exports.start()
    failed = await stand.ended(await stand.create(**SHORT))
    assert (failed["status"], failed["error"]["code"]) == ("failed", "base_mismatch")
    assert "this is not the base that is served" in failed["error"]["message"]
    assert str(tmp_path) not in json.dumps(failed)
    assert not stand.live(failed).folder.partial.exists()
    await stand.close()


async def test_a_child_that_dies_is_a_failed_job(stand: ExportStand) -> None:
    job = await stand.create(**SHORT)
    await stand.until_running(job)
    process = stand.live(job).process
    assert process is not None
    while process.pid is None:
        await asyncio.sleep(0.01)
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == 0
    os.kill(process.pid, signal.SIGKILL)
    failed = await stand.ended(job)
    assert failed["error"]["code"] == "export_crashed"
    assert "ended with signal 9" in failed["error"]["message"]


async def test_an_unproven_export_keeps_its_report_only(
    stand: ExportStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unproven(self: ExportProcess, observe: Observer) -> JobFault | None:
        [live] = stand.exports.of("plain")
        live.folder.partial.mkdir()
        (live.folder.partial / "model.safetensors").write_bytes(b"weights")
        report = {"verification": {"failures": ["KL 0.5 is above 1e-05"]}}
        (live.folder.partial / "merge_report.json").write_text(json.dumps(report))
        return JobFault(f"not equal; it is kept as {live.folder.partial}", "export_not_proven")

    monkeypatch.setattr(ExportProcess, "run", unproven)
    failed = await stand.ended(await stand.create())
    message = (
        "the export is not equal to the served model: KL 0.5 is above 1e-05; format fp32 would be closer"
    )
    assert failed["error"] == {"message": message, "code": "export_not_proven", "param": "format"}
    assert failed["report"]["verification"]["failures"] == ["KL 0.5 is above 1e-05"]
    assert not stand.live(failed).folder.partial.exists()


async def test_what_another_version_wrote_is_written_again(
    tmp_path: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[bool] = []

    async def refuses_to_resume(self: ExportProcess, observe: Observer) -> JobFault | None:
        [live] = one.exports.of("plain")
        resumed.append("--resume" in self.arguments)
        assert live.folder.partial.exists() == resumed[-1]
        if resumed[-1]:
            return JobFault("was begun with another version", "export_error", "resume")
        live.folder.out.mkdir()
        return None

    monkeypatch.setattr(ExportProcess, "run", refuses_to_resume)
    one = ExportStand.open(tmp_path, base, tokenizer)
    job = await one.create()
    one.live(job).folder.partial.mkdir()
    one.exports.start()
    assert (await one.ended(job))["status"] == "succeeded"
    assert resumed == [True, False]
    await one.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"out": "/tmp/x"}, "out: "),
    "a path": ({"adapters": [{"name": "plain", "path": "/etc"}]}, "adapters[0].path: "),
    "gguf": ({"format": "gguf"}, "format: "),
    "size": ({"shard_size": "5XB"}, "shard_size: give a size"),
    "too many prompts": ({"verify": 9}, "verify: "),
    "weight 0": (
        {"adapters": [{"name": "plain", "weight": 0}]},
        "adapters[0].weight: must be a number other",
    ),
    "twice": ({"adapters": [{"name": "plain"}, {"name": "plain"}]}, "adapters: an adapter is named twice"),
    "not among": ({"adapters": [{"name": "team/some"}]}, "adapters: 'plain', which the path names"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_bad_requests(stand: ExportStand, case: str) -> None:
    body, sentence = REFUSED[case]
    response = await stand.client.post("/v1/adapters/plain/exports", json=body)
    assert (response.status_code, fault(response)["type"]) == (400, "invalid_request_error")
    assert fault(response)["message"].startswith(sentence), response.text
    assert stand.folders == []


async def test_unknown_names_and_methods(stand: ExportStand) -> None:
    client = stand.client
    unknown = await client.post("/v1/adapters/nobody/exports", json={})
    assert (unknown.status_code, fault(unknown)["code"]) == (404, "model_not_found")
    assert (await client.get("/v1/adapters/nobody/exports")).status_code == 404
    other = {"adapters": [{"name": "plain"}, {"name": "nobody"}]}
    missing = await client.post("/v1/adapters/plain/exports", json=other)
    assert (missing.status_code, fault(missing)["param"]) == (404, "adapters[1].name")
    absent = await client.get("/v1/adapters/plain/exports/export-0123456789abcdef/download")
    assert (absent.status_code, fault(absent)["code"]) == (404, "export_not_found")
    wrong = await client.put("/v1/adapters/plain/exports", json={})
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")
    generation = stand.catalog.registry.get("plain").generation
    stand.catalog.registry.put("plain/exports", generation, source="upload")
    assert (await stand.get("/v1/adapters/plain/exports"))["id"] == "plain/exports"


async def test_no_room(stand: ExportStand, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    full = await stand.client.post("/v1/adapters/plain/exports", json={})
    assert (full.status_code, fault(full)["code"]) == (507, "storage_full")
    assert "the export needs 0.07 GB, and 0.00 GB are free" in fault(full)["message"]
    assert full.headers["x-should-retry"] == "false"
    assert stand.folders == []


async def test_a_full_queue_a_key_and_a_closed_server(
    tmp_path: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = ExportStand.open(tmp_path, base, tokenizer)  # its queue is never worked off
    monkeypatch.setattr(manager, "MAX_WAITING", 1)
    post = stand.client.post
    answers = [
        await post("/v1/adapters/plain/exports", json={}, headers={"idempotency-key": "k"}) for _ in range(2)
    ]
    assert answers[0].content == answers[1].content
    full = await post("/v1/adapters/plain/exports", json={})
    assert (full.status_code, fault(full)["code"]) == (429, "overloaded")
    await stand.exports.close()
    assert (await post("/v1/adapters/plain/exports", json={})).status_code == 503
    stream = (await stand.client.get(f"{url_of(answers[0].json())}/events?stream=true")).text
    assert stream.endswith("[DONE]\n\n"), "a stream ends with the server"
    await stand.close()


def test_the_child_ends_with_its_parent(base: TinyBase, tmp_path: Path) -> None:
    arguments = ["--model", str(base.directory), "--adapter", str(base.adapters["plain"]), "--dry-run"]
    command = [sys.executable, "-m", "loramux_server.exports.child", "export", *arguments, "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "x")], stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, b"")


async def test_formats_of_the_body_are_the_commands() -> None:
    from loramux_server.api.export_wire import ExportBody

    assert ExportBody.model_json_schema()["properties"]["format"]["enum"] == [f.value for f in Format]
