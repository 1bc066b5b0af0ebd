"""Products by tiles and by vectors: the weights are the dense matrix's, and a row is its own whatever is beside it."""

from __future__ import annotations

import ctypes
import logging
import mmap
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.kernels import DenseKernel, FusedKernel
from loramux_adapters.native import products
from loramux_adapters.native.library import Native
from loramux_adapters.native.products import CodesKernel, multiplies, probe, scales_of
from loramux_adapters.nf4 import NF4Weight


@pytest.fixture(scope="session", params=["tiles", "vectors"])
def multiplying(request: pytest.FixtureRequest, native: Native) -> Native:
    """The kernels with each way to multiply that runs here."""
    kernels = Native(native.library, native.openmp, tiles=request.param == "tiles")
    if kernels.products != request.param:
        pytest.skip(f"these have no products by {request.param}")
    return kernels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = NF4Weight.quantize(random(160, 192))


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_weights_are_those_of_the_dense_matrix(multiplying: Native, kind: str) -> None:
    dense = WEIGHT.dequantize(torch.bfloat16)
    kernel = CodesKernel(multiplying, [WEIGHT if kind == "nf4" else dense], [None])
    assert torch.equal(kernel(torch.eye(192).bfloat16()).T, dense)


@given(rows=st.integers(1, 100), seed=st.integers(0, 3))
def test_product_and_bias(multiplying: Native, rows: int, seed: int) -> None:
    x, bias = random(rows, 192, seed=seed).bfloat16(), random(160, seed=7).bfloat16()
    y = CodesKernel(multiplying, [WEIGHT], [bias])(x)
    exact = x.double() @ WEIGHT.dequantize(torch.bfloat16).double().T + bias.double()
    assert float((y.double() - exact).norm() / exact.norm()) < 3e-3
    assert y.shape == (rows, 160)


@pytest.mark.parametrize("outputs", [1, 2, 3, 5, 37])
def test_any_number_of_outputs(multiplying: Native, outputs: int) -> None:
    """A head has as many as there are tokens; tiles leave those to torch that do not fill them."""
    weight = random(outputs, 128).bfloat16()
    if multiplies(multiplying, [weight]):
        kernel = CodesKernel(multiplying, [weight], [random(outputs, seed=3).bfloat16()])
        for rows in (1, 4, 5, 40):
            x = random(rows, 128, seed=rows).bfloat16()
            exact = x.double() @ weight.double().T + random(outputs, seed=3).bfloat16().double()
            assert float((kernel(x).double() - exact).norm() / exact.norm()) < 2**-8
    else:
        assert multiplying.products == "tiles"


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 32, 33, 64, 79, 200])
def test_a_row_is_the_same_in_any_company(multiplying: Native, rows: int) -> None:
    kernel = CodesKernel(multiplying, [WEIGHT], [None])
    x = random(rows, 192).bfloat16()
    together = kernel(x)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(kernel(x[row : row + 1])[0], together[row])
    x[0] = float("nan")
    assert torch.equal(kernel(x)[1:], together[1:])


def test_shapes_and_types_of_inputs(multiplying: Native) -> None:
    kernel = CodesKernel(multiplying, [WEIGHT], [None])
    x = random(2, 5, 192).bfloat16()
    expected = kernel(x.view(10, 192)).view(2, 5, 160)
    assert torch.equal(kernel(x), expected)
    assert torch.equal(kernel(x.float()), expected)
    apart = torch.zeros(2, 5, 400, dtype=torch.bfloat16)
    apart[..., 100:292] = x
    assert torch.equal(kernel(apart[..., 100:292]), expected)
    assert torch.equal(kernel(x.transpose(0, 1)), expected.transpose(0, 1))
    assert kernel(x[:0]).shape == (0, 5, 160)
    with pytest.raises(RuntimeError, match="96 inputs for a weight of 192"):
        kernel(x.view(20, 96))


def test_linears_of_one_input(multiplying: Native) -> None:
    weights = [NF4Weight.quantize(random(rows, 192, seed=rows)) for rows in (64, 32, 96)]
    biases = [None, random(32, seed=1).bfloat16(), None]
    parts = FusedKernel(CodesKernel(multiplying, weights, biases), [64, 32, 96]).parts
    x = random(3, 192).bfloat16()
    for weight, bias, part in zip(weights, biases, parts, strict=True):
        assert torch.equal(part(x), CodesKernel(multiplying, [weight], [bias])(x))


def test_oneDNN_and_we_leave_each_other_alone(multiplying: Native) -> None:
    """Both configure the processor's tiles; neither may rely on how the other left them."""
    dense = WEIGHT.dequantize(torch.bfloat16)
    ours, theirs = CodesKernel(multiplying, [WEIGHT], [None]), DenseKernel(dense)
    inputs = [random(rows, 192, seed=rows).bfloat16() for rows in (1, 7, 32, 45, 130)]
    alone = [(ours(x), theirs(x)) for x in inputs]
    for x, (mine, other) in zip(inputs, alone, strict=True):
        for _ in range(3):
            assert torch.equal(ours(x), mine)
            assert torch.equal(theirs(x), other)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(multiplying: Native, threads: int) -> None:
    kernel, x = CodesKernel(multiplying, [WEIGHT], [None]), random(70, 192).bfloat16()
    expected = kernel(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernel(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 20, 33, 50])
def test_nothing_behind_the_rows_is_read(multiplying: Native, rows: int) -> None:
    """What follows x is a page that nobody may touch."""
    page, used = mmap.PAGESIZE, rows * 192 * 2
    pages = -(-used // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    protect = [ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page)]
    assert libc.mprotect(*protect, ctypes.c_int(0)) == 0
    try:
        x = torch.frombuffer(memory, dtype=torch.bfloat16, count=rows * 192, offset=pages * page - used).view(
            rows, 192
        )
        x.copy_(random(rows, 192))
        kernel = CodesKernel(multiplying, [WEIGHT], [None])
        assert torch.equal(kernel(x), kernel(x.clone()))
    finally:
        assert libc.mprotect(*protect, ctypes.c_int(mmap.PROT_READ | mmap.PROT_WRITE)) == 0


def test_bytes_held(multiplying: Native) -> None:
    numbers = 160 * 192
    assert CodesKernel(multiplying, [WEIGHT], [None]).num_bytes == numbers // 2 + 4 * numbers // 64
    assert CodesKernel(multiplying, [WEIGHT.dequantize(torch.bfloat16)], [None]).num_bytes == 2 * numbers


def test_scales_are_those_of_bitsandbytes() -> None:
    weight = NF4Weight.quantize(random(64, 64 * 40) * torch.linspace(0.01, 9.0, 64)[:, None])
    scales = scales_of(weight)
    largest = weight.dequantize(torch.float32).view(-1, 64).abs().amax(1)
    assert torch.allclose(scales, largest)  # every block has a weight whose code is 1 or -1


class Wrong:
    """Promises products, and leaves what was in memory."""

    products = "vectors"

    def product(self, *_: Any) -> int:
        return 0


def test_what_is_multiplied(multiplying: Native, caplog: pytest.LogCaptureFixture) -> None:
    dense = WEIGHT.dequantize(torch.bfloat16)
    assert multiplies(multiplying, [WEIGHT, WEIGHT])
    assert multiplies(multiplying, [dense])
    assert not multiplies(None, [WEIGHT])
    assert not multiplies(multiplying, [WEIGHT, dense])
    assert not multiplies(multiplying, [dense.float()])
    assert not multiplies(multiplying, [dense[:, :96].contiguous()])
    assert multiplies(multiplying, [dense[:48]]) == (multiplying.products == "vectors")
    wrong: Any = Wrong()
    with caplog.at_level(logging.WARNING):
        assert not multiplies(wrong, [WEIGHT])
    assert "products by torch: those by vectors are wrong here" in caplog.text
    assert probe(multiplying) < 3e-3


def test_where_there_are_no_products(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "products", None)
    assert not multiplies(native, [WEIGHT])


def test_no_memory_is_an_error(multiplying: Native) -> None:
    kernel = CodesKernel(multiplying, [WEIGHT], [None])
    kernel._product = lambda *_: 1
    with pytest.raises(MemoryError, match="no memory for a product"):
        kernel(random(1, 192).bfloat16())


def test_the_probe_sees_one_wrong_row(multiplying: Native) -> None:
    class Nearly:
        products = "vectors"

        def product(self, *arguments: Any) -> int:
            failed = multiplying.product(*arguments)
            y, rows, _, out = arguments[5:9]
            if rows > 80:  # one row of one number of rows
                ctypes.memset(y + 2 * out * (rows - 1), 0, 2 * out)
            return failed

    nearly: Any = Nearly()
    assert probe(nearly) > products._BOUND
