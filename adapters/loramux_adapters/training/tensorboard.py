"""A run's curves as TensorBoard reads them: one events file for each time the run was started. No torch.

Needs the extra `loramux[tensorboard]` (tensorboardX, a writer without TensorFlow or torch). Promises: a run that goes on
from an earlier step hides what was written of later steps before. Does not read events, and does not start TensorBoard.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol
from uuid import uuid4

from loramux_adapters.errors import ConfigError
from loramux_adapters.files import storage_error

_FLUSH_S = 5  # how often what was recorded is written

TRAINING = {
    "train_loss": "train/loss",
    "train_mean_token_accuracy": "train/mean_token_accuracy",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
}
VALIDATION = {"valid_loss": "valid/loss", "valid_mean_token_accuracy": "valid/mean_token_accuracy"}


class Step(Protocol):
    """An optimizer step, by whoever reports it."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Evaluation(Protocol):
    @property
    def step(self) -> int: ...


def check_tensorboard() -> None:
    """Raises ConfigError, naming the extra, if nothing is installed that writes events."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "--tensorboard needs tensorboardX: pip install 'loramux[tensorboard]'", param="tensorboard"
        )


class TensorBoardLog:
    """`step` is the last one that counts of an earlier start. Raises ConfigError, StorageError. Its methods block."""

    def __init__(self, directory: Path, step: int = 0) -> None:
        check_tensorboard()
        from tensorboardX import SummaryWriter

        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Without a suffix two starts within a second would be one file.
            self._writer = SummaryWriter(
                str(directory),
                purge_step=step + 1 if step else None,
                flush_secs=_FLUSH_S,
                filename_suffix=f".{uuid4().hex[:8]}",
            )
        except OSError as error:
            raise storage_error(f"TensorBoard files cannot be written to {directory}", error) from error

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def trained(self, step: Step) -> None:
        self._write(step, TRAINING)
        self._writer.add_scalar("train/tokens_per_second", step.tokens / max(step.seconds, 1e-9), step.step)
        memory = getattr(step, "memory_bytes", None)
        if memory is not None:
            self._writer.add_scalar("train/memory_bytes", memory, step.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._write(evaluation, VALIDATION)

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Evaluation, tags: Mapping[str, str]) -> None:
        for field, tag in tags.items():
            self._writer.add_scalar(tag, getattr(event, field), event.step)
