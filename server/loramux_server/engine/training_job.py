"""One training job from its files to its end, as a generator of slices for the thread that owns the device.

Promises: files are read in another process and written on another thread; a job whose directory holds checkpoints goes
on from the last one, and one whose directory holds its finished adapter has finished; a stop loses at most the step that
is under way. Whatever goes wrong is the job's `TrainingEnded` and not the worker's end, unless the device may be
poisoned. Does not decide when a slice runs (`training.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Literal, Protocol

import psutil
import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterUnavailable, LoramuxError, TrainingError
from loramux_adapters.training.diagnoses import Diagnosis
from loramux_adapters.training.elsewhere import elsewhere
from loramux_adapters.training.inputs import TrainingInputs
from loramux_adapters.training.layout import MANIFEST_FILE
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run import (
    CheckpointReport,
    EvalReport,
    Event,
    TrainingRun,
    training_base,
)
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.messages import (
    AdapterRef,
    StartTraining,
    StopTraining,
    TrainingCheckpoint,
    TrainingDiagnosis,
    TrainingEnded,
    TrainingEval,
    TrainingEvent,
    TrainingPrepared,
    TrainingStep,
)
from loramux_server.engine.reading import ReadRequest, TokenizerSource
from loramux_server.engine.shrinking import is_out_of_memory

logger = logging.getLogger(__name__)

# Of free memory, left to what engine steps allocate for activations and logits.
_RESERVED = 512 * 2**20
_GPU_MEMORY = "GPU memory (less --kv-cache-memory or --gpu-memory-utilization for serving leaves more)"


class Pending(Protocol):
    """Work that happens elsewhere: a Future, or files being read."""

    def done(self) -> bool: ...


class Files(Pending, Protocol):
    def result(self) -> TrainingInputs: ...

    def close(self) -> None: ...


ReadFiles = Callable[[ReadRequest], Files]
Moment = TrainingEvent | Pending | None  # None: a slice is done


class TrainingJob:
    """One job from its files to its end; `slices` is all of it."""

    def __init__(
        self,
        command: StartTraining,
        base: ResidentBase,
        tokenizer: TokenizerSource,
        read: ReadFiles,
        writer: Executor,
    ) -> None:
        self.id = command.id
        self.stop: StopTraining | None = None  # once it is asked for
        self._command = command
        self._base = base
        self._tokenizer = tokenizer
        self._read = read
        self._writer = writer
        self._run: TrainingRun | None = None

    @property
    def upcoming(self) -> str:
        """The kind of the next slice."""
        return "preparing" if self._run is None else self._run.upcoming

    def slices(self) -> Generator[Moment, None, TrainingEnded]:
        """Never raises, but for errors of an accelerator."""
        try:
            return (yield from self._slices())
        except LoramuxError as error:
            return self._ended("failed", error.message, error.code, error.param)
        except Exception as error:
            if is_out_of_memory(error):
                reason = str(error).partition("\n")[0]
                return self._ended("failed", f"not enough memory to train ({reason})", "out_of_memory")
            if isinstance(error, RuntimeError) and self._base.device.type != "cpu":
                raise  # it may come from the device, of which nothing can be trusted then
            logger.exception("training job %s failed", self.id)
            return self._ended(
                "failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", "internal_error"
            )

    def _slices(self) -> Generator[Moment, None, TrainingEnded]:
        command, base, writer = self._command, self._base, self._writer
        if self.stop is not None:
            return self._ended("stopped")
        out = Path(command.out)
        done = yield from elsewhere(writer, lambda: finished_steps(out))
        if done is not None:
            return TrainingEnded(self.id, "finished", done)
        recipe = Recipe.parse(command.recipe)
        initial = None
        if recipe.init_from is not None and command.initial is None:
            raise TrainingError("the weights that init_from names are missing", param="init_from")
        if command.initial is not None:
            source = command.initial
            initial = yield from elsewhere(writer, lambda: _read_adapter(source, base))
        inputs = yield from self._inputs(recipe, initial)
        if inputs is None:
            return self._ended("stopped")
        run = self._run = yield from TrainingRun.building(
            base.model,
            base.geometry,
            inputs,
            out,
            initial=initial,
            resume=True,
            writer=writer,
            reserved=_RESERVED,
            memory_name=_GPU_MEMORY if base.device.type == "cuda" else "host memory",
        )
        yield TrainingPrepared(self.id, run.plan(), run.recipe.total_steps, run.step)
        slices = run.slices(writer)
        moment: Event | Pending | None = None
        # What is being written is waited for before a stop counts: it may be the end.
        while self.stop is None or isinstance(moment, Future):
            try:
                moment = next(slices)
            except StopIteration:
                return self._ended("finished")
            yield moment if moment is None or isinstance(moment, Future) else self._told(moment)
        slices.close()
        if self.stop.save and run.step > run.saved_step:
            yield self._told((yield from run.saving(writer)))
        return self._ended("stopped")

    def _inputs(
        self, recipe: Recipe, initial: LoraWeights | None
    ) -> Generator[Moment, None, TrainingInputs | None]:
        """None if the job was stopped meanwhile."""
        reading = self._read(
            ReadRequest(
                base=training_base(self._base.model, self._base.geometry),
                tokenizer=self._tokenizer,
                recipe=recipe,
                training_file=self._command.training_file,
                validation_file=self._command.validation_file,
                initial=None if initial is None else initial.spec,
            )
        )
        try:
            while not reading.done():
                yield reading
                if self.stop is not None:
                    return None
            return reading.result()
        finally:
            reading.close()

    def _told(self, event: Event) -> TrainingEvent:
        if isinstance(event, EvalReport):
            return TrainingEval(self.id, event.step, event.valid_loss, event.valid_mean_token_accuracy)
        if isinstance(event, CheckpointReport):
            return TrainingCheckpoint(self.id, event.step, str(event.path))
        if isinstance(event, Diagnosis):
            return TrainingDiagnosis(self.id, event.step, event.code, event.param, event.message)
        return TrainingStep(
            id=self.id,
            step=event.step,
            total_steps=event.total_steps,
            epoch=event.epoch,
            train_loss=event.train_loss,
            train_mean_token_accuracy=event.train_mean_token_accuracy,
            learning_rate=event.learning_rate,
            grad_norm=event.grad_norm,
            tokens=event.tokens,
            trained_tokens=event.trained_tokens,
            seconds=event.seconds,
            waited=0.0,
            memory_bytes=_held(self._base.device),
        )

    def _ended(
        self,
        status: Literal["finished", "stopped", "failed"],
        error: str | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> TrainingEnded:
        return TrainingEnded(self.id, status, 0 if self._run is None else self._run.step, error, code, param)


def finished_steps(out: Path) -> int | None:
    """Steps of the run whose adapter is at `out`: it finished, and nobody was told. None if there is no such adapter."""
    if not (out / CONFIG_FILE).exists():
        return None
    try:
        curve = json.loads((out / MANIFEST_FILE).read_bytes())["loss_curve"]
        return int(curve[-1]["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # somebody else's adapter, which the run will refuse to write over


def _read_adapter(source: AdapterRef, base: ResidentBase) -> LoraWeights:
    """The gate once more: what is trained further is what the generation is."""
    try:
        weights = LoraWeights.read(Path(source.path), base.geometry)
    except OSError as error:
        raise AdapterUnavailable(f"the adapter to train further cannot be read: {error}") from error
    if weights.generation != source.generation:
        raise AdapterUnavailable("the adapter to train further is damaged: its hash differs")
    return weights


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)
