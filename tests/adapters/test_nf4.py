"""The resident weight: its canonical bytes never change, whatever is run through it, and they are its identity."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch

from loramux_adapters.errors import BaseModelError
from loramux_adapters.kernels import DenseKernel
from loramux_adapters.nf4 import NF4Linear, NF4Weight, base_identity, tensor_bytes

OUT, IN = 96, 128


def random_weight(seed: int = 0, shape: tuple[int, int] = (OUT, IN)) -> torch.Tensor:
    """Values that bf16 holds exactly, so that every dtype starts from the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def random_input(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(dtype: torch.dtype, *, keep_dense: bool, bias: bool = True) -> NF4Linear:
    fixed = torch.linspace(-1, 1, OUT) if bias else None
    layer = NF4Linear(NF4Weight.quantize(random_weight()), fixed, dtype)
    if keep_dense:
        layer.kernel = DenseKernel(layer.dequantize(), layer.bias)
    return layer


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tight = actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=1e-5 if tight else 2e-2, atol=1e-4 if tight else 0.15
    )


@pytest.mark.parametrize("keep_dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_then_training_leaves_the_bytes_alone(dtype: torch.dtype, keep_dense: bool) -> None:
    """What `bitsandbytes.nn.Linear4bit` gets wrong on CPUs: an evaluation forward, then a gradient step."""
    layer = linear(dtype, keep_dense=keep_dense).eval()
    dense = layer.dequantize(torch.float32).clone()
    before = [bytes(tensor_bytes(part)) for part in layer.quantized.canonical_parts()]
    digest = layer.quantized.digest()

    for rows in (1, 3, 17):
        with torch.no_grad():
            layer(random_input(1, rows, IN, dtype=dtype))
    x = random_input(1, 5, IN, dtype=dtype).requires_grad_()
    y = layer(x)
    weights = random_input(1, 5, OUT, dtype=dtype, seed=2)
    (y * weights).sum().backward()

    assert [bytes(tensor_bytes(part)) for part in layer.quantized.canonical_parts()] == before
    assert layer.quantized.digest() == digest
    assert torch.equal(layer.dequantize(torch.float32), dense)
    bias = layer.bias
    assert bias is not None
    close(y.detach(), x.detach().float() @ dense.T + bias.float())
    assert x.grad is not None
    close(x.grad, weights.float() @ dense)
    assert layer.weight.grad is None
    assert bias.grad is None


@pytest.mark.parametrize("keep_dense", [True, False])
def test_the_gradient_is_numerically_right(keep_dense: bool) -> None:
    layer = linear(torch.float32, keep_dense=keep_dense)
    x = random_input(2, IN, dtype=torch.float32).requires_grad_()
    direction = random_input(2, IN, dtype=torch.float32, seed=3)
    layer(x).square().sum().backward()
    step = 1e-3
    with torch.no_grad():
        difference = layer(x + step * direction).square().sum() - layer(x - step * direction).square().sum()
    assert x.grad is not None
    assert float((x.grad * direction).sum()) == pytest.approx(float(difference) / (2 * step), rel=1e-2)


def test_without_gradients_nothing_is_recorded() -> None:
    layer = linear(torch.float32, keep_dense=True)
    x = random_input(2, IN, dtype=torch.float32)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == []


def test_dequantized_values_do_not_depend_on_the_dtype_asked_for() -> None:
    """Computed in fp32 and rounded once: bf16 is the rounding of fp32."""
    for source in (torch.float32, torch.bfloat16):
        weight = NF4Weight.quantize(random_weight().to(source))
        dense = weight.dequantize(torch.float32)
        assert torch.equal(weight.dequantize(torch.bfloat16), dense.bfloat16())
        assert torch.equal(weight.dequantize(torch.float16), dense.half())


def test_quantization_is_close_and_small() -> None:
    weight = NF4Weight.quantize(random_weight(shape=(256, 256)))
    error = (weight.dequantize(torch.float32) - random_weight(shape=(256, 256))).abs().mean()
    assert 0.01 < float(error) < 0.1  # of standard normal values; the published figure is about 0.07
    assert weight.num_bytes * 8 / 256**2 == pytest.approx(4.13, abs=0.02)


# --- identity ----------------------------------------------------------------------------------------------------------


def test_identity_does_not_depend_on_the_checkpoints_float_type() -> None:
    """A base in bf16 and the same values in fp32 or fp16 are one base."""
    identities = {
        base_identity([("q", NF4Weight.quantize(random_weight().to(dtype)))])
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(identities) == 1
    assert len(identities.pop()) == 64


@pytest.mark.parametrize("part", range(4))
def test_identity_changes_with_any_byte(part: int) -> None:
    """Packed codes, scales, nested scales, offset."""
    weight, other = NF4Weight.quantize(random_weight()), NF4Weight.quantize(random_weight(1))
    before = base_identity([("q", weight), ("v", other)])
    changed = weight.canonical_parts()[part]
    changed.view(-1).view(torch.uint8)[-1] ^= 1
    assert base_identity([("q", weight), ("v", other)]) != before
    changed.view(-1).view(torch.uint8)[-1] ^= 1
    assert base_identity([("q", weight), ("v", other)]) == before


def test_identity_covers_names_shapes_and_dense_layers_but_not_the_order() -> None:
    q, v = NF4Weight.quantize(random_weight()), NF4Weight.quantize(random_weight(1))
    assert base_identity([("q", q), ("v", v)]) == base_identity([("v", v), ("q", q)])
    assert base_identity([("q", q), ("v", v)]) != base_identity([("q", v), ("v", q)])
    assert base_identity([("q", q)]) != base_identity([("k", q)])
    dense = random_weight()
    assert base_identity([("q", dense)]) != base_identity([("q", q)])
    assert base_identity([("q", dense)]) != base_identity([("q", dense.view(IN, OUT))])
    changed = dense.clone()
    changed[0, 0] += 1
    assert base_identity([("q", dense)]) != base_identity([("q", changed)])


def test_other_four_bit_types_are_refused_by_name() -> None:
    packed, state = bnb.quantize_4bit(
        random_weight(), blocksize=64, quant_type="fp4", compress_statistics=True
    )
    with pytest.raises(
        BaseModelError, match=r"^layers\.0\.q_proj is quantized as 'fp4'; only 'nf4'"
    ) as caught:
        NF4Weight.from_bitsandbytes(packed, state, "layers.0.q_proj")
    assert caught.value.param == "bnb_4bit_quant_type"


def test_a_bitsandbytes_weight_is_adopted_without_a_copy() -> None:
    packed, state = bnb.quantize_4bit(
        random_weight(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    adopted = NF4Weight.from_bitsandbytes(packed, state, "q")
    assert adopted.packed is packed
    assert adopted.shape == (OUT, IN)
    assert adopted.digest() == NF4Weight.quantize(random_weight()).digest()


@pytest.mark.parametrize("compress", [True, False])
def test_single_quantization_is_served_too(compress: bool) -> None:
    packed, state = bnb.quantize_4bit(
        random_weight(), blocksize=64, quant_type="nf4", compress_statistics=compress
    )
    adopted = NF4Weight.from_bitsandbytes(packed, state, "q")
    assert len(adopted.canonical_parts()) == (4 if compress else 2)
    assert len(adopted.digest()) == 32


# --- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_dense", [True, False])
def test_a_deep_copy_with_the_leaves_in_its_memo_shares_them(keep_dense: bool) -> None:
    """How a second module tree gets the same weights: not one byte twice."""
    layer = linear(torch.bfloat16, keep_dense=keep_dense)
    leaves: list[object] = [*layer.parameters(), layer.quantized]
    if layer.kernel is not None:
        leaves.append(layer.kernel)
    twin = copy.deepcopy(torch.nn.Sequential(layer), {id(leaf): leaf for leaf in leaves})[0]
    assert isinstance(twin, NF4Linear)
    assert twin is not layer
    assert twin.weight is layer.weight
    assert twin.bias is layer.bias
    assert twin.quantized is layer.quantized
    x = random_input(3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x))


def test_it_looks_like_a_linear() -> None:
    layer = linear(torch.bfloat16, keep_dense=False)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.data_ptr() == layer.quantized.packed.data_ptr()
    assert "nf4" in repr(layer)
    assert linear(torch.bfloat16, keep_dense=False, bias=False).bias is None
