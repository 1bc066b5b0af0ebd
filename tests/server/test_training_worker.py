"""Training in a worker process, while it serves, after it was killed, and when nobody listens any more."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio

from loramux_adapters.errors import EngineError
from loramux_adapters.weights import WEIGHTS_FILE
from loramux_server.engine.budget import LatencyBudget
from loramux_server.engine.client import WorkerClient
from loramux_server.engine.messages import (
    SamplingParams,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingPrepared,
)
from loramux_server.engine.reading import TokenizerSource
from loramux_server.engine.training import Training
from tests.server.support import EngineFactory, tokens_of
from tests.server.test_client import collect, options, until
from tests.server.training_support import ReadHere, command, drive, kinds


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(model_with_tokenizer: Path) -> AsyncIterator[WorkerClient]:
    made = WorkerClient(options(model_with_tokenizer))
    await made.start()
    yield made
    await made.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_worker_trains_while_it_serves_and_goes_on_after_it_was_killed(
    client: WorkerClient, make_engine: EngineFactory, training_file: Path, tmp_path: Path
) -> None:
    many = {"n_epochs": 20, "save_steps": 10}
    with closing(
        Training(make_engine("llama").base, TokenizerSource(""), LatencyBudget(0.0), read=ReadHere)
    ) as here:
        here.start(command("whole", tmp_path / "whole", training_file, many))
        drive(here)

    long = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    expected = tokens_of(await collect(client, "before", long))
    job = command("job", tmp_path / "job", training_file, many)
    training = client.train(job)
    assert isinstance(await anext(training), TrainingPrepared)
    with pytest.raises(EngineError, match="another job is under training"):
        await anext(client.train(command("other", tmp_path / "other", training_file)))
    streams = [asyncio.create_task(collect(client, f"r{i}", long)) for i in range(3)]
    async for event in training:
        if isinstance(event, TrainingCheckpoint):
            break
    assert client.worker_pid is not None
    assert [tokens_of(one) for one in await asyncio.gather(*streams)] == [expected] * 3
    os.kill(client.worker_pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="restarting"):
        _ = [event async for event in training]
    await until(lambda: client.state == "ready")

    told = [event async for event in client.train(job)]
    assert isinstance(told[0], TrainingPrepared)
    assert 10 <= told[0].step < 80
    assert (tmp_path / "job" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_job_is_left_and_the_next_is_stopped_with_a_checkpoint(
    client: WorkerClient, training_file: Path, tmp_path: Path
) -> None:
    forever = {"n_epochs": 50, "save_steps": 1000}
    left = client.train(command("left", tmp_path / "left", training_file, forever))
    for _ in range(3):
        await anext(left)
    await left.aclose()  # nobody listens any more: it ends, and the next one begins
    training = client.train(command("a", tmp_path / "a", training_file, forever))
    told = [await anext(training) for _ in range(3)]
    await client.stop_training("a", save=True)
    told += [event async for event in training]
    assert kinds(told)[:3] == ["Prepared", "Step", "Step"]
    assert kinds(told)[-2:] == ["Checkpoint", "Ended"]
    ended = told[-1]
    assert isinstance(ended, TrainingEnded)
    assert ended.status == "stopped"
    assert (tmp_path / "a" / "checkpoints" / f"step-{ended.step}").is_dir()
    assert not (tmp_path / "left" / "checkpoints").exists()
