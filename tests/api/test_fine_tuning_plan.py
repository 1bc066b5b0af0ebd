"""POST /v1/fine_tuning/plan: what a job would be, said before it is created."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramux_adapters.spec import BaseGeometry
from tests.adapters.conftest import make_lora_weights, tiny_geometry
from tests.api.catalog_support import fault
from tests.api.test_fine_tuning import BAD_ROWS, method
from tests.api.training_support import ROWS, Make, TrainingStand, make, weights_at

__all__ = ["make", "make_lora_weights", "tiny_geometry"]  # fixtures

URL = "/v1/fine_tuning/plan"


async def plan(stand: TrainingStand, **body: Any) -> dict[str, Any]:
    response = await stand.client.post(URL, json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_a_plan_creates_nothing(make: Make, tiny_geometry: BaseGeometry) -> None:
    stand = make()
    file, other = await stand.upload(), await stand.upload(name="valid.jsonl")
    found = await plan(
        stand, training_file=file, validation_file=other, method=method(n_epochs=2, batch_size=2, r=4)
    )
    assert (found["object"], found["rows"], found["validation_rows"], found["exact"]) == (
        "fine_tuning.plan",
        3,
        3,
        True,
    )
    assert (found["steps_per_epoch"], found["total_steps"]) == (2, 4)
    assert (found["hyperparameters"]["r"], found["hyperparameters"]["lora_alpha"]) == (4, 8)
    assert found["why"]["lora_alpha"] == "twice r"
    assert "r" not in found["why"]
    shapes = tiny_geometry.linear_shapes.values()
    assert found["trainable_parameters"] == 4 * sum(map(sum, shapes))
    memory = found["memory"]
    assert memory["adapter"] == memory["gradients"] == 4 * found["trainable_parameters"]
    assert memory["total"] > memory["adapter"] + memory["gradients"] + memory["optimizer"]
    row = found["preview"][0]
    assert [(turn["role"], turn["content"], turn["trained"]) for turn in row["turns"]] == [
        ("user", "Hi", False),
        ("assistant", "Hello!", True),
    ]
    assert row["trained_tokens"] * 3 == found["trained_tokens"]
    assert any("only 3 rows" in warning for warning in found["warnings"])
    assert stand.jobs.all() == []
    assert stand.left("staging") == []
    smaller = await plan(stand, training_file=file, method=method(n_epochs=2, batch_size=1, r=4))
    assert smaller["memory"]["total"] < memory["total"]


async def test_its_faults_are_those_of_the_job(make: Make) -> None:
    stand = make()
    bad = await stand.upload(BAD_ROWS, "bad.jsonl")
    response = await stand.client.post(URL, json={"model": "tiny", "training_file": bad})
    job = await stand.until(await stand.create(training_file=bad), "failed")
    error = fault(response)
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "training_file",
        "invalid_training_file",
    )
    assert error["message"] == job["error"]["message"]
    assert stand.left("staging") == []
    good = await stand.upload()
    for field, value, param in (
        ("method", method(r=999), "method.supervised.hyperparameters.r"),
        ("method", method(max_seq_length=9999), "method.supervised.hyperparameters.max_seq_length"),
        ("colour", "red", "colour"),
        ("training_file", "file-none", "training_file"),
    ):
        response = await stand.client.post(URL, json={"model": "tiny", "training_file": good, field: value})
        assert response.status_code in (400, 404)
        assert fault(response)["param"] == param


async def test_an_adapter_that_is_trained_further_gives_its_shape(
    make: Make, tiny_geometry: BaseGeometry
) -> None:
    stand = make()
    parts = weights_at(1, tiny_geometry, r=2)
    folder = stand.root / "sql"
    parts.write(folder)
    files = [(path.name, (path.name, path.read_bytes())) for path in folder.iterdir()]
    uploaded = await stand.client.post("/v1/adapters", data={"name": "sql"}, files=files)
    assert uploaded.status_code == 201, uploaded.text
    found = await plan(stand, model="sql", training_file=await stand.upload())
    assert found["hyperparameters"]["r"] == 2


async def test_only_part_of_a_long_row_is_shown(make: Make) -> None:
    row = json.loads(ROWS.splitlines()[0])
    row["messages"][1]["content"] = "word " * 4000
    stand = make()
    found = await plan(stand, training_file=await stand.upload(json.dumps(row).encode() + b"\n" + ROWS))
    shown = found["preview"][0]
    assert len(shown["turns"][1]["content"]) == 4000
    assert len("".join(part["text"] for part in shown["parts"])) < 4000
    assert shown["tokens"] == 512, "as the trainer would cut it"
    assert found["longest"] == 512


@pytest.mark.parametrize("method_name", ["GET", "DELETE", "PUT"])
async def test_other_methods(make: Make, method_name: str) -> None:
    assert (await make().client.request(method_name, URL)).status_code == 405
