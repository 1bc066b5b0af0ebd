"""A fine-tuning run from files to an adapter: data, trainer, validation, checkpoints, and the manifest of it all.

    run = TrainingRun.prepare(model, geometry, tokenizer, recipe, data, out)
    for event in run.slices(): ...      # None at every layer, else what happened

Promises: nothing of the served model changes, not even for a moment; whatever stops a run, `resume=True` continues it
from its last checkpoint to the same adapter (on the CPU to the last bit); an adapter is at `out` only when the run is
complete. Not thread-safe: whoever owns the device drives it.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from loramux_adapters import __version__
from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.training.batches import Batches, Unit, pack
from loramux_adapters.training.checkpoints import Checkpoints, Snapshot, check_identity, publish
from loramux_adapters.training.context import context_length
from loramux_adapters.training.diagnoses import Diagnosis, diagnose
from loramux_adapters.training.layerwise import LayerStack
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.optimizers import restore_state, state_of
from loramux_adapters.training.recipe import (
    Recipe,
    ResolvedRecipe,
    TrainingBase,
    check_device,
    resolve,
    sequence_length,
)
from loramux_adapters.training.rows import read_rows
from loramux_adapters.training.samples import DataSet, Tokenize, tokenize_rows
from loramux_adapters.training.start import continued, new_spec, stamped
from loramux_adapters.training.trainer import StepReport, Trainer
from loramux_adapters.twin import twin_of
from loramux_adapters.weights import LoraWeights

MANIFEST_FILE = "training_manifest.json"
CHECKPOINTS = "checkpoints"


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


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The finished adapter at `out`, and what its manifest says."""

    out: Path
    weights: LoraWeights
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Prepared:
    recipe: ResolvedRecipe
    why: dict[str, str]
    data: DataSet
    validation: DataSet | None
    units: list[Unit]


class TrainingRun:
    """See the module. `recipe`, `why`, `data` and `validation` are for showing before it starts."""

    def __init__(
        self, model: PreTrainedModel, geometry: BaseGeometry, prepared: _Prepared, spec: AdapterSpec,
        initial: LoraWeights | None, asked: Recipe, out: Path,
    ) -> None:  # fmt: skip
        self.recipe, self.why = prepared.recipe, prepared.why
        self.data, self.validation = prepared.data, prepared.validation
        self.warnings = [*prepared.data.report.warnings]
        self.history: list[dict[str, Any]] = []
        self.out = out
        self._asked = asked
        self._geometry = geometry
        self._checkpoints = Checkpoints(out / CHECKPOINTS)
        self._dtype, self._device = str(model.dtype).removeprefix("torch."), str(model.device)
        twin = twin_of(model)
        recipe = self.recipe
        self.adapter = TrainedAdapter.install(
            twin, spec, geometry, seed=recipe.seed, dropout=recipe.lora_dropout, initial=initial
        )
        batches = Batches(prepared.units, recipe.batch_size, recipe.gradient_accumulation_steps, recipe.seed)
        self._trainer = Trainer(LayerStack(twin), self.adapter, recipe, self.data.samples, batches)
        self._identity = {
            "base": geometry.identity,
            "data": self.data.digest(),
            "initial": None if initial is None else initial.generation,
            "recipe": recipe.to_json(),
        }

    @classmethod
    def prepare(
        cls, model: PreTrainedModel, geometry: BaseGeometry, tokenizer: Any, recipe: Recipe, training_file: Path,
        out: Path, *, validation_file: Path | None = None, initial: LoraWeights | None = None, resume: bool = False,
        chat_template: str | None = None,
    ) -> TrainingRun:  # fmt: skip
        """Read and check everything; nothing is trained yet. `initial` are the weights `recipe.init_from` names.

        Raises TrainingError, or BaseModelError for a base that cannot be trained.
        """
        config = model.config.get_text_config()
        base = TrainingBase(geometry, config.hidden_size, context_length(config), model.device.type)
        check_device(recipe, base)
        check_output(out, resume=resume)
        if initial is not None:
            recipe = continued(recipe, initial.spec, geometry)
        length = sequence_length(recipe, base)
        tokenize = Tokenize(tokenizer, train_on_inputs=recipe.train_on_inputs, chat_template=chat_template)
        data = _read(training_file, tokenize, length, "training_file")
        validation = None
        if validation_file is not None:
            validation = _read(validation_file, tokenize, length, "validation_file")
        lengths = [len(sample) for sample in data.samples]
        units: list[Unit] = [(index,) for index in range(len(lengths))]
        if recipe.packing:
            units = pack(lengths, length)
        resolved, why = resolve(recipe, base, len(units), validated=validation is not None)
        spec = initial.spec if initial is not None else new_spec(resolved)
        spec = stamped(spec, geometry)
        prepared = _Prepared(resolved, why, data, validation, units)
        run = cls(model, geometry, prepared, spec, initial, recipe, out)
        if resume:
            run._resume()
        return run

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._trainer.step

    def chosen(self, field: str) -> object:
        """What "auto" became."""
        return {"learning_rate_multiplier": 1.0, **self.recipe.to_json()}[field]

    def plan(self) -> dict[str, Any]:
        """What would be trained, for showing before it is."""
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

    def slices(self) -> Generator[Event | None, None, TrainingResult]:
        """Train to the end. None is a place to stop; so is an event. Raises TrainingError or StorageError."""
        if self.step == 0:
            yield from self._validate()
        while self.step < self.recipe.total_steps:
            report = yield from self._trainer.slices()
            self.history.append({key: value for key, value in asdict(report).items() if key in _CURVE})
            yield report
            if self._due(self.recipe.eval_steps):
                yield from self._validate()
            yield from self._diagnoses()
            if self._due(self.recipe.save_steps):
                yield self.save()
        return self._finish()

    def save(self) -> CheckpointReport:
        """A checkpoint now; between two steps only, that is after a StepReport or before the first slice."""
        tensors, numbers = state_of(self._trainer.optimizer, self._trainer.parameters)
        snapshot = Snapshot(self.step, self.adapter.weights(), tensors, numbers, self._identity, self.history)
        return CheckpointReport(self.step, self._checkpoints.save(snapshot))

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.recipe.total_steps)

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

    def _resume(self) -> None:
        snapshot, problems = self._checkpoints.latest(self._geometry)
        self.warnings += problems
        if snapshot is None:
            return
        check_identity(snapshot.identity, self._identity)
        self.adapter.load(snapshot.weights)
        restore_state(
            self._trainer.optimizer, self._trainer.parameters, snapshot.optimizer, snapshot.optimizer_numbers
        )
        self._trainer.step = snapshot.step
        self.history = [dict(entry) for entry in snapshot.history]

    def _finish(self) -> TrainingResult:
        weights = self.adapter.weights()
        manifest = self._manifest(weights)
        publish(self.out, weights, MANIFEST_FILE, manifest)
        return TrainingResult(self.out, weights, manifest)

    def _manifest(self, weights: LoraWeights) -> dict[str, Any]:
        data = asdict(self.data.report) | {"digest": self.data.digest()}
        return {
            "format": 1,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "generation": weights.generation,
            "base": {
                "name": self._geometry.name,
                "identity": self._geometry.identity,
                "dtype": self._dtype,
                "device": self._device,
            },
            "recipe": self.recipe.to_json(),
            "asked": self._asked.model_dump(exclude_unset=True),
            "auto": self.why,
            "trainable_parameters": self.trainable_parameters,
            "data": data,
            "validation": None if self.validation is None else asdict(self.validation.report),
            "loss_curve": self.history,
            "versions": {
                "loramux": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


_CURVE = ("step", "epoch", "train_loss", "train_mean_token_accuracy", "learning_rate", "grad_norm")


def check_output(out: Path, *, resume: bool) -> None:
    """Raises TrainingError rather than write over an adapter, or start anew where a run could go on."""
    if (out / CONFIG_FILE).exists():
        raise TrainingError(f"{out} holds a finished adapter; choose another directory", param="out")
    if not resume and Checkpoints(out / CHECKPOINTS).steps():
        raise TrainingError(
            f"{out} holds the checkpoints of an unfinished run; continue it with resume, or choose another directory",
            param="out",
        )
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is not a directory", param="out")


def _read(path: Path, tokenize: Tokenize, length: int, param: str) -> DataSet:
    file = read_rows(path, param=param)
    try:
        return tokenize_rows(file.rows, tokenize, length, file=file.name, sha256=file.sha256)
    except TrainingError as error:
        if error.param == "training_file":  # said of rows, whichever file they are from
            raise TrainingError(f"{path.name}: {error.message}", param=param, code=error.code) from error
        raise
