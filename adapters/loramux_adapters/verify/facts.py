"""What an adapter's tensors say without running a model: how much of them is not zero, how large the update is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from loramux_adapters.layers import MultiLoraLinear
from loramux_adapters.nf4 import NF4Linear
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.verify_report import ModuleFacts, WeightFacts
from loramux_adapters.weights import LoraWeights

_SMALLEST = 1e-12  # instead of a base weight's norm of zero


def update_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """||B @ A|| (Frobenius) of A `[r, in]`, B `[out, r]` without forming the product.

    ||BA||^2 = tr(A^T B^T B A) = tr((B^T B)(A A^T)), a product of two `[r, r]` Gram matrices, here in fp64.
    """
    a, b = a.double(), b.double()
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


@torch.no_grad()
def weight_norm(linear: nn.Module) -> float:
    """||W|| (Frobenius) of a resident linear; NF4 is dequantized to fp32, and dropped again."""
    if isinstance(linear, MultiLoraLinear):
        linear = linear.base_layer
    if isinstance(linear, NF4Linear):
        return float(linear.dequantize(torch.float32).norm())
    assert isinstance(linear, nn.Linear)
    return float(linear.weight.float().norm())


def module_facts(
    model: nn.Module, spec: AdapterSpec, name: str, a: torch.Tensor, b: torch.Tensor
) -> ModuleFacts:
    """A and B must be finite."""
    scaling = spec.scaling(name)
    delta = scaling * update_norm(a, b)
    norm = weight_norm(model.get_submodule(name))
    return ModuleFacts(name, a.shape[0], scaling, delta, norm, delta / max(norm, _SMALLEST))


def weigh(model: nn.Module, weights: LoraWeights) -> Iterator[ModuleFacts | None]:
    """One item per targeted module, None for one that is not finite."""
    for name, (a, b) in weights.tensors.items():
        finite = bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
        yield module_facts(model, weights.spec, name, a, b) if finite else None


def summarize(weights: LoraWeights, modules: list[ModuleFacts | None]) -> WeightFacts:
    """`modules` as `weigh` gave them."""
    tensors = [tensor for pair in weights.tensors.values() for tensor in pair]
    nonzero = [int(tensor.count_nonzero()) for tensor in tensors]
    return WeightFacts(
        modules=tuple(facts for facts in modules if facts is not None),
        nonzero_tensors=sum(count > 0 for count in nonzero) / len(tensors),
        nonzero_elements=sum(nonzero) / sum(tensor.numel() for tensor in tensors),
        zero_modules=tuple(name for name, (_, b) in weights.tensors.items() if not bool(b.any())),
        nonfinite_modules=tuple(
            name for name, facts in zip(weights.tensors, modules, strict=True) if facts is None
        ),
    )
