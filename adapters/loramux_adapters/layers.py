"""One base linear, many adapters, a row each.

The form that every device has is the masked all-slots product. For the rows of one forward pass, with A `[R, in]` and B
`[R, out]` the stacked factors of the adapters that are active in it, `Y = X W^T + mask(X A^T) B`, where the mask `[rows,
R]` keeps a rank row only where it belongs to the row's adapter. Two dense products, no gather, no host synchronization.
Linears that read the same input (q, k and v; gate and up) share the first product. One active adapter for every row: no
mask. None: the base alone. Where there are kernels for it, each row may be multiplied with its own factors instead
(`row_adapters.py`). The scaling `lora_alpha / r` (or `/ sqrt(r)`, rsLoRA, https://arxiv.org/abs/2312.03732) is
folded into B at load.

Promises: a row whose adapter is None gets exactly the base's output; a row never sees another row's adapter, even if
that one overflows to infinity (foreign entries are overwritten with zero, not multiplied by it).
Does not know where adapters come from or which are resident (`bank.py`), nor where the factors lie (`pool.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loramux_adapters.kernels import DenseKernel
from loramux_adapters.row_adapters import RowAdapters


@dataclass(frozen=True)
class Shrink:
    """The first product of one group of linears: stacked A `[members * R, in]`."""

    kernel: DenseKernel
    members: int


@dataclass(frozen=True)
class Expand:
    """The second product of one linear: which columns of its group's first product it takes, and B `[R, out]`."""

    group: int
    columns: slice
    b: torch.Tensor


class AdapterBatch:
    """What every `MultiLoraLinear` reads in one forward pass; one object for the whole model.

    `foreign` is `[rows, R]` bool, True where a rank row is not the row's adapter's, or None when every row uses the one
    active adapter. A linear that no active adapter targets is absent from `expands`. With `by_rows` the others are not used.
    """

    def __init__(self) -> None:
        self.shrinks: Mapping[int, Shrink] = {}
        self.expands: Mapping[str, Expand] = {}
        self.foreign: torch.Tensor | None = None
        self.by_rows: RowAdapters | None = None
        self._input: torch.Tensor | None = None
        self._group = -1
        self._product: torch.Tensor | None = None

    def select(
        self, shrinks: Mapping[int, Shrink], expands: Mapping[str, Expand], foreign: torch.Tensor | None
    ) -> None:
        self.shrinks, self.expands, self.foreign = shrinks, expands, foreign
        self.by_rows = self._input = self._product = None

    def select_rows(self, by_rows: RowAdapters) -> None:
        self.select({}, {}, None)
        self.by_rows = by_rows

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y `[..., out]`, the base's product of x `[..., in]`, += the adapters', in place."""
        if self.by_rows is not None:
            self.by_rows.add(name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
            return
        expand = self.expands.get(name)
        if expand is not None:
            product = self.shrunk(expand.group, x)
            y.view(-1, y.shape[-1]).addmm_(product[:, expand.columns], expand.b)

    def shrunk(self, group: int, x: torch.Tensor) -> torch.Tensor:
        """mask(X A^T) of a group, `[rows, members * R]`; computed once for linears called with the same tensor."""
        if self._product is None or self._input is not x or self._group != group:
            shrink = self.shrinks[group]
            product = shrink.kernel(x.reshape(-1, x.shape[-1]))
            if self.foreign is not None:
                per_member = product.view(product.shape[0], shrink.members, -1)
                per_member.masked_fill_(self.foreign[:, None, :], 0.0)
            self._input, self._group, self._product = x, group, product
        return self._product


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
        self._batch.add(self.name, x, y)
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
