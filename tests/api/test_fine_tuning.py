"""The fine-tuning API over a trainer that is played: shapes, the life of a job, refusals, models that can be called."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights
from loramux_server.engine.messages import TrainingEnded
from tests.adapters.conftest import make_lora_weights, tiny_geometry
from tests.api.catalog_support import fault
from tests.api.test_metrics import value
from tests.api.training_support import (
    PATIENCE_S,
    ROWS,
    STEPS,
    Make,
    TrainingStand,
    make,
    serving,
    url_of,
    weights_at,
)

__all__ = ["make", "make_lora_weights", "tiny_geometry"]  # fixtures


def method(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


async def polite(stand: TrainingStand, **more: Any) -> tuple[dict[str, Any], str, str]:
    """A job, the file that it trains on and the one it is validated on."""
    training, validation = await stand.upload(), await stand.upload(name="valid.jsonl")
    recipe = method(n_epochs=1, r=4, learning_rate="auto")
    files = {"training_file": training, "validation_file": validation}
    return await stand.create(**files, suffix="polite", seed=7, method=recipe, **more), training, validation


async def test_a_new_job_is_shown_as_it_was_asked_for(make: Make) -> None:
    stand = make(start=False)
    job, training, validation = await polite(stand, metadata={"team": "a"})
    assert job.pop("created_at") > 1.7e9
    hyperparameters = {"n_epochs": 1, "r": 4, "learning_rate": "auto", "batch_size": "auto"}
    hyperparameters["learning_rate_multiplier"] = "auto"
    assert job == {
        "id": job["id"],
        "object": "fine_tuning.job",
        "model": "tiny",
        "organization_id": "org-loramux",
        "status": "validating_files",
        "fine_tuned_model": None,
        "finished_at": None,
        "estimated_finish": None,
        "trained_tokens": None,
        "training_file": training,
        "validation_file": validation,
        "result_files": [],
        "hyperparameters": hyperparameters,
        "method": method(**hyperparameters),
        "seed": 7,
        "error": None,
        "integrations": [],
        "metadata": {"team": "a"},
    }


async def test_the_life_of_a_job(make: Make, tiny_geometry: BaseGeometry) -> None:
    stand = make(gated=True)
    job, training, validation = await polite(stand)
    # the job has its own hold on the data
    for file_id in (training, validation):
        assert (await stand.client.delete(f"/v1/files/{file_id}")).status_code == 200
    stand.steps(3)
    await stand.until_step(job, 3)
    (command,) = stand.engine.started
    assert Path(command.training_file).read_bytes() == ROWS
    assert command.recipe == {"n_epochs": 1, "r": 4, "learning_rate": "auto", "seed": 7}
    running = await stand.get(url_of(job))
    assert (running["status"], running["fine_tuned_model"], running["trained_tokens"]) == (
        "running",
        None,
        None,
    )
    assert running["estimated_finish"] >= job_time(running)
    assert running["hyperparameters"]["learning_rate_multiplier"] == 1.0
    assert running["hyperparameters"]["batch_size"] == 1
    assert value(stand.metrics, "training_loss") == pytest.approx(2 / 3)

    stand.steps(1)
    done = await stand.until(job, "succeeded", "failed")
    assert (done["status"], done["error"], done["estimated_finish"]) == ("succeeded", None, None)
    assert (done["trained_tokens"], done["finished_at"] >= job_time(done)) == (20 * STEPS, True)
    name = done["fine_tuned_model"]
    assert name.startswith("ft:tiny:polite:")
    record = stand.catalog.registry.get(name)
    assert record.generation == weights_at(STEPS, tiny_geometry).generation
    assert (record.source, record.origin) == ("training", job["id"])
    assert stand.left("jobs") == []
    assert value(stand.metrics, "training_jobs", status="succeeded") == 1
    assert value(stand.metrics, "training_steps_total") == STEPS
    assert value(stand.metrics, "training_tokens_total") == 20 * STEPS
    assert "loramux_training_loss" not in stand.metrics.render("")[0].decode()


def job_time(job: dict[str, Any]) -> int:
    return int(job["created_at"])


async def test_checkpoints_answer_while_training_goes_on(make: Make, tiny_geometry: BaseGeometry) -> None:
    stand = make(gated=True)
    job = await stand.create(validation_file=await stand.upload())
    stand.steps(2)
    await stand.until_step(job, 2)
    page = await stand.get(f"{url_of(job)}/checkpoints")
    (one,) = page["data"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, one["id"], one["id"])
    assert (one["object"], one["step_number"]) == ("fine_tuning.job.checkpoint", 2)
    assert one["fine_tuning_job_id"] == job["id"]
    assert one["metrics"] == {
        "step": 2,
        "train_loss": 1.0,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 1.25,
        "valid_mean_token_accuracy": 0.4,
        "full_valid_loss": 1.25,
        "full_valid_mean_token_accuracy": 0.4,
    }
    name = one["fine_tuned_model_checkpoint"]
    assert name.startswith("ft:tiny::")
    assert name.endswith(":ckpt-step-2")
    for model in (name, f"tiny:{name}"):
        chat = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        answer = await stand.client.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        assert answer.headers["x-adapter-generation"] == weights_at(2, tiny_geometry).generation
    assert (await stand.get(url_of(job)))["status"] == "running"
    stand.steps(2)
    await stand.until(job, "succeeded")
    both = await stand.get(f"{url_of(job)}/checkpoints?limit=1")
    assert ([c["step_number"] for c in both["data"]], both["has_more"]) == ([4], True)
    rest = await stand.get(f"{url_of(job)}/checkpoints?after={both['last_id']}")
    assert [c["step_number"] for c in rest["data"]] == [2]


async def test_where_a_model_comes_from_is_kept(make: Make, tiny_geometry: BaseGeometry) -> None:
    stand = make()
    job = await stand.until(await stand.create(), "succeeded")
    adapter = await stand.get(f"/v1/adapters/{job['fine_tuned_model']}")
    assert (adapter["source"], adapter["origin"]) == ("training", job["id"])
    facts = adapter["metadata"]["training"]
    assert (facts["job"], facts["step"]) == (job["id"], STEPS)
    assert facts["base"] == {"name": "org/tiny", "identity": tiny_geometry.identity}
    assert facts["data"]["digest"] == "d1ge57"
    assert facts["recipe"]["r"] == 4
    assert facts["loss_curve"][-1] == {"step": STEPS, "train_loss": 2 / STEPS}
    assert adapter["verification"]["verdict"] == "ok"
    assert "warnings" not in facts["data"], "metadata is short"
    checkpoint = await stand.get(f"{url_of(job)}/checkpoints?limit=1000")
    early = checkpoint["data"][-1]["fine_tuned_model_checkpoint"]
    shown = await stand.get(f"/v1/adapters/{early}")
    assert (shown["metadata"]["training"]["step"], shown["verification"]["verdict"]) == (2, "skipped")


async def test_result_files(make: Make) -> None:
    stand = make()
    job = await stand.until(await stand.create(validation_file=await stand.upload()), "succeeded")
    table, manifest = job["result_files"]
    file = await stand.get(f"/v1/files/{table}")
    assert (file["purpose"], file["filename"]) == ("fine-tune-results", "step_metrics.csv")
    text = (await stand.client.get(f"/v1/files/{table}/content")).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert (rows[0]["train_loss"], rows[0]["valid_loss"]) == ("", "3.0")
    assert (rows[2]["train_loss"], rows[2]["train_accuracy"], rows[2]["valid_loss"]) == ("1.0", "0.5", "1.25")
    assert rows[3]["valid_loss"] == ""
    told = json.loads((await stand.client.get(f"/v1/files/{manifest}/content")).text)
    assert len(told["loss_curve"]) == STEPS
    # a result is no training file
    refused = await stand.client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": table})
    assert (refused.status_code, fault(refused)["param"]) == (400, "training_file")
    assert [f["id"] for f in (await stand.get("/v1/files?purpose=fine-tune-results"))["data"]] == [
        manifest,
        table,
    ]


async def test_events(make: Make) -> None:
    stand = make()
    job = await stand.until(await stand.create(), "succeeded")
    first = await stand.get(f"{url_of(job)}/events?limit=3")
    assert first["has_more"] is True
    newest = first["data"][0]
    assert (newest["object"], newest["level"], newest["type"], newest["data"]) == (
        *("fine_tuning.job.event", "info", "message"),
        {},
    )
    assert newest["message"] == "The job has successfully completed"
    assert first["data"][1]["message"] == f"New fine-tuned model created: {job['fine_tuned_model']}"
    rest = await stand.get(f"{url_of(job)}/events?limit=1000&after={first['data'][-1]['id']}")
    assert rest["has_more"] is False
    events = (first["data"] + rest["data"])[::-1]
    assert len({event["id"] for event in events}) == len(events)
    assert [event["message"] for event in events[:2]] == [
        f"Created fine-tuning job: {job['id']}",
        f"Validating training file: {job['training_file']}",
    ]
    metrics = [event for event in events if event["type"] == "metrics"]
    assert [event["data"]["step"] for event in metrics] == [1, 2, 3, 4]
    assert metrics[1]["message"] == "Step 2/4: training loss=1.0000"
    assert metrics[1]["data"]["tokens_per_second"] == 60
    assert {"learning_rate", "grad_norm", "memory_bytes", "waited"} <= set(metrics[1]["data"])
    warnings = {event["message"]: event["data"] for event in events if event["level"] == "warn"}
    assert warnings["1 row was cut"] == {}
    assert warnings["Step 4: the loss does not move"]["param"] == "learning_rate"
    unknown = await stand.client.get(f"{url_of(job)}/events?after=ftevent-x")
    assert (unknown.status_code, fault(unknown)["param"]) == (404, "after")


async def test_the_stream_of_events(make: Make) -> None:
    stand = make(gated=True)
    job = await stand.create()
    await stand.until(job, "running")
    reading = asyncio.create_task(stand.client.get(f"{url_of(job)}/events?stream=true"))
    await asyncio.sleep(0.05)
    assert not reading.done(), "it goes on while the job does"
    stand.steps(STEPS)
    lines = [line.removeprefix("data: ") for line in (await reading).text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    said = [json.loads(line)["message"] for line in lines]
    assert said == await stand.messages(job)
    again = await stand.client.get(f"{url_of(job)}/events?stream=true")
    assert again.text.count("data: ") == len(said) + 1


async def test_jobs_queue_and_one_trains(make: Make) -> None:
    stand = make(gated=True)
    first, second, third = [await stand.create(suffix=f"n{number}") for number in range(3)]
    await stand.until_training(first)
    assert (await stand.until(second, "queued"))["status"] == "queued"
    # a paused job leaves the trainer to the next, and comes back behind the others
    assert (await stand.post(first, "pause"))["status"] == "paused"
    await stand.until(second, "running")
    assert stand.engine.stopped == [(first["id"], True)]
    assert (await stand.post(first, "resume"))["status"] == "queued"
    stand.steps(3 * STEPS)
    for job in (second, third, first):
        await stand.until(job, "succeeded")
    assert [c.id for c in stand.engine.started] == [j["id"] for j in (first, second, third, first)]


async def test_pause_and_resume_go_on_from_where_it_was(make: Make) -> None:
    stand = make(gated=True)
    job = await stand.create()
    stand.steps(3)
    await stand.until_step(job, 3)
    await stand.post(job, "pause")
    await stand.idle()
    assert [c["step_number"] for c in (await stand.get(f"{url_of(job)}/checkpoints"))["data"]] == [3, 2]
    assert (await stand.get(url_of(job)))["status"] == "paused"
    assert "Stopped after step 3, with a checkpoint" in await stand.messages(job)
    await stand.post(job, "resume")
    stand.steps(1)
    done = await stand.until(job, "succeeded")
    assert done["trained_tokens"] == 20 * STEPS, "no step twice"
    assert "Goes on from step 3 of 4" in await stand.messages(job)


async def test_a_waiting_job_is_paused_at_once(make: Make) -> None:
    stand = make(gated=True)
    first, second = await stand.create(), await stand.create()
    await stand.until(second, "queued")
    assert (await stand.post(second, "pause"))["status"] == "paused"
    stand.steps(STEPS)
    await stand.until(first, "succeeded")
    await asyncio.sleep(0.05)
    assert (await stand.get(url_of(second)))["status"] == "paused"
    await stand.post(second, "resume")
    stand.steps(STEPS)
    await stand.until(second, "succeeded")


async def test_cancel(make: Make) -> None:
    stand = make(gated=True)
    running, waiting = await stand.create(), await stand.create()
    stand.steps(2)
    await stand.until_step(running, 2)
    await stand.until(waiting, "queued")
    for job in (waiting, running):
        cancelled = await stand.post(job, "cancel")
        assert cancelled["status"] == "cancelled"
        assert cancelled["finished_at"] is not None
    await stand.idle()
    assert (running["id"], False) in stand.engine.stopped
    assert stand.left("jobs") == []
    names = [model["id"] for model in (await stand.get("/v1/models"))["data"]]
    assert any(name.endswith(":ckpt-step-2") for name in names), "checkpoints stay"
    for verb in ("cancel", "pause", "resume"):
        refused = await stand.client.post(f"{url_of(running)}/{verb}")
        assert (refused.status_code, fault(refused)["code"]) == (400, "invalid_job_status")
        assert fault(refused)["message"].startswith("id: the job is cancelled, and cannot be ")


BAD_ROWS = b'{"text": "fine"}\n{"messages": [{"role": "user", "content": 3}]}\n'


async def test_files_are_validated_before_anything_runs(make: Make) -> None:
    stand = make()
    job = await stand.create(training_file=await stand.upload(BAD_ROWS, "bad.jsonl"))
    failed = await stand.until(job, "failed")
    assert failed["error"]["code"] == "invalid_training_file"
    assert failed["error"]["param"] == "training_file"
    assert failed["error"]["message"].startswith(
        'Invalid file format of bad.jsonl. Line 2, message 1, key "content": '
    )
    assert (stand.engine.started, stand.left("jobs")) == ([], [])
    other = await stand.create(validation_file=await stand.upload(BAD_ROWS))
    assert (await stand.until(other, "failed"))["error"]["param"] == "validation_file"


async def test_what_the_trainer_refuses_names_the_field_as_it_was_written(make: Make) -> None:
    stand = make()
    stand.engine.ending = TrainingEnded(
        "any",
        "failed",
        0,
        "training needs about 9 GiB",
        "not_enough_memory",
        "batch_size",
    )
    job = await stand.until(await stand.create(method=method(batch_size=99)), "failed")
    assert job["error"] == {
        "code": "not_enough_memory",
        "message": "training needs about 9 GiB",
        "param": "method.supervised.hyperparameters.batch_size",
    }
    assert (await stand.messages(job))[-1].startswith("The job failed: training needs about 9 GiB")


H = "method.supervised.hyperparameters"
REFUSED: dict[str, tuple[dict[str, Any], str | None, str, str]] = {
    "no model": ({"model": None}, "model", "invalid_request", "model: "),
    "unknown model": ({"model": "nobody"}, "model", "model_not_found", "The model 'nobody' does not exist"),
    "unknown field": ({"epochs": 3}, "epochs", "invalid_request", "epochs: Extra inputs"),
    "no such file": ({"training_file": "file-x"}, "training_file", "file_not_found", "training_file: there is no"),
    "validation": ({"validation_file": "file-x"}, "validation_file", "file_not_found", "validation_file: there"),
    "suffix": ({"suffix": "a b"}, "suffix", "invalid_request", "suffix: "),
    "long suffix": ({"suffix": "a" * 65}, "suffix", "invalid_request", "suffix: "),
    "seed": ({"seed": -1}, "seed", "invalid_request", "seed: "),
    "metadata": ({"metadata": {"a": 1}}, "metadata.a", "invalid_request", "metadata.a: "),
    "much metadata": ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_request", "metadata: "),
    "wandb": (
        {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
        *("integrations", "unsupported_parameter", "'integrations' is not supported"),
    ),
    "dpo": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}},
        *("method.type", "unsupported_parameter", "method.type: 'dpo' is not supported"),
    ),
    "reinforcement": ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_parameter", "method.type: "),
    "both methods": (
        {"method": {"type": "supervised", "dpo": {}}},
        *("method.dpo", "unsupported_parameter", "'method.dpo' is not supported"),
    ),
    "unknown hyperparameter": (
        {"method": method(rank=8, n_epochs=1)},
        *(f"{H}.rank", "invalid_training", "'rank' is not a field of a training recipe"),
    ),
    "range": ({"method": method(n_epochs=51)}, f"{H}.n_epochs", "invalid_training", "n_epochs should be "),
    "older form": (
        {"hyperparameters": {"batch_size": 0}},
        *("hyperparameters.batch_size", "invalid_training", "batch_size should be "),
    ),
    "extra body": ({"lora_alpha": "big"}, "lora_alpha", "invalid_training", "lora_alpha should be "),
    "twice": (
        {"method": method(r=8), "hyperparameters": {"r": 8}},
        *("hyperparameters.r", "invalid_request", f"hyperparameters.r: is given as {H}.r already"),
    ),
    "seed twice": ({"seed": 1, "method": method(seed=1)}, f"{H}.seed", "invalid_request", f"{H}.seed: is given as seed"),
    "target": ({"method": method(target_modules=["x_proj"])}, f"{H}.target_modules", "invalid_training", "target_modules"),
    "device": ({"method": method(optimizer="adamw_8bit")}, f"{H}.optimizer", "invalid_training", "optimizer adamw_8bit"),
    "validation steps": ({"method": method(eval_steps=2)}, f"{H}.eval_steps", "invalid_training", "eval_steps needs"),
    "rank served": ({"method": method(r=32)}, f"{H}.r", "invalid_training", "r: 32 is more than the 16 that this server"),
    "beyond the context": (
        {"method": method(max_seq_length=513)},
        *(f"{H}.max_seq_length", "invalid_training", "max_seq_length 513 is more than the base's context of 512 tokens"),
    ),
    "init unknown": ({"method": method(init_from="x")}, f"{H}.init_from", "model_not_found", f"{H}.init_from: The model"),
    "init base": ({"method": method(init_from="tiny")}, f"{H}.init_from", "invalid_request", f"{H}.init_from: names"),
}  # fmt: skip


async def test_bad_requests(make: Make) -> None:
    stand = make()
    good = {"model": "tiny", "training_file": await stand.upload()}
    for case, (change, param, code, sentence) in REFUSED.items():
        response = await stand.client.post("/v1/fine_tuning/jobs", json=good | change)
        error = fault(response)
        assert response.status_code == (404 if code.endswith("not_found") else 400), (case, response.text)
        assert (error["param"], error["code"]) == (param, code), (case, error)
        assert error["message"].startswith(sentence), (case, error)
    assert stand.left("jobs") == []


async def test_unknown_jobs_and_methods(make: Make) -> None:
    stand = make(start=False)
    for verb, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        *(("POST", f"/{verb}") for verb in ("cancel", "pause", "resume")),
    ):
        response = await stand.client.request(verb, f"/v1/fine_tuning/jobs/ftjob-x{path}")
        assert (response.status_code, fault(response)["code"]) == (404, "job_not_found"), path
    wrong = await stand.client.delete("/v1/fine_tuning/jobs/ftjob-x")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")


async def test_an_adapter_is_trained_further(
    make: Make, tiny_geometry: BaseGeometry, make_lora_weights: Callable[..., LoraWeights]
) -> None:
    stand = make()
    weights = make_lora_weights()
    registry = stand.catalog.registry
    registry.put("pirate", registry.store.publish(weights), source="upload")
    job = await stand.create(model="pirate", suffix="more")
    hold = stand.live(job).folder.initial
    assert LoraWeights.read(hold, tiny_geometry).generation == weights.generation
    registry.delete("pirate")
    done = await stand.until(job, "succeeded")
    (command,) = stand.engine.started
    assert command.initial is not None
    assert (command.initial.generation, Path(command.initial.path)) == (weights.generation, hold)
    assert command.recipe["init_from"] == "pirate"
    assert done["fine_tuned_model"].startswith("ft:tiny:more:")

    again = registry.put("pirate", registry.store.publish(weights), source="upload")
    by_name = f"pirate@{again.generation[:12]}"
    second = await stand.create(method=method(init_from=by_name))
    await stand.until(second, "succeeded")
    assert stand.engine.started[1].recipe["init_from"] == by_name
    training_file = await stand.upload()
    for change, param in (
        ({"model": "pirate", "method": method(init_from="pirate")}, f"{H}.init_from"),
        ({"model": "pirate", "method": method(r=8)}, f"{H}.r"),
    ):
        body = {"training_file": training_file, **change}
        refused = await stand.client.post("/v1/fine_tuning/jobs", json=body)
        assert (refused.status_code, fault(refused)["param"]) == (400, param), refused.text


async def test_lists_and_filters(make: Make) -> None:
    stand = make(start=False)
    training_file = await stand.upload()
    ids = [
        (await stand.create(training_file=training_file, metadata=metadata))["id"]
        for metadata in (None, {"team": "a", "x": ""}, {"team": "b"})
    ][::-1]
    every = "/v1/fine_tuning/jobs"

    async def found(query: str) -> list[str]:
        return [job["id"] for job in (await stand.get(f"{every}?{query}"))["data"]]

    assert await found("") == ids
    page = await stand.get(f"{every}?limit=2")
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[:2], True)
    assert await found(f"after={ids[1]}") == [ids[2]]
    assert await found("metadata[team]=a") == [ids[1]]
    assert await found("metadata[team]=a&metadata[x]=") == [ids[1]]
    assert await found("metadata[team]=c") == []
    assert await found("metadata=null") == [ids[2]]
    for query, param, status in (
        ("metadata=x", "metadata", 400),
        ("after=x", "after", 404),
        ("limit=0", "limit", 400),
    ):
        refused = await stand.client.get(f"{every}?{query}")
        assert (refused.status_code, fault(refused)["param"]) == (status, param)


async def test_a_key_makes_one_job(make: Make) -> None:
    stand = make(start=False)
    body = {"model": "tiny", "training_file": await stand.upload()}
    answers = [
        await stand.client.post("/v1/fine_tuning/jobs", json=body, headers={"idempotency-key": "k"})
        for _ in range(2)
    ]
    assert answers[0].content == answers[1].content
    assert len(stand.jobs.all()) == 1


async def test_models_are_deleted_as_openai_does(make: Make) -> None:
    stand = make()
    job = await stand.until(await stand.create(), "succeeded")
    name = job["fine_tuned_model"]
    base = await stand.client.delete("/v1/models/tiny")
    assert (base.status_code, fault(base)["param"]) == (400, "model")
    generation = stand.catalog.registry.get(name).generation
    one = await stand.client.delete(f"/v1/models/{name}@{generation[:8]}")
    assert "not one of them" in fault(one)["message"]
    deleted = await stand.client.delete(f"/v1/models/{name}")
    assert deleted.json() == {"id": name, "object": "model", "deleted": True}
    assert (await stand.client.delete(f"/v1/models/{name}")).status_code == 404
    assert name not in stand.catalog.registry
    wrong = await stand.client.put("/v1/models/x", json={})
    assert (wrong.status_code, set(wrong.headers["allow"].split(", "))) == (405, {"GET", "DELETE"})


async def test_the_description_names_what_is_answered(make: Make) -> None:
    stand = make(start=False)
    document = await stand.get("/openapi.json")
    schemas = document["components"]["schemas"]
    assert {"FileObject", "FineTuningJob", "FineTuningBody", "FineTuningEvent", "ModelDeleted"} <= set(
        schemas
    )
    assert "/v1/fine_tuning/jobs/{job_id}/pause" in document["paths"]


# --- the official client ------------------------------------------------------------------------------------------


@pytest.fixture
def served(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[openai.OpenAI, Callable[[int], None]]]:
    """The client, and a way to let the trainer take some steps."""
    stand = TrainingStand.open(tmp_path, tiny_geometry, tokenizer, gated=True)
    with (
        serving(stand) as (url, loop),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, lambda count: loop.call_soon_threadsafe(stand.steps, count) and None
    stand.jobs.close()
    stand.catalog.close()


def until(client: openai.OpenAI, job_id: str, status: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status != status:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return job


def test_the_official_client(served: tuple[openai.OpenAI, Callable[[int], None]]) -> None:
    client, steps = served
    file = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert [one.id for one in client.files.list(purpose="fine-tune")] == [file.id]
    assert client.files.content(file.id).read() == ROWS
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="mine",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"r": 8},
    )
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.hyperparameters.n_epochs == 1
    steps(2)
    until(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    steps(STEPS)
    done = until(client, job.id, "succeeded")
    assert [one.id for one in client.fine_tuning.jobs.list(limit=1, metadata={"team": "a"})] == [job.id]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "b"})) == []
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # over all pages
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert {event.type for event in events} == {"message", "metrics"}
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert checkpoints[0].step_number == STEPS
    assert checkpoints[0].metrics.train_loss == 2 / STEPS
    assert client.files.content(done.result_files[0]).text.startswith("step,train_loss,")
    hello: Any = [{"role": "user", "content": "hi"}]
    for model in (done.fine_tuned_model, checkpoints[-1].fine_tuned_model_checkpoint):
        assert client.chat.completions.create(model=model, messages=hello).model == model
    assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model
    assert client.models.delete(done.fine_tuned_model).deleted is True
    second = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": "auto"}, seed=3
    )
    assert (second.seed, second.hyperparameters.n_epochs) == (3, "auto")
    until(client, second.id, "running")
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    assert client.files.delete(file.id).deleted is True
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("x.jsonl", ROWS), purpose="batch")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-x")
