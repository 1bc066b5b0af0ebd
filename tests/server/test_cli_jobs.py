"""`loramux jobs` against the real application with its queue; only the trainer is played."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import BaseGeometry
from loramux_server import cli
from loramux_server.cli_jobs import _Display
from tests.adapters.conftest import tiny_geometry
from tests.api.conftest import CHATML, byte_level_tokenizer
from tests.api.training_support import ROWS, STEPS, TrainingStand, serving

__all__ = ["tiny_geometry"]  # fixtures

Run = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(chat_template=CHATML)


@pytest.fixture
def stand(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> Iterator[TrainingStand]:
    made = TrainingStand.open(tmp_path, tiny_geometry, tokenizer)
    yield made
    made.jobs.close()
    made.catalog.close()


@pytest.fixture
def jobs(
    stand: TrainingStand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """`jobs(*arguments)` gives what `loramux jobs ...` says, which must end with exit code `code`."""
    with serving(stand) as (url, _):

        def run(*arguments: object, code: int = 0) -> str:
            monkeypatch.setattr(sys, "argv", ["loramux", "jobs", *map(str, arguments), "--url", url])
            ended: object = 0
            try:
                cli.main()
            except SystemExit as exit:
                ended = exit.code or 0
            out, err = capsys.readouterr()
            assert ended == code, out + err
            return out + err

        yield run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my data.jsonl"
    path.write_bytes(ROWS)
    return path


def test_from_create_to_the_model(jobs: Run, stand: TrainingStand, data: Path) -> None:
    arguments = ("--file", data, "--validation", data, "--model", "tiny", "--suffix", "mine", "--seed", 5)
    more = ("-p", "n_epochs=2", "-p", "lr_scheduler=linear", "-p", 'target_modules=["q_proj"]', "--watch")
    said = jobs("create", *arguments, *more).splitlines()
    job_id = said[0].partition(" ")[0]
    assert said[0] == f"{job_id} is validating_files"
    request = stand.jobs.get(job_id).record.request
    assert request.recipe == {
        "n_epochs": 2,
        "lr_scheduler": "linear",
        "target_modules": ["q_proj"],
        "seed": 5,
    }
    assert stand.jobs.files.get(request.training_file).filename == "my data.jsonl"
    assert request.validation_file not in (None, request.training_file)
    text = "\n".join(said)
    assert f"Created fine-tuning job: {job_id}" in text
    assert "step 4/4 loss 0.500 lr 1.0e-03 60 tok/s" in text
    assert "warn: 1 row was cut" in text
    name = stand.jobs.get(job_id).record.fine_tuned_model
    assert said[-1] == f"{job_id} is succeeded: {name}"

    listed = jobs("list").splitlines()
    assert job_id in listed[1]
    assert str(name) in listed[1]
    assert [job["id"] for job in json.loads(jobs("list", "--json"))] == [job_id]
    shown = jobs("show", job_id)
    assert f"fine_tuned_model  {name}" in shown
    assert f"{name}:ckpt-step-2  training loss 1.0000" in shown
    assert json.loads(jobs("show", job_id, "--json"))["status"] == "succeeded"
    events = [json.loads(line) for line in jobs("watch", job_id, "--json").splitlines()]
    assert (
        len([event for event in events if event["type"] == "metrics" and "train_loss" in event["data"]])
        == STEPS
    )


def test_on_a_terminal_the_loss_stays_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with _Display() as display:
        display.show({"level": "warn", "created_at": 0, "message": "1 row was cut", "data": {}})
        for step in (1, 2):
            data = {"step": step, "total_steps": 9, "train_loss": 3.0 / step, "learning_rate": 1e-3}
            display.show({"level": "info", "created_at": 0, "data": data | {"tokens_per_second": 60}})
    said = capsys.readouterr().out
    assert "warn: 1 row was cut" in said
    assert "2/9" in said
    assert "loss 1.500 lr 1.0e-03 60 tok/s" in said
    assert "step 2/9" not in said, "no line of its own"


def test_pause_resume_and_cancel(jobs: Run, stand: TrainingStand, data: Path) -> None:
    stand.engine.gate = asyncio.Semaphore(0)
    job_id = json.loads(jobs("create", "--file", data, "--model", "tiny", "--json"))["id"]
    assert jobs("pause", job_id) == f"{job_id} is paused\n"
    assert jobs("resume", job_id) == f"{job_id} is queued\n"
    assert json.loads(jobs("cancel", job_id, "--json"))["status"] == "cancelled"
    assert jobs("watch", job_id, code=1).splitlines()[-1] == f"{job_id} is cancelled"
    refused = jobs("pause", job_id, code=1)
    assert refused == "loramux: id: the job is cancelled, and cannot be paused\n"


def test_mistakes(jobs: Run, data: Path, tmp_path: Path) -> None:
    assert "is not a file" in jobs("create", "--file", tmp_path / "none", "--model", "tiny", code=1)
    wrong = jobs("create", "--file", data, "--model", "tiny", "-p", "rank", code=1)
    assert wrong == "loramux: --parameter rank: is not name=value\n"
    unknown = jobs("create", "--file", "file-x", "--model", "tiny", "-p", "rank=3", code=1)
    assert "'rank' is not a field of a training recipe" in unknown
    assert "there is no fine-tuning job 'x'" in jobs("show", "x", code=1)
