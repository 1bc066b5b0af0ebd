"""Our NF4 product, interpreted, against dequantize-and-multiply; and for which rows it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loramux_adapters import nf4_rows
from loramux_adapters.nf4 import ROUNDING, NF4Linear, NF4Weight, bnb, dequantized_matmul
from loramux_adapters.nf4_rows import choose, choose_few_rows
from tests.adapters.support import UNUSABLE, measuring
from tests.interpreted import Interpreter
from tests.interpreted import interpreter as interpreter  # a fixture

pytest.importorskip("triton")


def few_rows_matmul(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """In the interpreter's process."""
    from loramux_adapters import triton_nf4

    return triton_nf4.few_rows_matmul(x, weight, bias)


def case(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool, seed: int
) -> tuple[torch.Tensor, NF4Weight, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    # Blocks of very different sizes, so that a scale from the wrong place shows.
    spread = torch.exp(torch.randn(outputs, inputs // 64, 1, generator=generator)).expand(-1, -1, 64)
    dense = torch.randn(outputs, inputs, generator=generator) * spread.reshape(outputs, inputs)
    x = torch.randn(1, rows, inputs, generator=generator).to(dtype)
    fixed = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    return x, NF4Weight.quantize(dense), fixed


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 64),
    outputs=st.integers(1, 100),
    inputs=st.sampled_from([128, 256, 640]),
    dtype=st.sampled_from([torch.float32, torch.float16]),  # its dot product knows no bf16 (tests/gpu does)
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_kernel_is_the_dequantized_product(
    interpreter: Interpreter,
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    bias: bool,
    seed: int,
) -> None:
    x, weight, fixed = case(rows, outputs, inputs, dtype, bias=bias, seed=seed)
    found = interpreter(__name__, "few_rows_matmul", x, weight, fixed)[0]
    assert found.shape == (1, rows, outputs)
    assert found.dtype == dtype
    exact = x.float() @ weight.dequantize(dtype).float().T + (0 if fixed is None else fixed.float())
    assert float((found.float() - exact).norm() / exact.norm()) <= ROUNDING[dtype]


def test_the_kernel_takes_what_it_can_read() -> None:
    from loramux_adapters.triton_nf4 import takes

    assert takes(NF4Weight.quantize(torch.randn(8, 256)))
    assert not takes(NF4Weight.quantize(torch.randn(8, 192)))
    packed, state = bnb.quantize_4bit(torch.randn(8, 256), blocksize=64, quant_type="nf4")
    assert not takes(NF4Weight(packed, state, (8, 256)))
    packed, state = bnb.quantize_4bit(
        torch.randn(8, 256), blocksize=128, quant_type="nf4", compress_statistics=True
    )
    assert not takes(NF4Weight(packed, state, (8, 256)))


# --- for which rows -------------------------------------------------------------------------------------------------


def doubled(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    return 2 * dequantized_matmul(x, weight, bias)


def linears(*shapes: tuple[int, int]) -> list[NF4Linear]:
    return [NF4Linear(NF4Weight.quantize(torch.randn(shape)), None, torch.float32) for shape in shapes]


def timed(ours: Callable[[int, int], float]) -> Callable[[Callable[[], object]], float]:
    """A clock for which theirs takes 1 s and ours takes `ours(rows, outputs)`."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        product, same, x = work.args  # type: ignore[attr-defined]
        return ours(x.shape[0], same[0].out_features) if product is doubled else 1.0

    return seconds


def test_each_shape_has_the_rows_for_which_ours_took_less(caplog: pytest.LogCaptureFixture) -> None:
    layers = linears((64, 128), (32, 128), (64, 128))
    faster = {64: {16: 0.5, 32: 0.8}, 32: {8: 0.94, 16: 0.96}}
    with caplog.at_level(logging.INFO):
        choose(
            layers, doubled, dequantized_matmul, timed(lambda rows, outputs: faster[outputs].get(rows, 2.0))
        )
    assert layers[0].few_rows == layers[2].few_rows == frozenset(range(9, 33))
    assert layers[1].few_rows == frozenset({8})
    assert "NF4 64 x 128: our product for 9 to 32 rows" in caplog.text
    assert "16: 0.50" in caplog.text


def test_nothing_is_chosen_where_nothing_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    layers = linears((64, 128))
    with caplog.at_level(logging.INFO):
        choose(layers, doubled, dequantized_matmul, timed(lambda rows, outputs: 1.0))
    assert layers[0].few_rows == frozenset()
    assert "for no number of rows" in caplog.text


def test_a_linear_multiplies_by_what_was_chosen_for_its_rows() -> None:
    [layer] = linears((64, 128))
    choose([layer], doubled, dequantized_matmul, timed(lambda rows, outputs: 0.5 if rows == 16 else 2.0))
    for rows, factor in ((8, 1), (9, 2), (16, 2), (17, 1)):
        x = torch.randn(1, rows, 128)
        expected = factor * dequantized_matmul(x, layer.quantized, None)
        torch.testing.assert_close(layer(x), expected)
    x = torch.randn(2, 8, 128, requires_grad=True)  # sixteen rows
    torch.testing.assert_close(layer(x), 2 * dequantized_matmul(x, layer.quantized, None))


def test_nothing_is_tried_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_: object) -> float:
        raise AssertionError("a product was tried")

    monkeypatch.setattr(nf4_rows, "distance_of", tried)
    layers = nn.Sequential(*linears((64, 128)))
    choose_few_rows(layers, torch.float32)


@UNUSABLE
def test_a_product_that_is_wrong_or_does_not_run_is_not_tried_for_speed(
    distance: float | RuntimeError,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(nf4_rows, "distance_of", measuring(distance))
    monkeypatch.setattr(nf4_rows, "_device_of", lambda _: torch.device("cuda"))
    [layer] = linears((64, 128))
    with caplog.at_level(logging.WARNING):
        choose_few_rows(nn.Sequential(layer), torch.float32)
    assert said in caplog.text
    assert layer.few_rows == frozenset()
