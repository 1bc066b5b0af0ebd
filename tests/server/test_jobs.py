"""JobManager through crashes, restarts, ends of the worker and full disks; the trainer is played."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.access import Access
from loramux_adapters.errors import EngineError, Overloaded, StorageError, StorageFull
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.layout import STATE_FILE
from loramux_server.engine.messages import TrainingEnded
from loramux_server.training import manager, publication
from loramux_server.training.folder import read_json
from loramux_server.training.names import checkpoint_name, model_name
from loramux_server.training.records import JobEvent, JobRecord, JobRequest
from loramux_server.training.runner import MAX_INTERRUPTIONS, after_a_crash
from tests.adapters.conftest import tiny_geometry
from tests.adapters.training.test_tensorboard import curves
from tests.api import training_support
from tests.api.conftest import CHATML, byte_level_tokenizer
from tests.api.training_support import STEPS, Make, TrainingStand, make, weights_at

__all__ = ["make", "tiny_geometry"]  # fixtures


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(chat_template=CHATML)


def copied(source: Path, target: Path) -> bool:
    """False if something vanished meanwhile: such a copy is not of one moment."""
    try:
        shutil.copytree(source, target)
    except (shutil.Error, FileNotFoundError):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


async def kill(stand: TrainingStand, tmp_path: Path) -> None:
    """What is on the disk at this moment is what the next server finds; the killed one writes elsewhere from now on."""
    left = tmp_path / "left"
    for _ in range(5):
        if await asyncio.to_thread(copied, stand.root / "data", left):
            break
    else:
        pytest.fail("the data directory never held still for a copy")
    await stand.close(grace=0)
    shutil.rmtree(stand.root / "data")
    left.rename(stand.root / "data")


def losses(stand: TrainingStand, job: dict[str, Any]) -> list[int]:
    return list(stand.jobs.database.metrics(job["id"]))


async def test_a_killed_server_goes_on_from_the_last_checkpoint(
    make: Make, tmp_path: Path, tiny_geometry: BaseGeometry
) -> None:
    stand = make(gated=True)
    job, waiting = await stand.create(suffix="mine"), await stand.create()
    stand.steps(3)
    await stand.until_step(job, 3)
    await stand.until(waiting, "queued")
    await kill(stand, tmp_path)

    again = make(gated=True, start=False)
    assert again.live(job).record.status == "queued"
    assert "Interrupted by the end of the server, back in the queue" in (await again.messages(job))[-1]
    again.jobs.start()
    again.steps(2 + STEPS)
    done = await again.until(job, "succeeded")
    assert again.engine.started[0].id == job["id"], "it keeps its place"
    assert "Goes on from step 2 of 4" in await again.messages(job)
    assert done["trained_tokens"] == 20 * STEPS, "step 3 was done twice and counts once"
    assert losses(again, job) == [1, 2, 3, 4]
    record = again.catalog.registry.get(done["fine_tuned_model"])
    assert record.generation == weights_at(STEPS, tiny_geometry).generation
    await again.until(waiting, "succeeded")


async def test_a_job_leaves_its_curves_for_tensorboard(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training_support, "JobManager", partial(manager.JobManager, tensorboard=tmp_path / "logs")
    )
    stand = make()
    job = await stand.create()
    await stand.until(job, "succeeded")
    found = curves(tmp_path / "logs" / job["id"])
    assert set(found["train/loss"]) == set(losses(stand, job))
    assert "train/memory_bytes" in found


async def test_a_stopped_server_saves_first(make: Make) -> None:
    stand = make(gated=True)
    job = await stand.create()
    stand.steps(3)
    await stand.until_step(job, 3)
    await stand.close()
    assert set(stand.engine.stopped) == {(job["id"], True)}

    again = make(gated=True)
    again.steps(1)
    await again.until(job, "succeeded")
    messages = await again.messages(job)
    assert "Stopped after step 3, with a checkpoint; it goes on when the server is back" in messages
    assert "Goes on from step 3 of 4" in messages
    assert not any(message.startswith("Interrupted") for message in messages)


async def test_the_grace_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that does not stop in time is left, and the next server goes on from its checkpoint."""
    stand = make(gated=True)
    job = await stand.create()
    stand.steps(2)
    await stand.until_step(job, 2)

    async def deaf(job_id: str, *, save: bool) -> None:
        pass

    monkeypatch.setattr(stand.engine, "stop_training", deaf)
    await stand.close(grace=0.05)
    again = make()
    await again.until(job, "succeeded")
    assert "Goes on from step 2 of 4" in await again.messages(job)


async def test_the_worker_dies(make: Make, tiny_geometry: BaseGeometry) -> None:
    stand = make()
    stand.engine.dies = [4]
    job = await stand.until(await stand.create(), "succeeded")
    messages = await stand.messages(job)
    assert any(message.startswith("Interrupted, back in the queue") for message in messages)
    assert "Goes on from step 2 of 4" in messages
    assert job["trained_tokens"] == 20 * STEPS
    assert [command.id for command in stand.engine.started] == [job["id"]] * 2


async def test_a_job_that_ends_every_worker_fails(make: Make) -> None:
    """Else it would end the service of everybody again and again."""
    stand = make()
    stand.engine.dies = [2] * (MAX_INTERRUPTIONS + 1)
    job = await stand.until(await stand.create(), "failed")
    assert job["error"]["code"] == "training_interrupted"
    assert len(stand.engine.started) == MAX_INTERRUPTIONS + 1
    # with checkpoints in between it may take as long as it needs
    stand.engine.dies = [1] * MAX_INTERRUPTIONS + [3] * MAX_INTERRUPTIONS
    await stand.until(await stand.create(), "succeeded")


def test_a_job_that_ends_every_server_is_paused() -> None:
    """Where the host's memory is what a job exceeds, the whole container dies."""
    request = JobRequest(model="tiny", training_file="file-1", seed=1, recipe={})
    record = JobRecord(id="ftjob-1", request=request, name="m", created=1, queued=1, initial=None, owner="")
    for count in range(1, MAX_INTERRUPTIONS + 1):
        record, event = after_a_crash(record)
        assert (record.status, record.interruptions, event.level) == ("queued", count, "warn")
    record, event = after_a_crash(record)
    assert (record.status, record.interruptions, event.level) == ("paused", 0, "error")
    assert "no checkpoint came between" in event.message


async def test_nothing_starts_while_there_is_no_worker(make: Make) -> None:
    stand = make(start=False)
    stand.engine.state = "restarting"
    stand.jobs.start()
    job = await stand.create()
    await stand.until(job, "queued")
    await asyncio.sleep(3 * manager.POLL_S)
    assert stand.engine.started == []
    stand.engine.state = "ready"
    await stand.until(job, "succeeded")


async def test_what_was_trained_is_published_by_the_next_server(make: Make, tmp_path: Path) -> None:
    """Killed between the trainer's end and the name; also a checkpoint between its writing and its name."""
    stand = make(gated=True)
    stand.engine.held = asyncio.Event()  # no verification ends
    job = await stand.create()
    stand.steps(STEPS)
    while not stand.live(job).folder.trained:
        await asyncio.sleep(0.01)
    await kill(stand, tmp_path)
    with sqlite3.connect(stand.base / "training.sqlite3") as connection:
        connection.execute("DELETE FROM checkpoints WHERE step = 2")
    connection.close()
    again = make()
    done = await again.until(job, "succeeded")
    assert again.engine.started == [], "nothing is trained again"
    assert done["fine_tuned_model"] in again.catalog.registry
    steps = [one.step for one in again.jobs.database.checkpoints(job["id"])]
    assert steps == [4, 2]


async def test_a_full_disk_pauses(make: Make) -> None:
    stand = make()
    stand.engine.ending = TrainingEnded("any", "failed", 0, "no room for a checkpoint", StorageFull.code)
    job = await stand.create()
    await stand.until(job, "paused")
    assert (await stand.messages(job))[-1].startswith(
        "no room for a checkpoint; the job is paused, resume it"
    )
    stand.engine.ending = None
    await stand.post(job, "resume")
    await stand.until(job, "succeeded")


async def test_a_full_disk_at_the_very_end_loses_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = make()
    publish = stand.catalog.publish

    async def full(name: str, *arguments: Any) -> Any:
        if "ckpt" not in name:
            raise StorageFull("the adapter cannot be stored: No space left on device")
        return await publish(name, *arguments)

    monkeypatch.setattr(stand.catalog, "publish", full)
    job = await stand.create()
    await stand.until(job, "paused")
    assert stand.live(job).folder.trained
    monkeypatch.undo()
    await stand.post(job, "resume")
    await stand.until(job, "succeeded")
    assert len(stand.engine.started) == 1


async def test_a_checkpoint_that_cannot_be_served_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = make()
    read = read_json

    def damaged(path: Path) -> Any:
        if path.name == STATE_FILE:
            raise ValueError("cut short")
        return read(path)

    monkeypatch.setattr(publication, "read_json", damaged)
    job = await stand.until(await stand.create(), "succeeded")
    assert "The checkpoint of step 2 cannot be served: cut short" in await stand.messages(job)
    assert stand.jobs.database.checkpoints(job["id"]) == []


async def test_a_database_that_cannot_be_written_holds_the_job(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand = make(start=False)
    job = await stand.create()

    def full(*arguments: Any, **named: Any) -> None:
        raise StorageError("the fine-tuning database cannot be written: disk full")

    await stand.until(job, "queued")
    monkeypatch.setattr(stand.jobs.database, "save_job", full)
    stand.jobs.start()
    await stand.until(job, "paused")
    assert "cannot go on: the fine-tuning database cannot be written" in caplog.text
    monkeypatch.undo()
    await stand.post(job, "resume")
    await stand.until(job, "succeeded")


async def test_a_fault_of_the_servers_own_ends_one_job(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand = make()

    async def broken(self: Any, job: Any) -> None:
        raise KeyError("a secret path")

    with monkeypatch.context() as patch:
        patch.setattr(publication.Publication, "model", broken)
        job = await stand.until(await stand.create(), "failed")
    assert (job["error"]["code"], "secret" in job["error"]["message"]) == ("internal_error", False)
    assert "a secret path" in caplog.text
    await stand.until(await stand.create(), "succeeded")


async def test_cancelled_or_paused_while_it_is_published(make: Make) -> None:
    stand = make()
    stand.engine.held = asyncio.Event()
    cancelled, paused = await stand.create(), await stand.create()
    for job, verb in ((cancelled, "cancel"), (paused, "pause")):
        while not (stand.engine.verified and stand.jobs._current is stand.live(job)):
            await asyncio.sleep(0.01)
        await stand.post(job, verb)
        stand.engine.verified.clear()
        held, stand.engine.held = stand.engine.held, asyncio.Event()
        held.set()
        while stand.jobs._current is stand.live(job):
            await asyncio.sleep(0.01)
        assert stand.live(job).record.name not in stand.catalog.registry
    assert stand.left("jobs") == [paused["id"]]
    stand.engine.held.set()
    await stand.post(paused, "resume")
    done = await stand.until(paused, "succeeded")
    assert len(stand.engine.started) == 2
    assert sorted(done["result_files"]) == [one for one in stand.left("files") if one in done["result_files"]]
    assert len(stand.left("files")) == 4, "two uploads, two results"


async def test_paused_before_it_was_validated(make: Make) -> None:
    stand = make(start=False)
    async with stand.jobs._validating:
        job = await stand.create()
        assert (await stand.post(job, "pause"))["status"] == "paused"
    while not stand.live(job).record.validated:
        await asyncio.sleep(0.01)
    assert stand.live(job).record.status == "paused"
    async with stand.jobs._validating:
        second = await stand.create()
        await stand.post(second, "pause")
        assert (await stand.post(second, "resume"))["status"] == "validating_files"
    stand.jobs.start()
    await stand.until(second, "succeeded")
    assert stand.live(job).record.status == "paused"


async def test_validation_goes_on_with_the_next_server(make: Make, tmp_path: Path) -> None:
    stand = make(start=False)
    async with stand.jobs._validating:
        job = await stand.create()
        await kill(stand, tmp_path)
    again = make()
    await again.until(job, "succeeded")


async def test_leftovers_are_swept(make: Make, tmp_path: Path) -> None:
    stand = make()
    job = await stand.until(await stand.create(), "succeeded")
    for name in ("ftjob-halfmade", job["id"]):
        (stand.base / "jobs" / name).mkdir()
    await kill(stand, tmp_path)
    again = make()
    assert again.left("jobs") == []
    assert (await again.get(f"/v1/fine_tuning/jobs/{job['id']}"))["status"] == "succeeded"


async def test_a_job_that_cannot_be_stored_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = make(start=False)
    training_file = await stand.upload()
    link = os.link

    def full(source: Any, target: Any) -> None:
        if "jobs" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    monkeypatch.setattr(os, "link", full)
    body = {"model": "tiny", "training_file": training_file}
    response = await stand.client.post("/v1/fine_tuning/jobs", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    assert (await stand.client.post("/v1/fine_tuning/jobs", json=body)).status_code == 500
    assert (stand.left("jobs"), stand.jobs.all()) == ([], [])


async def test_a_full_queue_and_a_closed_server(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "MAX_UNFINISHED", 1)
    stand = make(start=False)
    job = await stand.create()
    request = stand.live(job).record.request
    with pytest.raises(Overloaded, match="unfinished already"):
        await stand.jobs.create(request, "tiny", None)
    await stand.post(job, "cancel")
    await stand.create()
    await stand.jobs.stop(0)
    with pytest.raises(EngineError, match="shutting down"):
        await stand.jobs.create(request, "tiny", None)
    stream = await stand.client.get(f"/v1/fine_tuning/jobs/{stand.jobs.all()[0].id}/events?stream=true")
    assert stream.text.endswith("[DONE]\n\n"), "a stream ends with the server"


async def test_one_tenant_does_not_fill_the_queue(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "MAX_UNFINISHED_OF_TENANT", 1)
    stand = make(start=False)
    request = stand.live(await stand.create()).record.request
    await stand.jobs.create(request, "tiny", None, Access("acme"))
    with pytest.raises(Overloaded, match="1 of your jobs are unfinished"):
        await stand.jobs.create(request, "tiny", None, Access("acme"))
    await stand.jobs.create(request, "tiny", None, Access("other"))
    await stand.create()


async def test_changes_of_one_job_follow_one_another(make: Make) -> None:
    stand = make(start=False)
    async with stand.jobs._validating:
        job = stand.live(await stand.create())
        changes = [job.change(JobEvent.saying(str(n)), interruptions=n) for n in range(20)]
        others = [job.change(total_steps=n) for n in range(20)]
        await asyncio.gather(*changes, *others)
    assert (job.record.interruptions, job.record.total_steps) == (19, 19)
    (stored,) = stand.jobs.database.jobs()
    assert (stored.interruptions, stored.total_steps) == (19, 19)


@pytest.mark.parametrize(
    ("base", "suffix", "begin"),
    [
        ("demo", None, "ft:demo::"),
        ("org/Some-Model", "x", "ft:Some-Model:x:"),
        ("/models/my base/", "x", "ft:my-base:x:"),
        ("b" * 99, "s" * 64, "ft:" + "b" * 28 + ":" + "s" * 64 + ":"),
    ],
)
def test_names_are_ones_that_adapters_may_have(base: str, suffix: str | None, begin: str) -> None:
    from loramux_adapters.names import check_name

    name = model_name(base, suffix)
    assert name.startswith(begin)
    assert check_name(checkpoint_name(name, 99_999_999)).endswith(":ckpt-step-99999999")
    assert model_name(base, suffix) != name


def test_long_curves_and_lists_fit_into_metadata() -> None:
    curve = [{"step": n, "train_loss": 0.123456789, "grad_norm": 1.0} for n in range(1, 10_001)]
    recipe = {"r": 4, "target_modules": [f"model.layers.{n}.self_attn.q_proj" for n in range(500)]}
    said = {"base": {}, "recipe": recipe, "asked": recipe, "data": {"warnings": ["long"]}, "format": 1}
    facts = publication._facts("ftjob-1", 10_000, said, curve)
    short = publication._short(facts)["training"]
    assert len(short["loss_curve"]) <= publication.CURVE_POINTS
    assert short["loss_curve"][-1] == {"step": 10_000, "train_loss": 0.123456789}
    assert (short["recipe"], short["data"], "asked" in short) == ({"r": 4}, {}, False)
    assert len(facts["loss_curve"]) == 10_000
