"""Memory of fine-tuning a model three ways: all of it, LoRA on 16-bit weights, LoRA on NF4. No torch.

The LoRA columns are this project's trainer, by `training/memory.py`. The full column is what is standard for AdamW in
mixed precision: 16 bytes a parameter, of which 2 are the weight, 2 its gradient and 12 the optimizer's fp32 copy, momentum
and variance (Rajbhandari et al. 2020, "ZeRO", section 3.1, https://arxiv.org/abs/1910.02054). Activations are those of
the same layer-wise pass in every column, so that the columns differ by what the methods differ by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux_adapters.planning.shape import ModelShape
from loramux_adapters.planning.weights import Device, Quantization, weight_bytes
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.memory import (
    TrainingMemory,
    adapter_parameters,
    alive_at_once,
    training_memory,
)
from loramux_adapters.training.recipe import Optimizer, Recipe, TrainingBase, resolve
from loramux_adapters.training.targets import resolve_targets

Method = Literal["full", "lora", "qlora"]

_ADAM_STATES = 8  # bytes a parameter: momentum and variance, fp32
_MASTER = 4  # of the fp32 copy beside 16-bit weights


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What of a recipe decides memory; "auto" is resolved."""

    r: int
    target_modules: tuple[str, ...]
    batch_size: int
    max_seq_length: int
    packing: bool
    optimizer: Optimizer
    lora_dropout: float
    accumulates: bool  # gradients over several micro-batches

    @property
    def tokens(self) -> int:
        """Of a batch of rows that are all as long as they may be."""
        return self.batch_size * self.max_seq_length


@dataclass(frozen=True, slots=True)
class MethodMemory:
    """Bytes. Not all of it is ever alive together: see `alive_at_once`."""

    trainable: int  # parameters
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    layer_inputs: int
    layer_activations: int
    logits: int
    accumulates: bool

    @property
    def total(self) -> int:
        return self.weights + self.beside_weights

    @property
    def beside_weights(self) -> int:
        """What training adds to a base that is resident anyway."""
        return self.adapter + self.optimizer + alive_at_once(self, accumulates=self.accumulates)


def training_options(model: ModelShape, recipe: Recipe, device: Device) -> TrainingOptions:
    """Resolved as a run would be, but for batch_size: what "auto" becomes depends on the data, so it is 1.

    Raises TrainingError for what this model, or the device, does not have.
    """
    base = TrainingBase(model.geometry(), model.decoder.hidden, model.context_length, device)
    resolved, _ = resolve(recipe, base, units=1)
    return TrainingOptions(
        r=resolved.r,
        target_modules=resolved.target_modules,
        batch_size=resolved.batch_size,
        max_seq_length=resolved.max_seq_length,
        packing=resolved.packing,
        optimizer=resolved.optimizer,
        lora_dropout=resolved.lora_dropout,
        accumulates=resolved.gradient_accumulation_steps > 1,
    )


def trainable_parameters(model: ModelShape, choice: str | Sequence[str], r: int) -> int:
    """Of an adapter of rank `r`. Raises TrainingError for a target that the model does not have."""
    return adapter_parameters(_targets(model, resolve_targets(choice, model.geometry()), r), r)


def method_memory(
    model: ModelShape, options: TrainingOptions, method: Method, device: Device, item: int
) -> MethodMemory:
    """With `item` bytes a number of the compute type."""
    if method == "full":
        return _full(model, options, device, item)
    quantization: Quantization = "nf4" if method == "qlora" else "none"
    beside = _pass(model, options, _targets(model, options.target_modules, options.r), device, item)
    return MethodMemory(
        trainable=trainable_parameters(model, options.target_modules, options.r),
        weights=weight_bytes(model, item, device, quantization),
        adapter=beside.adapter,
        gradients=beside.gradients,
        optimizer=beside.optimizer,
        layer_inputs=beside.layer_inputs,
        layer_activations=beside.layer_activations,
        logits=beside.logits,
        accumulates=options.accumulates,
    )


def _full(model: ModelShape, options: TrainingOptions, device: Device, item: int) -> MethodMemory:
    """Always AdamW. A CPU's reordered copies are of no use to weights that change: they are not counted."""
    beside = _pass(model, options, [], device, item)
    state = _ADAM_STATES + (_MASTER if item < _MASTER else 0)
    return MethodMemory(
        trainable=model.parameters,
        weights=model.parameters * item,
        adapter=0,
        gradients=model.parameters * item,
        optimizer=model.parameters * state,
        layer_inputs=beside.layer_inputs,
        layer_activations=beside.layer_activations,
        logits=beside.logits,
        accumulates=options.accumulates,
    )


def _pass(
    model: ModelShape,
    options: TrainingOptions,
    targets: list[tuple[int, int]],
    device: Device,
    item: int,
) -> TrainingMemory:
    return training_memory(
        model.decoder,
        targets,
        r=options.r,
        tokens=options.tokens,
        dtype_bytes=item,
        optimizer=options.optimizer,
        dropout=options.lora_dropout > 0,
        longest=options.max_seq_length,
        device=device,
        alone=True,
        accumulates=options.accumulates,
    )


def _targets(model: ModelShape, names: tuple[str, ...], r: int) -> list[tuple[int, int]]:
    spec = AdapterSpec(r, 1.0, names)
    return [model.linears[name] for name in spec.targets(model.geometry())]
