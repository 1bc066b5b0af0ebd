"""A model of plain linears without attention, a bank of adapters on it, and the same computation by hand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import nn

from loramux_adapters.bank import AdapterBank
from loramux_adapters.grouping import shared_inputs
from loramux_adapters.layers import install
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import DeviceTier, Slot
from loramux_adapters.row_adapters import RowAdapters, Tiles
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights

Reader = Callable[[str, str], LoraWeights]
# What a check of a kernel may find that rules it out, and what the log must say then.
UNUSABLE = pytest.mark.parametrize(
    ("distance", "said"),
    [
        (0.5, "is wrong here (relative error 0.5)"),
        (float("nan"), "is wrong here"),
        (RuntimeError("no compiler\nx"), "does not run here (no compiler)"),
    ],
)


class TinyModel(nn.Module):
    """The linears of `tiny_geometry`. Every token is a row of its own: what it becomes depends on no other row."""

    def __init__(self, geometry: BaseGeometry, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embed = nn.Embedding(64, 16)
        for name, (out_features, in_features) in geometry.linear_shapes.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, nn.Linear(in_features, out_features, bias="v_proj" in name))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        for number in range(2):
            layer = self.get_submodule(f"model.layers.{number}")
            q = layer.get_submodule("self_attn.q_proj")(x)
            v = layer.get_submodule("self_attn.v_proj")(x)
            x = x + layer.get_submodule("mlp.down_proj")(torch.cat([q, v], -1) * 0.2)
        return x


class Harness:
    """A model with a bank; `reader` may be replaced to make loading slow or fail."""

    def __init__(
        self,
        geometry: BaseGeometry,
        adapters: Sequence[LoraWeights],
        *,
        max_loras: int = 4,
        rows: int = 64,
        max_cpu_loras: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.adapters = {weights.generation: weights for weights in adapters}
        self.plain = TinyModel(geometry, dtype)
        self.model = copy.deepcopy(self.plain)
        self.reader: Reader = lambda generation, path: self.adapters[generation]
        self.reads: list[str] = []
        self._merged: dict[str | None, nn.Module] = {}
        names = list(geometry.linear_shapes)
        groups = shared_inputs(self.model, names)
        self.layers, self.batch = install(self.model, names)
        pool = DevicePool(self.layers, groups, self.batch, rows, dtype, torch.device("cpu"))
        self.tier = DeviceTier(max_loras=max_loras, rows=rows, patience=8, min_admitted=1)
        self.bank = AdapterBank(pool, self.tier, self._read, max_cpu_loras=max_cpu_loras, dtype=dtype)

    def _read(self, generation: str, path: str) -> LoraWeights:
        self.reads.append(generation)
        return self.reader(generation, path)

    def prepare(self, generation: str) -> bool:
        """One step of the engine that asks for this adapter."""
        self.tier.tick += 1
        return self.bank.prepare(generation, "/somewhere")

    def make_ready(self, *generations: str) -> None:
        """Ask for each until it is usable; acquired, as the scheduler does."""
        for generation in generations:
            deadline = time.monotonic() + 60
            while not self.prepare(generation):
                assert time.monotonic() < deadline, "the adapter did not become ready"
                time.sleep(0.001)
            self.bank.acquire(generation)

    def settle(self) -> None:
        """Wait until no loader thread has anything to do."""
        for move in list(self.bank._moves.values()):
            move.future.exception(timeout=60)

    @torch.inference_mode()
    def run(self, rows: Sequence[str | None], tokens: Sequence[int] | None = None) -> torch.Tensor:
        """One forward pass, a token per row."""
        self.bank.set_adapter(rows)
        return self.model(torch.tensor([tokens or range(1, len(rows) + 1)]))[0]

    @torch.inference_mode()
    def by_hand(self, rows: Sequence[str | None], tokens: Sequence[int] | None = None) -> torch.Tensor:
        """Each row alone, in fp32, through a model whose weights are W + scaling * B A."""
        ids = tokens or range(1, len(rows) + 1)
        for row in set(rows) - self._merged.keys():
            self._merged[row] = merged(self.plain, None if row is None else self.adapters[row])
        answers = [self._merged[row](torch.tensor([token])) for row, token in zip(rows, ids, strict=True)]
        return torch.stack(answers).view(len(rows), -1)


def merged(plain: TinyModel, weights: LoraWeights | None) -> nn.Module:
    model = copy.deepcopy(plain).float()
    if weights is not None:
        for name, (a, b) in weights.tensors.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.data += weights.spec.scaling(name) * (b.float() @ a.float())
    return model


def exact_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    rows: Sequence[str | None],
    slots: Sequence[Slot],
) -> torch.Tensor:
    """y + x A^T B in fp64, of each row with the rank rows of its own adapter."""
    expected = y.double()
    for slot in slots:
        own = torch.tensor([name == slot.generation for name in rows], device=y.device)
        ranks = slice(slot.offset, slot.offset + slot.rows)
        expected[own] += x[own].double() @ a[ranks].double().T @ b[ranks].double()
    return expected


def check_rows(
    found: torch.Tensor, exact: torch.Tensor, y: torch.Tensor, rows: Sequence[str | None], bound: float
) -> None:
    """Rows of nobody are y's to the bit, and each of the others is within `bound` of its exact norm."""
    nobodys = torch.tensor([name is None for name in rows], device=y.device)
    assert torch.equal(found[nobodys], y[nobodys])
    errors = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert bool((errors <= bound).all()), errors  # also where one is not a number


def measuring(distance: float | RuntimeError) -> Callable[..., float]:
    """A check that finds this, or fails so."""

    def measured(*_: object) -> float:
        if isinstance(distance, RuntimeError):
            raise distance
        return distance

    return measured


def multiply_by_mask(
    a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor, tiles: Tiles, tile: int = 16
) -> None:
    """What a product row by row computes, in operations whose sizes do not depend on what the tables say."""
    first, count, offset, rank = tiles.tiles.long().unsqueeze(-1).unbind(1)  # [n, 1] each
    number = torch.arange(tile)
    rows = tiles.rows.long()[(first + number).clamp(max=len(tiles.rows) - 1)]
    rows = torch.where(number < count, rows, len(x))  # beyond the last: nobody's
    begins, ends = (torch.zeros(len(x) + 1, dtype=torch.long) for _ in range(2))
    begins[rows] = offset.expand_as(rows)
    ends[rows] = (offset + rank).expand_as(rows)
    ranks = torch.arange(len(a))
    own = (ranks >= begins[:-1, None]) & (ranks < ends[:-1, None])
    y += (x @ a.T).masked_fill(~own, 0.0) @ b


def by_mask(memory: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> RowAdapters:
    return RowAdapters(multiply_by_mask, memory, tile=16)
