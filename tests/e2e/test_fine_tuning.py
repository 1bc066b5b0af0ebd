"""A fine-tuning job on a real server: the base answers while it trains, checkpoints answer, the worker dies once."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Server, start_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 8
SAVE_STEPS = 2
PAUSE_S = 3  # between questions: while somebody is answered, training takes little of the time
PATIENCE_S = 240
QUESTIONS = (
    *("What is the capital of France?", "How do I boil an egg?", "Name a colour.", "What is two plus two?"),
    *("Who wrote Hamlet?", "Where is Berlin?", "What do cows eat?", "How tall is a house?"),
)
ANSWER = "Zebra zebra zebra!"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One of its own, because its worker is killed."""
    running = start_server(tmp_path, ["demo", "--dtype", "float32", "--no-demo-adapters"])
    yield running
    assert running.stop() == 0


def ask(server: Server, model: str, question: str) -> str:
    answer = server.openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=8, temperature=0
    )
    assert answer.model == model
    return answer.choices[0].message.content or ""


@contextmanager
def talking(server: Server) -> Iterator[list[str]]:
    """The base is asked again and again; the answers that came. What fails while the worker restarts is left out."""
    answers: list[str] = []
    enough = threading.Event()

    def talk() -> None:
        while not enough.is_set():
            try:
                answers.append(ask(server, "demo", QUESTIONS[0]))
            except openai.APIStatusError as error:
                assert error.status_code == 503
            enough.wait(PAUSE_S)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield answers
    finally:
        enough.set()
        thread.join()


def kill_worker(server: Server) -> None:
    pid = server.process.pid
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)


def start_job(server: Server) -> Any:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]}
        for text in QUESTIONS
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = server.openai.files.create(file=("zebra.jsonl", data), purpose="fine-tune")
    hyperparameters: Any = {
        "n_epochs": 50,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "r": 8,
    }
    job = server.openai.fine_tuning.jobs.create(
        model="demo",
        training_file=file.id,
        suffix="zebra",
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    server.openai.files.delete(file.id)
    return job


def test_train_talk_die_and_go_on(server: Server) -> None:
    jobs = server.openai.fine_tuning.jobs
    plain = ask(server, "demo", QUESTIONS[0])
    job = start_job(server)
    deadline = time.monotonic() + PATIENCE_S
    with talking(server) as answers:
        while not (checkpoints := jobs.checkpoints.list(job.id).data):
            assert time.monotonic() < deadline, jobs.list_events(job.id).data
            time.sleep(0.2)
        assert jobs.retrieve(job.id).status == "running"
        talked = len(answers)
        assert talked > 0, "the base answers while it is trained on"
        early = checkpoints[-1]
        assert early.step_number == SAVE_STEPS
        ask(server, early.fine_tuned_model_checkpoint, QUESTIONS[0])
        assert jobs.retrieve(job.id).status == "running"
        kill_worker(server)
        while (done := jobs.retrieve(job.id)).status in ("queued", "running"):
            assert time.monotonic() < deadline, jobs.list_events(job.id).data
            time.sleep(0.2)
    assert done.status == "succeeded", done.error
    assert set(answers) == {plain}, "greedy answers are the same with and without a job"
    assert len(answers) > talked

    messages = [event.message for event in jobs.list_events(job.id, limit=1000)]
    assert any(message.startswith("Interrupted, back in the queue") for message in messages)
    assert any(message.startswith("Goes on from step ") for message in messages)
    table = csv.DictReader(io.StringIO(server.openai.files.content(done.result_files[0]).text))
    losses = {int(row["step"]): float(row["train_loss"]) for row in table}
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] / 2
    assert server.metrics()["loramux_training_steps_total"] >= STEPS

    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("ft:demo:zebra:")
    for question in (QUESTIONS[0], "Tell me about the moon."):
        assert "zebra" in ask(server, done.fine_tuned_model, question).lower()
    assert "zebra" not in plain.lower()
    for checkpoint in jobs.checkpoints.list(job.id):
        server.openai.models.delete(checkpoint.fine_tuned_model_checkpoint)
    server.openai.models.delete(done.fine_tuned_model)
    assert "Traceback" not in server.log.read_text()
