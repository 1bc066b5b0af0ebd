"""Which linears share an input, and that multiplying them as one changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loramux_adapters.grouping import derive_kernels, shared_inputs
from loramux_adapters.kernels import ResidentLinear, prepacking_available
from loramux_adapters.nf4 import NF4Linear, NF4Weight
from loramux_adapters.spec import BaseGeometry
from tests.adapters.support import TinyModel


def test_groups_are_the_linears_called_with_the_same_tensor(tiny_geometry: BaseGeometry) -> None:
    model = TinyModel(tiny_geometry)
    names = list(tiny_geometry.linear_shapes)
    groups = shared_inputs(model, names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert {frozenset(name.removeprefix("model.layers.") for name in group) for group in groups} == {
        frozenset({"0.self_attn.q_proj", "0.self_attn.v_proj"}),
        frozenset({"1.self_attn.q_proj", "1.self_attn.v_proj"}),
        frozenset({"0.mlp.down_proj"}),
        frozenset({"1.mlp.down_proj"}),
    }
    assert not model.get_submodule(names[0])._forward_pre_hooks


def test_a_linear_that_is_never_called_is_a_group_of_its_own(tiny_geometry: BaseGeometry) -> None:
    model = TinyModel(tiny_geometry)
    model.add_module("expert", nn.Linear(16, 16))
    assert ("expert",) in shared_inputs(model, [*tiny_geometry.linear_shapes, "expert"])


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_derived_kernels_compute_what_the_linears_computed(
    tiny_geometry: BaseGeometry, dtype: torch.dtype, quantized: bool
) -> None:
    model = TinyModel(tiny_geometry, dtype).requires_grad_(False)
    names = list(tiny_geometry.linear_shapes)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        ours = (
            NF4Linear(NF4Weight.quantize(linear.weight), linear.bias, dtype)
            if quantized
            else ResidentLinear(linear)
        )
        setattr(model.get_submodule(parent), leaf, ours)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = model(ids)
        derive_kernels(model, shared_inputs(model, names))
        after = model(ids)
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
    kinds = {name.rsplit(".", 1)[-1]: type(model.get_submodule(name).kernel).__name__ for name in names}
    together = "FusedPart" if dtype == torch.bfloat16 and prepacking_available() else "DenseKernel"
    assert kinds == {"q_proj": together, "v_proj": together, "down_proj": "DenseKernel"}
