"""A fine-tuning run from files to an adapter: data, trainer, validation, checkpoints, and the manifest of it all.

    run = TrainingRun.prepare(model, geometry, tokenizer, recipe, data, out)
    for event in run.slices(): ...      # None at every layer, else what happened

Promises: nothing of the served model changes, not even for a moment; whatever stops a run, `resume=True` continues it
from its last checkpoint to the same adapter (on the CPU to the last bit); an adapter is at `out` only when the run is
complete. Not thread-safe: whoever owns the device drives it; with a `writer` only files are left to another thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.batches import Batches
from loramux_adapters.training.checkpoints import (
    Checkpoints,
    Snapshot,
    check_identity,
    check_output,
    publish,
)
from loramux_adapters.training.context import context_length
from loramux_adapters.training.diagnoses import Diagnosis, diagnose
from loramux_adapters.training.elsewhere import elsewhere
from loramux_adapters.training.inputs import TrainingInputs, read_inputs
from loramux_adapters.training.layerwise import LayerStack
from loramux_adapters.training.layout import CHECKPOINTS, MANIFEST_FILE
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.manifest import manifest_of, provenance_of
from loramux_adapters.training.memory import check_memory, free_memory
from loramux_adapters.training.optimizers import restore_state, state_of
from loramux_adapters.training.recipe import Recipe, TrainingBase
from loramux_adapters.training.samples import Sample
from loramux_adapters.training.trainer import Score, StepReport, Trainer
from loramux_adapters.twin import twin_of
from loramux_adapters.weights import LoraWeights


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Validation after `step` steps; 0 is the base, or the adapter that training began with."""

    step: int
    valid_loss: float
    valid_mean_token_accuracy: float


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint that is on the disk, an adapter that can be served."""

    step: int
    path: Path


Event = StepReport | EvalReport | CheckpointReport | Diagnosis
# Besides events: None is a slice done, a Future says that there is nothing to do until it is.
Slice = Event | Future[Any] | None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The finished adapter at `out`, and what its manifest says."""

    out: Path
    weights: LoraWeights
    manifest: dict[str, Any]


class TrainingRun:
    """See the module. `recipe`, `why`, `data` and `validation` are for showing before it starts."""

    def __init__(
        self, geometry: BaseGeometry, inputs: TrainingInputs, adapter: TrainedAdapter, stack: LayerStack,
        out: Path, initial: LoraWeights | None,
    ) -> None:  # fmt: skip
        """`building` makes one."""
        self.recipe, self.why = inputs.recipe, inputs.why
        self.data, self.validation = inputs.data, inputs.validation
        self.warnings = [*inputs.data.report.warnings]
        self.history: list[dict[str, Any]] = []
        self.out = out
        self.adapter = adapter
        self.saved_step = 0  # of the latest checkpoint
        self._checkpoints = Checkpoints(out / CHECKPOINTS)
        recipe = self.recipe
        batches = Batches(inputs.units, recipe.batch_size, recipe.gradient_accumulation_steps, recipe.seed)
        self._trainer = Trainer(stack, self.adapter, recipe, self.data.samples, batches)
        self._identity = {
            "base": geometry.identity,
            "data": inputs.digest,
            "initial": None if initial is None else initial.generation,
            "recipe": recipe.to_json(),
        }
        dtype, device = str(stack.dtype).removeprefix("torch."), str(stack.device)
        self._provenance = provenance_of(
            inputs, geometry, initial, dtype=dtype, device=device, parameters=self.trainable_parameters
        )

    @classmethod
    def prepare(
        cls, model: PreTrainedModel, geometry: BaseGeometry, tokenizer: Any, recipe: Recipe, training_file: Path,
        out: Path, *, validation_file: Path | None = None, initial: LoraWeights | None = None, resume: bool = False,
        chat_template: str | None = None,
    ) -> TrainingRun:  # fmt: skip
        """Read and check everything; nothing is trained yet. `initial` are the weights `recipe.init_from` names.

        Raises TrainingError, or BaseModelError for a base that cannot be trained.
        """
        check_output(out, resume=resume)
        inputs = read_inputs(
            training_base(model, geometry),
            tokenizer,
            recipe,
            training_file,
            validation_file=validation_file,
            initial=None if initial is None else initial.spec,
            chat_template=chat_template,
        )
        building = cls.building(model, geometry, inputs, out, initial=initial, resume=resume, alone=True)
        while True:
            try:
                next(building)
            except StopIteration as end:
                run: TrainingRun = end.value
                return run

    @classmethod
    def building(
        cls, model: PreTrainedModel, geometry: BaseGeometry, inputs: TrainingInputs, out: Path, *,
        initial: LoraWeights | None = None, resume: bool = False, writer: Executor | None = None,
        reserved: int = 0, memory_name: str = "memory", alone: bool = False,
    ) -> Generator[Future[Any] | None, None, TrainingRun]:  # fmt: skip
        """The run of what `read_inputs` gave, in slices as `slices` has them.

        `reserved` bytes of the memory that is free are not training's; `alone` if nothing is served meanwhile. Raises
        TrainingError or BaseModelError.
        """
        check_output(out, resume=resume)
        config, device = model.config.get_text_config(), model.device.type
        needed = inputs.memory(config, geometry, model.dtype.itemsize, device, alone=alone)
        check_memory(needed, max(0.0, free_memory(model.device) - reserved), memory_name)
        twin = twin_of(model)
        yield None
        seed, dropout = inputs.recipe.seed, inputs.recipe.lora_dropout
        adapter = TrainedAdapter.install(
            twin, inputs.spec, geometry, seed=seed, dropout=dropout, initial=initial
        )
        yield None
        run = cls(geometry, inputs, adapter, LayerStack(twin, alone=alone), out, initial)
        yield None
        if resume:
            checkpoints = run._checkpoints
            run._resume(*(yield from elsewhere(writer, lambda: checkpoints.latest(geometry))))
        return run

    @property
    def upcoming(self) -> str:
        """The kind of the next slice; those of a kind take about as long."""
        return self._trainer.upcoming

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._trainer.step

    def chosen(self, field: str) -> object:
        return {"learning_rate_multiplier": 1.0, **self.recipe.to_json()}[field]  # what "auto" became

    def plan(self) -> dict[str, Any]:
        """For showing before it is trained."""
        return {
            "recipe": self.recipe.to_json(),
            "auto": self.why,
            "trainable_parameters": self.trainable_parameters,
            "data": asdict(self.data.report),
            "validation": None if self.validation is None else asdict(self.validation.report),
            "warnings": self.warnings,
        }

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._trainer.parameters.values())

    def slices(self, writer: Executor | None = None) -> Generator[Slice, None, TrainingResult]:
        """Train to the end; every yield is a place to stop. Raises TrainingError or StorageError."""
        if self.step == 0 or self._owes_validation():
            yield from self._validate()
        yield from self._diagnoses()
        while self.step < self.recipe.total_steps:
            report = yield from self._trainer.slices()
            self.history.append({key: value for key, value in asdict(report).items() if key in _CURVE})
            yield report
            if self._due(self.recipe.eval_steps):
                yield from self._validate()
            yield from self._diagnoses()
            if self._due(self.recipe.save_steps):
                yield (yield from self.saving(writer))
        weights = self.adapter.weights()
        return (yield from elsewhere(writer, lambda: self._finish(weights)))

    def evaluate(self, samples: Sequence[Sample]) -> Generator[None, None, Score]:
        return self._trainer.evaluate(samples)  # any, between steps

    def save(self) -> CheckpointReport:
        """A checkpoint of the last whole step; at any stop. What the step under way has computed is not in it."""
        try:
            next(self.saving(None))
        except StopIteration as end:
            report: CheckpointReport = end.value
            return report
        raise AssertionError("without a writer there is nothing to wait for")

    def saving(self, writer: Executor | None) -> Generator[Future[Any], None, CheckpointReport]:
        """`save`, with the files left to the writer."""
        snapshot = self._snapshot()
        path = yield from elsewhere(writer, lambda: self._checkpoints.save(snapshot, self._provenance))
        self.saved_step = snapshot.step
        return CheckpointReport(snapshot.step, path)

    def _snapshot(self) -> Snapshot:
        """A copy, so that training may go on."""
        tensors, numbers = state_of(self._trainer.optimizer, self._trainer.parameters)
        history = [dict(entry) for entry in self.history]
        return Snapshot(self.step, self.adapter.weights(), tensors, numbers, self._identity, history)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.recipe.total_steps)

    def _owes_validation(self) -> bool:
        """Stopped between a step and the validation that was to follow it."""
        return self._due(self.recipe.eval_steps) and "valid_loss" not in self.history[-1]

    def _validate(self) -> Generator[Event | None, None, None]:
        if self.validation is None:
            return
        score = yield from self._trainer.evaluate(self.validation.samples)
        report = EvalReport(self.step, score.loss, score.mean_token_accuracy)
        found = {key: value for key, value in asdict(report).items() if key != "step"}
        if self.history:
            self.history[-1].update(found)
        else:
            self.history.append({"step": 0, **found})
        yield report

    def _diagnoses(self) -> Iterator[Diagnosis]:
        """Each kind is said once a run; the curve remembers, so that a resumed run does not repeat it."""
        said = {kind for entry in self.history for kind in entry.get("diagnoses", ())}
        for diagnosis in diagnose(self.history, self.recipe):
            if diagnosis.code not in said:
                self.history[-1].setdefault("diagnoses", []).append(diagnosis.code)
                self.warnings.append(f"step {diagnosis.step}: {diagnosis.message}")
                yield diagnosis

    def _resume(self, snapshot: Snapshot | None, problems: list[str]) -> None:
        self.warnings += problems
        if snapshot is None:
            return
        check_identity(snapshot.identity, self._identity)
        self.adapter.load(snapshot.weights)
        restore_state(
            self._trainer.optimizer, self._trainer.parameters, snapshot.optimizer, snapshot.optimizer_numbers
        )
        self._trainer.step = self.saved_step = snapshot.step
        self.history = [dict(entry) for entry in snapshot.history]

    def _finish(self, weights: LoraWeights) -> TrainingResult:
        manifest = manifest_of(self._provenance, weights, self.history)
        publish(self.out, weights, MANIFEST_FILE, manifest)
        return TrainingResult(self.out, weights, manifest)


_CURVE = ("step", "epoch", "train_loss", "train_mean_token_accuracy", "learning_rate", "grad_norm")


def training_base(model: PreTrainedModel, geometry: BaseGeometry) -> TrainingBase:
    """What `read_inputs` must know of a base."""
    config = model.config.get_text_config()
    return TrainingBase(geometry, config.hidden_size, context_length(config), model.device.type)
