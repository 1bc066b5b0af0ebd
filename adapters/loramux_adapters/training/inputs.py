"""From files to what a run is made of: recipe in numbers, samples, what a batch counts. No torch.

Promises: nothing of a model is needed, only facts of it, so that this can happen in another process than the one that
holds the base; it takes as long as reading and tokenizing takes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.training.batches import Unit, pack
from loramux_adapters.training.memory import DecoderShape, TrainingMemory, training_memory
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


@dataclass(frozen=True)
class TrainingInputs:
    """Everything of a run but the base. `digest` is of the training samples."""

    asked: Recipe
    recipe: ResolvedRecipe
    why: dict[str, str]
    spec: AdapterSpec
    data: DataSet
    digest: str
    validation: DataSet | None
    units: list[Unit]

    @property
    def longest_batch(self) -> int:
        """Tokens that a batch holds at most, in whatever order the rows come."""
        lengths = [len(sample) for sample in self.data.samples]
        sizes = [sum(lengths[index] for index in unit) for unit in self.units]
        tokens = sum(heapq.nlargest(self.recipe.batch_size, sizes))
        if self.validation is not None:
            held_out = (len(sample) for sample in self.validation.samples)
            tokens = max(tokens, sum(heapq.nlargest(self.recipe.batch_size, held_out)))
        return tokens

    @property
    def longest_sample(self) -> int:
        sets = [self.data] if self.validation is None else [self.data, self.validation]
        return max(len(sample) for data in sets for sample in data.samples)

    def memory(
        self, config: Any, geometry: BaseGeometry, dtype_bytes: int, device: str, *, alone: bool = False
    ) -> TrainingMemory:
        """What the run needs beside a base of this text config that computes in this type on a torch device type."""
        return training_memory(
            DecoderShape.of(config),
            [geometry.linear_shapes[name] for name in self.spec.targets(geometry)],
            r=self.recipe.r,
            tokens=self.longest_batch,
            dtype_bytes=dtype_bytes,
            optimizer=self.recipe.optimizer,
            dropout=self.recipe.lora_dropout > 0,
            longest=self.longest_sample,
            device=device,
            alone=alone,
            accumulates=self.recipe.gradient_accumulation_steps > 1,
        )


def read_inputs(
    base: TrainingBase,
    tokenizer: Any,
    recipe: Recipe,
    training_file: Path,
    *,
    validation_file: Path | None = None,
    initial: AdapterSpec | None = None,
    chat_template: str | None = None,
) -> TrainingInputs:
    """Read and check everything. `initial` is the spec of the adapter that `recipe.init_from` names.

    Raises TrainingError.
    """
    asked = recipe
    check_device(recipe, base)
    if initial is not None:
        recipe = continued(recipe, initial, base.geometry)
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
    spec = initial if initial is not None else new_spec(resolved)
    return TrainingInputs(
        asked=asked,
        recipe=resolved,
        why=why,
        spec=stamped(spec, base.geometry),
        data=data,
        digest=data.digest(),
        validation=validation,
        units=units,
    )


def _read(path: Path, tokenize: Tokenize, length: int, param: str) -> DataSet:
    file = read_rows(path, param=param)
    try:
        return tokenize_rows(file.rows, tokenize, length, file=file.name, sha256=file.sha256)
    except TrainingError as error:
        if error.param == "training_file":  # said of rows, whichever file they are from
            raise TrainingError(f"{path.name}: {error.message}", param=param, code=error.code) from error
        raise
