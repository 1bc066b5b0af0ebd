"""Linears that read the same tensor (q, k and v; gate and up): found by watching one forward pass, then multiplied as one.

Promises: `shared_inputs` reads the model only; after `derive_kernels` every linear computes what it computed before, up
to the rounding of the compute dtype, and its canonical bytes are untouched. Nothing here is specific to an architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from loramux_adapters.kernels import DenseKernel, FusedKernel, Product, ResidentLinear, prepacks
from loramux_adapters.native.library import Native
from loramux_adapters.native.products import CodesKernel, multiplies
from loramux_adapters.nf4 import NF4Linear, NF4Weight


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
def derive_kernels(model: nn.Module, groups: Iterable[Sequence[str]], native: Native | None = None) -> None:
    """Give the linears of a CPU model their kernels, by group: from their codes if `native` can, else dense."""
    for group in groups:
        linears = [_adaptable(model.get_submodule(name)) for name in group]
        for linear, kernel in zip(linears, _kernels(linears, native), strict=True):
            linear.kernel = kernel


def _kernels(linears: Sequence[NF4Linear | ResidentLinear], native: Native | None) -> Sequence[Product]:
    biases = [linear.bias for linear in linears]
    canonical = [_canonical(linear) for linear in linears]
    if native is not None and multiplies(native, canonical):
        tiles = CodesKernel(native, canonical, biases)
        return (
            FusedKernel(tiles, [linear.out_features for linear in linears]).parts if biases[1:] else [tiles]
        )
    weights = [_dense(linear) for linear in linears]
    if len(linears) > 1 and all(prepacks(weight) for weight in weights):
        return FusedKernel.of_dense(weights, biases).parts
    return [DenseKernel(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _adaptable(module: nn.Module) -> NF4Linear | ResidentLinear:
    assert isinstance(module, (NF4Linear, ResidentLinear))
    return module


def _canonical(linear: NF4Linear | ResidentLinear) -> NF4Weight | torch.Tensor:
    return linear.quantized if isinstance(linear, NF4Linear) else linear.weight.detach()


def _dense(linear: NF4Linear | ResidentLinear) -> torch.Tensor:
    return linear.dequantize() if isinstance(linear, NF4Linear) else linear.weight.detach()
