"""The masked all-slots product of one linear, against the sum written out row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loramux_adapters.kernels import DenseKernel
from loramux_adapters.layers import AdapterBatch, Expand, MultiLoraLinear, Shrink, install
from loramux_adapters.nf4 import NF4Linear, NF4Weight
from loramux_adapters.spec import BaseGeometry
from tests.adapters.support import TinyModel

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]

IN, OUT = 24, 20
RANKS = {"one": 1, "four": 4, "nine": 9}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_linear() -> nn.Linear:
    return NF4Linear(NF4Weight.quantize(random(OUT, IN, seed=0)), random(OUT, seed=1), torch.float32)


def factors() -> Pairs:
    return {
        name: (random(rank, IN, seed=2 + i), random(rank, OUT, seed=20 + i))
        for i, (name, rank) in enumerate(RANKS.items())
    }


def select(batch: AdapterBatch, name: str, rows: list[str | None], own: Pairs) -> None:
    """Stack all adapters of `own`, in order, as the only linear of its group."""
    a = torch.cat([pair[0] for pair in own.values()])
    b = torch.cat([pair[1] for pair in own.values()])
    owner = [key for key, pair in own.items() for _ in range(pair[0].shape[0])]
    foreign = torch.tensor([[key != row for key in owner] for row in rows])
    batch.select(
        {0: Shrink(DenseKernel(a), 1)},
        {name: Expand(0, slice(0, a.shape[0]), b)},
        foreign if foreign.any() else None,
    )


@pytest.mark.parametrize("lead", [(), (1,)])
def test_mixed_rows_equal_the_sum_by_hand(lead: tuple[int, ...]) -> None:
    base, own, batch = base_linear(), factors(), AdapterBatch()
    layer = MultiLoraLinear(base, "q", batch)
    rows: list[str | None] = ["four", None, "one", "nine", "four", None, "nine"]
    x = random(*lead, len(rows), IN, seed=9)
    select(batch, "q", rows, own)
    with torch.inference_mode():
        y, plain = layer(x), base(x)
    assert y.shape == (*lead, len(rows), OUT)
    for index, row in enumerate(rows):
        if row is None:
            assert torch.equal(y[..., index, :], plain[..., index, :])
            continue
        a, b = own[row]
        expected = plain[..., index, :] + (x[..., index, :] @ a.T) @ b
        torch.testing.assert_close(y[..., index, :], expected, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(expected, plain[..., index, :], atol=0.1)


def test_one_adapter_for_all_rows_needs_no_mask() -> None:
    base, own, batch = base_linear(), {"four": factors()["four"]}, AdapterBatch()
    layer = MultiLoraLinear(base, "q", batch)
    x = random(1, 5, IN, seed=9)
    select(batch, "q", ["four"] * 5, own)
    assert batch.foreign is None
    with torch.inference_mode():
        torch.testing.assert_close(
            layer(x), base(x) + x @ own["four"][0].T @ own["four"][1], rtol=1e-5, atol=1e-4
        )


def test_a_linear_that_no_active_adapter_targets_is_the_base() -> None:
    base, batch = base_linear(), AdapterBatch()
    layer = MultiLoraLinear(base, "other", batch)
    x = random(3, IN, seed=9)
    select(batch, "q", ["four", None, None], factors())
    with torch.inference_mode():
        assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("poison", [3e38, float("inf"), float("nan")])
def test_an_adapter_that_overflows_touches_no_other_row(poison: float) -> None:
    base, own, batch = base_linear(), factors(), AdapterBatch()
    layer = MultiLoraLinear(base, "q", batch)
    rows: list[str | None] = ["four", "nine", None, "four", "one"]
    x = random(1, len(rows), IN, seed=9)
    select(batch, "q", rows, own)
    with torch.inference_mode():
        healthy = layer(x)
    own["four"][0].fill_(poison)
    select(batch, "q", rows, own)
    with torch.inference_mode():
        sick = layer(x)
    others = [1, 2, 4]
    assert torch.equal(sick[0, others], healthy[0, others])
    assert not bool(torch.isfinite(sick[0, [0, 3]]).all())


def test_linears_with_one_input_share_the_first_product() -> None:
    """Two members of a group, one of them with another input: computed from that input."""
    batch = AdapterBatch()
    q, v = MultiLoraLinear(base_linear(), "q", batch), MultiLoraLinear(base_linear(), "v", batch)
    (a_q, b_q), (a_v, b_v) = (factors()["four"], (random(4, IN, seed=50), random(4, OUT, seed=51)))
    shrink = Shrink(DenseKernel(torch.cat([a_q, a_v])), 2)
    expands = {"q": Expand(0, slice(0, 4), b_q), "v": Expand(0, slice(4, 8), b_v)}
    foreign = torch.tensor([[False] * 4, [True] * 4, [False] * 4])
    x, other = random(1, 3, IN, seed=9), random(1, 3, IN, seed=10)
    keep = torch.tensor([1.0, 0.0, 1.0])[:, None]
    with torch.inference_mode():
        for inputs in ((x, x), (x, other), (other, x)):
            batch.select({0: shrink}, expands, foreign)
            for layer, z, a, b in ((q, inputs[0], a_q, b_q), (v, inputs[1], a_v, b_v)):
                expected = layer.base_layer(z) + keep * (z @ a.T @ b)
                torch.testing.assert_close(layer(z), expected, rtol=1e-5, atol=1e-4)


def test_a_new_selection_forgets_the_product_of_the_last_one() -> None:
    """The same input tensor again, as a caller that reuses its buffers would pass it."""
    base, own, batch = base_linear(), factors(), AdapterBatch()
    layer = MultiLoraLinear(base, "q", batch)
    x = random(1, 1, IN, seed=9)
    with torch.inference_mode():
        select(batch, "q", ["four"], own)
        first = layer(x)
        select(batch, "q", ["nine"], own)
        assert not torch.allclose(layer(x), first)
        batch.select({}, {}, None)
        assert torch.equal(layer(x), base(x))


def test_install_puts_layers_in_place_and_keeps_them_linear(tiny_geometry: BaseGeometry) -> None:
    model = TinyModel(tiny_geometry)
    before = {name: model.get_submodule(name) for name in tiny_geometry.linear_shapes}
    layers, batch = install(model, list(tiny_geometry.linear_shapes))
    assert set(layers) == set(tiny_geometry.linear_shapes)
    for name, layer in layers.items():
        assert model.get_submodule(name) is layer
        assert layer.base_layer is before[name]
        assert layer.weight is before[name].weight
        assert layer.bias is before[name].bias
        assert (layer.out_features, layer.in_features) == tiny_geometry.linear_shapes[name]
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids), TinyModel(tiny_geometry)(ids))
    assert not batch.expands
