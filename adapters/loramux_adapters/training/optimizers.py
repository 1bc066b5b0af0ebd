"""AdamW over the factors, and its state as named tensors and numbers, so that a checkpoint needs no pickle.

The 8-bit and paged optimizers are bitsandbytes' and exist on CUDA only; the recipe has refused them elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loramux_adapters.errors import TrainingError
from loramux_adapters.training.recipe import ResolvedRecipe

BETAS = (0.9, 0.999)
EPS = 1e-8


def build_optimizer(recipe: ResolvedRecipe, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The learning rate is set before each step by the trainer."""
    values = list(parameters.values())
    options: dict[str, Any] = {"lr": 0.0, "betas": BETAS, "eps": EPS, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(values, fused=values[0].is_cuda, **options)
    from bitsandbytes import optim

    name = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}[recipe.optimizer]
    small: torch.optim.Optimizer = getattr(optim, name)(values, **options)
    return small


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Tensors by "parameter/field", on the CPU, and numbers by parameter and field."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter in parameters.items():
        for field, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{field}"] = value.detach().to("cpu", copy=True).contiguous()
            elif isinstance(value, int | float):
                numbers.setdefault(name, {})[field] = value
    return tensors, numbers


def restore_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Mapping[str, float]],
) -> None:
    """Put back what `state_of` gave. Raises TrainingError if it is of other parameters."""
    state: dict[int, dict[str, Any]] = {}
    names = {name: place for place, name in enumerate(parameters)}
    for key, tensor in tensors.items():
        name, _, field = key.partition("/")
        if name not in names:
            raise TrainingError(f"the checkpoint's optimizer state is of another adapter: it has {name}")
        state.setdefault(names[name], {})[field] = tensor
    for name, fields in numbers.items():
        state.setdefault(names[name], {}).update(fields)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
