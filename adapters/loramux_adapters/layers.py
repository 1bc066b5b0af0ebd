"""One base linear, many adapters, a row each: the masked all-slots product.

For the rows of one forward pass, with A `[R, in]` and B `[R, out]` the stacked factors of the adapters that are active
in it, `Y = X W^T + mask(X A^T) B`, where the mask `[rows, R]` keeps a rank row only where it belongs to the row's
adapter. Two dense products, no gather, no host synchronization. One active adapter for every row: no mask. None: the
base alone.
The scaling `lora_alpha / r` (or `/ sqrt(r)`, rsLoRA, https://arxiv.org/abs/2312.03732) is folded into B at load.

Promises: a row whose adapter is None gets exactly the base's output; a row never sees another row's adapter, even if
that one overflows to infinity (foreign entries are overwritten with zero, not multiplied by it).
Does not know where adapters come from or which are resident (`bank.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Factors:
    """The active rows of one linear's pool, as the forward pass uses them."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [R, out]


@dataclass
class AdapterBatch:
    """What every `MultiLoraLinear` reads in one forward pass; one object for the whole model.

    `foreign` is `[rows, R]` bool, True where a rank row is not the row's adapter's, or None when every row uses the one
    active adapter. `factors` maps a linear's name to its active rows; a linear no active adapter targets is absent.
    """

    factors: Mapping[str, Factors] = field(default_factory=dict)
    foreign: torch.Tensor | None = None


class MultiLoraLinear(nn.Module):
    """Stands where the base linear stood. Without an active adapter it is the base linear."""

    def __init__(self, base: nn.Linear, name: str, batch: AdapterBatch) -> None:
        super().__init__()
        self.base_layer = base
        self.name = name
        self.in_features = base.in_features
        self.out_features = base.out_features
        self._batch = batch

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        factors = self._batch.factors.get(self.name)
        if factors is None:
            return y
        rows = x.reshape(-1, self.in_features)
        z = F.linear(rows, factors.a)
        if self._batch.foreign is not None:
            z.masked_fill_(self._batch.foreign, 0.0)
        y.view(-1, self.out_features).addmm_(z, factors.b)
        return y


def install(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, MultiLoraLinear], AdapterBatch]:
    """Replace the named linears of `model` in place; returns them and the batch they all read."""
    batch = AdapterBatch()
    layers: dict[str, MultiLoraLinear] = {}
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layers[name] = MultiLoraLinear(base, name, batch)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers, batch
