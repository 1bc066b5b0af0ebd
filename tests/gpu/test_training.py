"""Training on the device: the optimizers that exist only there, the CPU's losses, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.training.trainer import Trainer
from loramux_server.base.loading import LoadOptions, ResidentBase, load_base
from loramux_server.engine.budget import LatencyBudget
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import StopTraining, TrainingEnded, TrainingStep
from loramux_server.engine.reading import TokenizerSource
from loramux_server.engine.training import Training
from tests.server.support import EngineFactory, request, run, tokens_of
from tests.server.training_support import STEPS, ReadHere, command, drive, is_step

OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_8bit"]


@pytest.fixture
def engine(make_engine: EngineFactory) -> Engine:
    return make_engine("llama")


@pytest.fixture
def make_training() -> Iterator[Callable[[ResidentBase], Training]]:
    made: list[Training] = []

    def make(base: ResidentBase) -> Training:
        made.append(Training(base, TokenizerSource("unused"), LatencyBudget(60.0), read=ReadHere))
        return made[-1]

    yield make
    for training in made:
        training.close()


def losses(events: list[Any]) -> list[float]:
    assert isinstance(events[-1], TrainingEnded)
    assert events[-1].status == "finished", events[-1].error
    return [event.train_loss for event in events if isinstance(event, TrainingStep)]


def test_the_losses_are_the_cpus(
    engine: Engine,
    make_training: Callable[[ResidentBase], Training],
    tiny_model: Callable[[str], Path],
    training_file: Path,
    tmp_path: Path,
) -> None:
    cpu = load_base(LoadOptions(model=str(tiny_model("llama")), name="tiny", device="cpu", dtype="float32"))
    found = {}
    for name, base in (("cuda", engine.base), ("cpu", cpu)):
        training = make_training(base)
        training.start(command(name, tmp_path / name, training_file, {"lora_dropout": 0.0}))
        found[name] = losses(drive(training))
    assert len(found["cpu"]) == STEPS
    # Not tighter: the two devices may have rounded a few codes of the NF4 weights differently.
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(
    optimizer: str,
    engine: Engine,
    make_training: Callable[[ResidentBase], Training],
    training_file: Path,
    tmp_path: Path,
) -> None:
    # Rank 64: bitsandbytes keeps states of fewer than 4096 values in 32 bits.
    recipe = {"optimizer": optimizer, "r": 64, "n_epochs": 6, "learning_rate": 2e-3}
    training = make_training(engine.base)
    training.start(command("job", tmp_path / "job", training_file, recipe))
    curve = losses(drive(training))
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_job_goes_on_where_it_was(
    optimizer: str,
    engine: Engine,
    make_training: Callable[[ResidentBase], Training],
    training_file: Path,
    tmp_path: Path,
) -> None:
    recipe = {"optimizer": optimizer, "r": 64}
    whole = make_training(engine.base)
    whole.start(command("whole", tmp_path / "whole", training_file, recipe))
    expected = losses(drive(whole))

    first = make_training(engine.base)
    first.start(command("parts", tmp_path / "parts", training_file, recipe))
    drive(first, is_step(4))
    first.stop(StopTraining("parts", save=True))
    assert drive(first)[-1].status == "stopped"  # type: ignore[union-attr]
    second = make_training(engine.base)
    second.start(command("parts", tmp_path / "parts", training_file, recipe))
    rest = losses(drive(second))
    assert rest == pytest.approx(expected[4:], rel=1e-4)


def test_memory_that_runs_out_fails_the_job_and_nobody_else(
    engine: Engine,
    make_training: Callable[[ResidentBase], Training],
    training_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = list(range(5, 40))
    before = tokens_of(run(engine, [(0, request("before", prompt))])["before"])
    training = make_training(engine.base)
    stepped = Trainer._update

    def too_much(self: Trainer) -> tuple[float, float]:
        torch.empty(2**50, dtype=torch.uint8, device=engine.base.device)
        return stepped(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", too_much)
        training.start(command("large", tmp_path / "large", training_file))
        ended = drive(training)[-1]
    assert isinstance(ended, TrainingEnded)
    assert (ended.status, ended.code) == ("failed", "out_of_memory")

    assert tokens_of(run(engine, [(0, request("after", prompt))])["after"]) == before
    training.start(command("small", tmp_path / "small", training_file, {"max_steps": 1}))
    assert len(losses(drive(training))) == 1


def test_what_a_job_held_is_given_back(
    engine: Engine,
    make_training: Callable[[ResidentBase], Training],
    training_file: Path,
    tmp_path: Path,
) -> None:
    training = make_training(engine.base)
    held = []
    for name in ("first", "second", "third"):
        training.start(command(name, tmp_path / name, training_file, {"r": 64}))
        losses(drive(training))
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1]
