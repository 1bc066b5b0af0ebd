"""The whole plan of one model: what `loramux plan` prints, as numbers. No torch.

    plan = make_plan(model, recipe, ServingOptions(), device="cuda", dtype="bfloat16", memory=24 * 10**9)
    plan.methods["qlora"].total

Promises: `to_json` holds every figure that the printed text shows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from loramux_adapters.errors import ConfigError, TrainingError
from loramux_adapters.planning.fit import Fit, ServingFit, fit_method, fit_qlora, fit_serving, kv_room_beside
from loramux_adapters.planning.serving import ServingMemory, ServingOptions, serving_memory
from loramux_adapters.planning.shape import ModelShape
from loramux_adapters.planning.training import (
    Method,
    MethodMemory,
    TrainingOptions,
    method_memory,
    trainable_parameters,
    training_options,
)
from loramux_adapters.planning.weights import Device
from loramux_adapters.spec import ALL_LINEAR
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.targets import ATTENTION, ATTENTION_QV

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
RANKS = (8, 16, 32, 64)
_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class MemoryFit:
    """Against `memory` bytes of one GPU."""

    memory: int
    methods: dict[Method, Fit]
    serving: ServingFit
    kv_beside_training: int  # bytes of KV cache that leave room for the QLoRA job; negative: there is none


@dataclass(frozen=True)
class Plan:
    model: ModelShape
    device: Device
    dtype: str
    training: TrainingOptions
    methods: dict[Method, MethodMemory]
    ranks: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]  # by target_modules, one for each of `ranks`
    serving_options: ServingOptions
    serving: ServingMemory
    fit: MemoryFit | None

    def to_json(self) -> dict[str, Any]:
        model, decoder = self.model, self.model.decoder
        return {
            "model": {
                "name": model.name,
                "architecture": model.architecture,
                "parameters": model.parameters,
                "linear_parameters": model.linear_parameters,
                "context_length": model.context_length,
                **asdict(decoder),
            },
            "device": self.device,
            "dtype": self.dtype,
            "training": {
                **asdict(self.training),
                "target_modules": list(self.training.target_modules),
                "tokens": self.training.tokens,
                "methods": {
                    name: {**asdict(memory), "total": memory.total} for name, memory in self.methods.items()
                },
                "trainable_parameters": {
                    targets: dict(zip(map(str, self.ranks), counts, strict=True))
                    for targets, counts in self.parameters.items()
                },
            },
            "serving": {
                **asdict(self.serving_options),
                "memory": {**asdict(self.serving), "least": self.serving.least, "total": self.serving.total},
            },
            "fit": None if self.fit is None else _fit_json(self.fit),
        }


def make_plan(
    model: ModelShape,
    recipe: Recipe,
    serving: ServingOptions,
    *,
    device: Device,
    dtype: str,
    max_model_len: int | None = None,
    memory: int | None = None,
) -> Plan:
    """`max_model_len` None is the model's. Raises TrainingError or ConfigError, naming the field."""
    item = _ITEM[dtype]
    options = training_options(model, recipe, device)
    serving = replace(serving, max_model_len=_context(model, max_model_len))
    methods = {method: method_memory(model, options, method, device, item) for method in METHODS}
    served = serving_memory(model, serving, device, item)
    ranks = tuple(sorted({*RANKS, options.r}))
    fit = None
    if memory is not None:
        if device != "cuda":
            raise ConfigError("gpu_memory is of a GPU: leave out --device cpu", param="gpu_memory")

        def total(other: TrainingOptions) -> int:
            return method_memory(model, other, "qlora", device, item).total

        fit = MemoryFit(
            memory=memory,
            methods={
                "full": fit_method(methods["full"].total, memory),
                "lora": fit_method(methods["lora"].total, memory),
                "qlora": fit_qlora(options, total, memory),
            },
            serving=fit_serving(served, serving, memory),
            kv_beside_training=kv_room_beside(methods["qlora"].beside_weights, served, serving, memory),
        )
    return Plan(
        model=model,
        device=device,
        dtype=dtype,
        training=options,
        methods=methods,
        ranks=ranks,
        parameters=_parameter_counts(model, options, ranks),
        serving_options=serving,
        serving=served,
        fit=fit,
    )


def _context(model: ModelShape, asked: int | None) -> int:
    if asked is None:
        return model.context_length
    if asked > model.context_length:
        raise ConfigError(
            f"--max-model-len {asked} is longer than the {model.context_length} positions of the model",
            param="max_model_len",
        )
    return asked


def _parameter_counts(
    model: ModelShape, options: TrainingOptions, ranks: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """For the presets that this model has, and for what was asked for if it is none of them."""
    counts: dict[str, tuple[int, ...]] = {}
    for preset in (ATTENTION_QV, ATTENTION, ALL_LINEAR):
        try:
            counts[preset] = tuple(trainable_parameters(model, preset, r) for r in ranks)
        except TrainingError:  # it names its attention otherwise: this preset is refused when training, too
            continue
    asked = tuple(trainable_parameters(model, options.target_modules, r) for r in ranks)
    if asked not in counts.values():
        counts[",".join(options.target_modules)] = asked
    return counts


def _fit_json(fit: MemoryFit) -> dict[str, Any]:
    def one(fit: Fit) -> dict[str, Any]:
        return {"fits": fit.fits, "left": fit.left, "changes": list(fit.changes)}

    return {
        "memory": fit.memory,
        "methods": {name: one(each) for name, each in fit.methods.items()},
        "serving": {**asdict(fit.serving), "fit": one(fit.serving.fit)},
        "kv_beside_training": fit.kv_beside_training,
    }
