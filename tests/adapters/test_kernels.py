"""The prepared matrix product equals the plain one, and the pool's zeros are zeros that can be written."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from loramux_adapters import kernels
from loramux_adapters.kernels import (
    DenseKernel,
    FusedKernel,
    ResidentLinear,
    prepacking_available,
    zeros_on_demand,
)

SHAPES = [(64, 64), (96, 128), (7, 33), (320, 64), (1, 5)]
BATCHES = [(1,), (3,), (40,), (1, 1), (1, 17), (2, 3)]


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_kernel_equals_linear(
    dtype: torch.dtype, shape: tuple[int, int], batch: tuple[int, ...], bias: bool
) -> None:
    weight = random(*shape, dtype=dtype, seed=0)
    x = random(*batch, shape[1], dtype=dtype, seed=1)
    b = random(shape[0], dtype=dtype, seed=2) if bias else None
    for prepack in (True, False):
        y = DenseKernel(weight, b, prepack=prepack)(x)
        assert y.shape == (*batch, shape[0])
        assert y.dtype == dtype
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        size = F.linear(x.double().abs(), weight.double().abs(), None if b is None else b.double().abs())
        # one rounding of the result (two where the bias is added to a rounded product), fp32 accumulation
        ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
        bound = (
            ulp * exact.abs() + (1 + bias) * ulp * 0.5 * size.clamp(max=exact.abs().max()) + 2.0**-18 * size
        )
        assert bool(((y.double() - exact).abs() <= bound).all())


def fused(dtype: torch.dtype) -> tuple[FusedKernel, list[torch.Tensor], list[torch.Tensor | None]]:
    """Three linears of one input; the middle one has no bias."""
    weights = [random(n, 32, dtype=dtype, seed=n) for n in (48, 16, 16)]
    biases = [random(48, dtype=dtype, seed=1), None, random(16, dtype=dtype, seed=2)]
    return FusedKernel.of_dense(weights, biases), weights, biases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_a_fused_kernel_equal_their_linears(dtype: torch.dtype) -> None:
    kernel, weights, biases = fused(dtype)
    x = random(1, 5, 32, dtype=dtype, seed=3)
    for part, weight, bias in zip(kernel.parts, weights, biases, strict=True):
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(part(x).double(), expected, rtol=1e-2, atol=0.1)


def test_what_is_added_to_a_part_is_never_handed_out_again() -> None:
    """A layer that is called twice with one tensor must not see what an adapter added the first time."""
    kernel, _, _ = fused(torch.float32)
    q, k, _ = kernel.parts
    x = random(2, 32, dtype=torch.float32, seed=3)
    first = q(x)
    clean = first.clone()
    first.add_(100)
    assert torch.equal(q(x), clean)
    assert float(k(x).abs().max()) < 50


def test_parts_called_with_different_tensors_do_not_mix() -> None:
    kernel, weights, _ = fused(torch.float32)
    _, k, _ = kernel.parts
    one, two = (random(2, 32, dtype=torch.float32, seed=seed) for seed in (3, 4))
    kernel.parts[0](one)
    torch.testing.assert_close(k(two), two @ weights[1].T)
    torch.testing.assert_close(k(one), one @ weights[1].T)


def test_a_product_is_let_go_when_every_part_has_been_called() -> None:
    kernel, _, _ = fused(torch.float32)
    x = random(2, 32, dtype=torch.float32, seed=3)
    held = weakref.ref(x)
    for part in kernel.parts:
        part(x)
    del x
    assert held() is None


def test_the_reordered_copy_replaces_the_plain_one_where_it_is_usable() -> None:
    weight = random(64, 96, dtype=torch.bfloat16, seed=0)
    assert DenseKernel(weight).prepacked == prepacking_available()
    assert not DenseKernel(weight, prepack=False).prepacked
    assert not DenseKernel(weight.float()).prepacked
    assert DenseKernel(weight).num_bytes == 64 * 96 * 2


def test_without_the_private_operators_the_plain_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "prepacking_available", lambda: False)
    weight, x = random(64, 96, dtype=torch.bfloat16, seed=0), random(3, 96, dtype=torch.bfloat16, seed=1)
    kernel = DenseKernel(weight)
    assert not kernel.prepacked
    assert torch.equal(kernel(x), F.linear(x, weight))


def test_a_probe_that_computes_nonsense_turns_prepacking_off(monkeypatch: pytest.MonkeyPatch) -> None:
    if not prepacking_available():
        pytest.skip("this CPU has no bf16 arithmetic")
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: plain(x, weight) + 1)
    assert not prepacking_available.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resident_linear_shares_the_weight_and_still_trains(dtype: torch.dtype) -> None:
    plain = torch.nn.Linear(64, 96, dtype=dtype)
    resident = ResidentLinear(plain)
    assert resident.weight is plain.weight
    assert resident.bias is plain.bias
    x = random(1, 5, 64, dtype=dtype, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(resident(x), plain(x), rtol=2e-2, atol=2e-2)
    x.requires_grad_()
    resident(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], plain.weight.detach().sum(0), rtol=2e-2, atol=2e-2)
    assert plain.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (3, 2, 1), (512, 4096)])
def test_zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = zeros_on_demand(shape, dtype, torch.device("cpu"))
    assert zeros.shape == shape
    assert zeros.dtype == dtype
    assert not bool(zeros.any())
    zeros.fill_(3)
    assert bool((zeros == 3).all())
    again = zeros_on_demand(shape, dtype, torch.device("cpu"))
    assert not bool(again.any())


def test_zeros_on_demand_costs_what_is_written() -> None:
    """A pool for the worst case must not take its whole size from the machine at start."""

    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    pool = zeros_on_demand((1024, 256 * 1024), torch.float32, torch.device("cpu"))  # 1 GiB
    pool[:4].fill_(1)
    assert resident_bytes() - before < 64 * 2**20


@pytest.mark.parametrize("slow", [False, True])
def test_gradients_where_bf16_is_slow(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "bf16_is_slow", lambda: slow)
    monkeypatch.setattr(kernels, "_WIDENED", 3 * 96)  # in several parts, the last one not whole
    monkeypatch.setattr(kernels, "_WIDENED_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).bfloat16()
    grad = torch.randn(2, 5, 64, generator=generator).bfloat16()
    exact = grad.double() @ weight.double()
    found = kernels.input_gradient(grad, weight)
    assert found.shape == (2, 5, 96)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 3e-3
    assert kernels.input_gradient(grad.float(), weight.float()).dtype == torch.float32


def test_whether_bf16_is_slow_is_known() -> None:
    assert isinstance(kernels.bf16_is_slow(), bool)
    if torch.cpu._is_amx_tile_supported():
        assert not kernels.bf16_is_slow()
