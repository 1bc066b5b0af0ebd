"""Which product multiplies NF4 weights on CUDA: it has proven itself on the device, or is not used, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from loramux_adapters import nf4
from loramux_adapters.nf4 import NF4Weight, bnb_matmul, cuda_matmul, dequantized_matmul, distance_of

HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was decided in one test is not known in the next."""
    cuda_matmul.cache_clear()
    yield
    cuda_matmul.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_that_is_right_is_used(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert cuda_matmul(HERE, dtype) is bnb_matmul
    assert "bitsandbytes' fused product" in caplog.text


@pytest.mark.parametrize("fault", ["columns", "bias", "nan", "rows"])
def test_a_product_that_is_wrong_is_not_used_and_the_log_says_so(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
        y = dequantized_matmul(x, weight, None if fault == "bias" else bias)
        if fault == "columns":
            y[..., :16] = y[..., 16:32].clone()
        if fault == "nan":
            y[..., -1, -1] = float("nan")
        if fault == "rows" and x.shape[-2] > 32:  # only the kernel for many rows
            y[..., 0, :] = 0
        return y

    monkeypatch.setattr(nf4, "bnb_matmul", wrong)
    with caplog.at_level(logging.WARNING):
        assert cuda_matmul(HERE, torch.bfloat16) is dequantized_matmul
    assert "is wrong on cpu" in caplog.text


def test_a_rounded_product_is_within_rounding() -> None:
    def rounded(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
        return dequantized_matmul(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)

    assert 0 < distance_of(rounded, HERE, torch.bfloat16) < 1e-2
