"""Linears that read the same tensor (q, k and v; gate and up): found by watching one forward pass, then multiplied as one.

Promises: `shared_inputs` reads the model only; after `derive_kernels` every linear computes what it computed before, up
to the rounding of the compute dtype, and its canonical bytes are untouched. Nothing here is specific to an architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from loramux_adapters.kernels import DenseKernel, FusedKernel, Kernel, ResidentLinear, prepacks
from loramux_adapters.nf4 import NF4Linear


@torch.no_grad()
def shared_inputs(model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group the named linears by the input they are called with, seen in one forward pass of two tokens.

    A linear that is not called (an expert, say) is a group of its own. Grouping only saves work: a linear called with
    another tensor than its group is computed from that tensor.
    """
    inputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = arguments[0]  # held, so that no two live inputs share an id

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [remember(name) for name in names]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return [tuple(group) for group in groups.values()]


@torch.no_grad()
def derive_kernels(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Give the named linears of a CPU model their dense kernels; those of one group share one where it is reordered."""
    for group in groups:
        linears = [_adaptable(model.get_submodule(name)) for name in group]
        weights = [_dense(linear) for linear in linears]
        if len(linears) > 1 and all(prepacks(weight) for weight in weights):
            kernels: Sequence[Kernel] = FusedKernel(weights, [one.bias for one in linears]).parts
        else:
            kernels = [DenseKernel(w, one.bias) for w, one in zip(weights, linears, strict=True)]
        for linear, kernel in zip(linears, kernels, strict=True):
            linear.kernel = kernel


def _adaptable(module: nn.Module) -> NF4Linear | ResidentLinear:
    assert isinstance(module, (NF4Linear, ResidentLinear))
    return module


def _dense(linear: NF4Linear | ResidentLinear) -> torch.Tensor:
    return linear.dequantize() if isinstance(linear, NF4Linear) else linear.weight.detach()
