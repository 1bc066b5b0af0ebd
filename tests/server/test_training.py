"""Training beside a running engine: streams and the base stay as they are, no job's failure is more than its own."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.errors import TrainingError
from loramux_adapters.nf4 import NF4Linear
from loramux_adapters.training import run as run_module
from loramux_adapters.training.recipe import Recipe as TrainingRecipe
from loramux_adapters.training.trainer import Trainer
from loramux_adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from loramux_server.base.loading import ResidentBase
from loramux_server.engine import reading
from loramux_server.engine.budget import LatencyBudget
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import (
    AdapterRef,
    StopTraining,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingEval,
    TrainingEvent,
    TrainingPrepared,
    TrainingStep,
)
from loramux_server.engine.reading import Reading, ReadRequest, TokenizerSource
from loramux_server.engine.training import Training
from tests.adapters.training.support import chat, write_jsonl
from tests.server.support import EngineFactory, Recipe, request, run, tokens_of, write_adapter
from tests.server.training_support import FIELDS, STEPS, ReadHere, command, drive, is_step, kinds


@pytest.fixture
def engine(make_engine: EngineFactory) -> Engine:
    return make_engine("llama")


@pytest.fixture
def make_training(engine: Engine, model_with_tokenizer: Path) -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(base: ResidentBase | None = None, **changes: Any) -> Training:
        source = TokenizerSource(str(model_with_tokenizer))
        made.append(Training(base or engine.base, source, LatencyBudget(60.0), read=ReadHere, **changes))
        return made[-1]

    yield make
    for training in made:
        training.close()


def canonical(base: ResidentBase) -> list[bytes]:
    parts = [
        p for m in base.model.modules() if isinstance(m, NF4Linear) for p in m.quantized.canonical_parts()
    ]
    tensors = [*parts, *base.model.parameters(), *base.model.buffers()]
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


# --- beside an engine ----------------------------------------------------------------------------------------------


def test_running_requests_get_the_same_tokens(
    engine: Engine, make_training: Callable[..., Training], training_file: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "served", engine.base.geometry, Recipe(r=4, seed=1))
    arrivals = [
        (i, request(f"r{i}", list(range(9 + i, 30)), adapter if i % 2 else None, max_tokens=60))
        for i in range(4)
    ]
    expected = {name: tokens_of(outputs) for name, outputs in run(engine, arrivals).items()}
    before = canonical(engine.base)
    training = make_training()
    training._budget.seconds = 0.0
    step, told, slices = engine.step, [], 0

    def step_and_train() -> Any:
        nonlocal slices
        training._budget._allowed, training._budget._owed = 1.0, 0.0  # a slice after every step
        if not training.has_work:
            training.start(
                command(f"job{slices}", tmp_path / f"out{slices}", training_file, {"max_steps": 1})
            )
        told.extend(training.advance(decoding=True))
        slices += 1
        return step()

    engine.step = step_and_train  # type: ignore[method-assign]
    assert {name: tokens_of(outputs) for name, outputs in run(engine, arrivals).items()} == expected
    engine.step = step  # type: ignore[method-assign]
    assert slices > 50
    assert "Step" in kinds(told)
    assert canonical(engine.base) == before
    engine.check_integrity()


def test_what_is_told_of_a_job(
    engine: Engine, make_training: Callable[..., Training], training_file: Path, tmp_path: Path
) -> None:
    training = make_training()
    out = tmp_path / "out"
    training.start(command("a", out, training_file, {"eval_steps": 4}, validation_file=str(training_file)))
    told = drive(training)
    assert {event.id for event in told} == {"a"}
    every = ["Step"] * STEPS
    for place, kind in ((8, "Checkpoint"), (8, "Eval"), (6, "Checkpoint"), (4, "Eval"), (3, "Checkpoint")):
        every.insert(place, kind)
    assert kinds(told) == ["Prepared", "Eval", *every, "Ended"]
    prepared, last = told[0], told[-1]
    assert isinstance(prepared, TrainingPrepared)
    assert (prepared.total_steps, prepared.step) == (STEPS, 0)
    assert prepared.plan["recipe"]["r"] == 4
    assert prepared.plan["auto"].keys() >= {"learning_rate", "target_modules"}
    assert last == TrainingEnded("a", "finished", STEPS)
    for event in told:
        if isinstance(event, TrainingCheckpoint):
            assert LoraWeights.read(Path(event.path), engine.base.geometry).rank == 4
        if isinstance(event, TrainingStep):
            assert event.memory_bytes > 2**20
            assert event.seconds > 0
    assert [event.step for event in told if isinstance(event, TrainingEval)] == [0, 4, 8]
    assert LoraWeights.read(out, engine.base.geometry).rank == 4


@pytest.mark.parametrize("save", [True, False])
def test_stopped_or_killed_it_goes_on_to_the_same_bytes(
    save: bool, make_training: Callable[..., Training], training_file: Path, tmp_path: Path
) -> None:
    training = make_training()
    fields = {"eval_steps": 2}
    training.start(
        command("whole", tmp_path / "whole", training_file, fields, validation_file=str(training_file))
    )
    whole = drive(training)
    out = tmp_path / "out"
    training.start(command("part", out, training_file, fields, validation_file=str(training_file)))
    drive(training, is_step(4))
    for _ in range(3):  # into the validation that follows, or with it the next step
        training.advance(decoding=False)
    training.stop(StopTraining("part", save))
    assert kinds(drive(training)) == (["Checkpoint", "Ended"] if save else ["Ended"])
    assert not training.has_work
    training.start(command("part", out, training_file, fields, validation_file=str(training_file)))
    told = drive(training)
    assert isinstance(told[0], TrainingPrepared)
    assert told[0].step == (4 if save else 3)
    assert told[-1] == TrainingEnded("part", "finished", STEPS)
    assert (out / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    evals = [[(e.step, e.valid_loss) for e in told if isinstance(e, TrainingEval)] for told in (whole, told)]
    assert evals[1] == evals[0][-3:]  # of steps 4, 6 and 8


def test_a_stop_in_the_midst_of_a_step_keeps_the_steps_before(
    make_training: Callable[..., Training], training_file: Path, tmp_path: Path
) -> None:
    training = make_training()
    training.start(command("a", tmp_path / "a", training_file))
    drive(training, is_step(2))
    for _ in range(4):
        assert training.advance(decoding=False) == []
    training.stop(StopTraining("a", save=True))
    checkpoint, ended = drive(training)
    assert isinstance(checkpoint, TrainingCheckpoint)
    assert checkpoint.step == 2
    assert ended == TrainingEnded("a", "stopped", 2)


def test_a_stop_does_not_wait_for_the_budget(
    make_training: Callable[..., Training],
    training_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = make_training()
    training.start(command("a", tmp_path / "a", training_file))
    drive(training, is_step(1))
    monkeypatch.setattr(training._budget, "allows", lambda kind: False)
    for _ in range(5):
        assert training.advance(decoding=True) == []
    training.stop(StopTraining("a", save=True))
    told: list[TrainingEvent] = []
    deadline = time.monotonic() + 60
    while training.has_work and time.monotonic() < deadline:
        told += training.advance(decoding=True)
    assert kinds(told) == ["Checkpoint", "Ended"]


def test_a_job_is_stopped_while_its_files_are_read_or_it_waits(
    make_training: Callable[..., Training],
    training_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ReadHere, "waits", 10**9)
    training = make_training()
    training.start(command("a", tmp_path / "a", training_file))
    training.start(command("b", tmp_path / "b", training_file))
    while not isinstance(training._pending, ReadHere):
        training.advance(decoding=False)
    files = training._pending
    assert training.is_waiting
    training.stop(StopTraining("b", save=True))
    training.stop(StopTraining("a", save=True))
    training.stop(StopTraining("unknown", save=True))
    assert drive(training) == [TrainingEnded("a", "stopped", 0), TrainingEnded("b", "stopped", 0)]
    assert files.closed


def test_who_finished_without_being_heard_has_finished(
    make_training: Callable[..., Training], training_file: Path, tmp_path: Path
) -> None:
    training = make_training()
    out = tmp_path / "out"
    training.start(command("a", out, training_file, {"max_steps": 2}))
    drive(training)
    training.start(command("a", out, training_file, {"max_steps": 2}))
    assert drive(training) == [TrainingEnded("a", "finished", 2)]
    (out / "training_manifest.json").unlink()  # an adapter from elsewhere
    training.start(command("a", out, training_file, {"max_steps": 2}))
    [ended] = drive(training)
    assert isinstance(ended, TrainingEnded)
    assert (ended.status, ended.param) == ("failed", "out")


def test_failures_are_told_and_the_next_job_is_trained(
    engine: Engine,
    make_training: Callable[..., Training],
    training_file: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    training = make_training()

    def failure(*arguments: Any, **more: Any) -> tuple[str | None, str | None, str]:
        training.start(command("bad", tmp_path / "bad", *arguments, **more))
        *_, ended = drive(training)
        assert isinstance(ended, TrainingEnded)
        assert ended.status == "failed"
        return ended.code, ended.param, str(ended.error)

    wrong = write_jsonl(tmp_path / "wrong.jsonl", [chat("a", "b"), {"messages": []}])
    code, param, error = failure(wrong)
    assert (code, param) == ("invalid_training_file", "training_file")
    assert error.startswith("Invalid file format of wrong.jsonl. Line 2")
    assert failure(training_file, {"rank": 3})[:2] == ("invalid_training", "rank")
    assert failure(training_file, {"optimizer": "adamw_8bit"})[:2] == ("invalid_training", "optimizer")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "free_memory", lambda device: 513 * 2**20)
        code, param, error = failure(training_file)
    assert (code, param) == ("not_enough_memory", "batch_size")
    assert "and 1 MiB of host memory are free" in error

    served = write_adapter(tmp_path / "served", engine.base.geometry, Recipe(r=4))
    assert failure(training_file, {"init_from": "served"})[:2] == ("invalid_training", "init_from")
    other = AdapterRef("0" * 64, served.path)
    assert "its hash differs" in failure(training_file, {"init_from": "served"}, initial=other)[2]
    (Path(served.path) / CONFIG_FILE).unlink()
    assert failure(training_file, {"init_from": "served"}, initial=served)[0] == "invalid_adapter"

    def broken(*_: object) -> None:
        raise RuntimeError("out of luck\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", broken)
        assert failure(training_file) == ("internal_error", None, "RuntimeError: out of luck")
    training.start(command("good", tmp_path / "good", training_file, {"max_steps": 1}))
    assert kinds(drive(training))[-2:] == ["Checkpoint", "Ended"]


def test_on_an_accelerator_an_unknown_failure_ends_the_worker_and_no_memory_does_not(
    engine: Engine,
    make_training: Callable[..., Training],
    training_file: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    training = make_training()
    failures: list[BaseException] = [
        torch.OutOfMemoryError("CUDA out of memory\nmore"),
        RuntimeError("CUDA error"),
    ]

    def broken(*_: object) -> None:
        raise failures.pop(0)

    monkeypatch.setattr(Trainer, "_update", broken)
    for name in "ab":
        training.start(command(name, tmp_path / name, training_file))
        drive(training, lambda event: isinstance(event, TrainingPrepared))
        assert training._job is not None
        training._job._base = replace(engine.base, device=torch.device("cuda"))
        if name == "a":
            [ended] = drive(training)
            assert isinstance(ended, TrainingEnded)
            assert ended.code == "out_of_memory"
        else:
            with pytest.raises(RuntimeError, match="CUDA error"):
                drive(training)


def test_nothing_of_a_job_is_left(
    make_training: Callable[..., Training], training_file: Path, tmp_path: Path
) -> None:
    training = make_training()
    training.start(command("a", tmp_path / "a", training_file))
    drive(training, is_step(1))
    assert training._job is not None
    made = training._job._run
    assert made is not None
    left: list[weakref.ref[Any]] = [weakref.ref(one) for one in made._trainer.parameters.values()]
    left += [weakref.ref(made), weakref.ref(made._trainer._stack._model)]
    del made
    gc.collect()  # of what went before
    gc.disable()
    try:
        training.stop(StopTraining("a", save=False))
        drive(training)
    finally:
        gc.enable()
    assert {reference() for reference in left} == {None}


def test_times_are_the_device_s_and_what_serving_took(
    make_training: Callable[..., Training], training_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    now = 0.0
    training = make_training(clock=lambda: now)
    monkeypatch.setattr(training._pace, "settle", lambda lagging: tick(0.25))  # each slice takes so long

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    training.start(command("a", tmp_path / "a", training_file, {"max_steps": 2, "save_steps": 2}))
    drive(training, is_step(1))
    told: list[TrainingEvent] = []
    slices = 0
    while not told:
        tick(1.0)  # an engine's step
        training._budget.seconds = 0.0
        training._budget._allowed, training._budget._owed = 1.0, 0.0
        told = training.advance(decoding=True)
        slices += 1
    [step] = told
    assert isinstance(step, TrainingStep)
    assert step.seconds == pytest.approx(0.25 * slices)
    assert step.waited == pytest.approx(1.0 * slices)
    assert slices > 6


# --- files are read in a child ----------------------------------------------------------------------------------------


def test_what_a_child_reads_is_what_is_read_here(
    engine: Engine, model_with_tokenizer: Path, training_file: Path
) -> None:
    base = run_module.training_base(engine.base.model, engine.base.geometry)
    asked = TrainingRecipe.parse(FIELDS)
    wanted = ReadRequest(
        base, TokenizerSource(str(model_with_tokenizer)), asked, str(training_file), None, None
    )
    good = Reading(wanted)
    bad = Reading(replace(wanted, tokenizer=TokenizerSource(str(training_file.parent))))
    killed = Reading(wanted)
    try:
        killed._child.kill()
        assert good.result() == reading.read(wanted)
        with pytest.raises(TrainingError, match="cannot read the tokenizer") as caught:
            bad.result()
        assert caught.value.param == "model"
        with pytest.raises(TrainingError, match="ended with exit code -9"):
            killed.result()
    finally:
        for one in (good, bad, killed):
            one.close()
    assert not any(one._child.is_alive() for one in (good, bad, killed))
