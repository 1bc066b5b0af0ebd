"""Jobs of tests that train: small ones, their files read at once, driven as an idle worker does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loramux_adapters.training.inputs import TrainingInputs, read_inputs
from loramux_server.engine.messages import StartTraining, TrainingEvent, TrainingStep
from loramux_server.engine.reading import ReadRequest
from loramux_server.engine.training import Training
from tests.adapters.training.support import byte_tokenizer

FIELDS: dict[str, Any] = {"r": 4, "n_epochs": 2, "batch_size": 2, "lora_dropout": 0.1, "save_steps": 3}
TOKENIZER = byte_tokenizer()
STEPS = 8  # of seven rows in batches of two, twice


class ReadHere:
    """Files read in this process; the result is there at the third time of asking."""

    waits = 2

    def __init__(self, request: ReadRequest) -> None:
        self.request = request
        self.closed = False
        self._waited = 0

    def done(self) -> bool:
        self._waited += 1
        return self._waited > self.waits

    def result(self) -> TrainingInputs:
        wanted = self.request
        validation = None if wanted.validation_file is None else Path(wanted.validation_file)
        return read_inputs(
            wanted.base,
            TOKENIZER,
            wanted.recipe,
            Path(wanted.training_file),
            validation_file=validation,
            initial=wanted.initial,
        )

    def close(self) -> None:
        self.closed = True


def command(
    name: str, out: Path, data: Path, recipe: dict[str, Any] | None = None, **more: Any
) -> StartTraining:
    return StartTraining(name, str(out), FIELDS | (recipe or {}), str(data), **more)


def drive(training: Training, until: Callable[[TrainingEvent], bool] | None = None) -> list[TrainingEvent]:
    """As an idle worker does, until an event or the end."""
    told: list[TrainingEvent] = []
    while training.has_work:
        told += training.advance(decoding=False)
        if until is not None and told and until(told[-1]):
            break
    return told


def is_step(number: int) -> Callable[[TrainingEvent], bool]:
    return lambda event: isinstance(event, TrainingStep) and event.step == number


def kinds(events: list[TrainingEvent]) -> list[str]:
    return [type(event).__name__.removeprefix("Training") for event in events]
