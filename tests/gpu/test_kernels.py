"""Our Triton kernels and bitsandbytes' fused product, compiled, on the device."""

from __future__ import annotations

import logging

import pytest
import torch

from loramux_adapters.nf4 import ROUNDING, NF4Linear, NF4Weight, bnb_matmul, cuda_matmul, tensor_bytes
from loramux_adapters.nf4_rows import choose_few_rows
from loramux_adapters.residency import Slot
from loramux_adapters.row_adapters import tiles_of
from loramux_server.engine.attention_kernels import AttentionShape, attention_kernels, reference
from loramux_server.engine.paged_batch import Ragged
from tests.adapters.support import check_rows, exact_rows

SHAPES = [  # kv_heads, query heads, head_dim: Llama-2-7B, Llama-3-8B, SmolLM2-135M, Gemma 2 9B, Phi-3
    (32, 32, 128),
    (8, 32, 128),
    (3, 9, 64),
    (8, 16, 256),
    (32, 32, 96),
]


ROWS = {"decode": (1, 1, 1, 1, 1), "prefill": (1, 16, 9, 511, 200)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "heads", "dim"), SHAPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, None), (None, 50.0), (16, 30.0)])
@pytest.mark.parametrize("kind", list(ROWS))
def test_attention(
    kind: str,
    kv_heads: int,
    heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    cuda: torch.device,
) -> None:
    kernel = attention_kernels(cuda, dtype, AttentionShape(16, heads, kv_heads, dim)).decode
    assert kernel is not None
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 16, 17, 511, 1000])
    width = -(-int(lengths.max()) // 16)
    table = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width)
    store = torch.randn(table.numel(), 16, 2, kv_heads, dim, generator=generator)
    for own, length in zip(table, lengths.tolist(), strict=True):  # what nobody may see
        beyond = torch.arange(length, width * 16)
        store[own[beyond // 16], beyond % 16] = float("nan")
    counts = ROWS[kind]
    begins = torch.tensor([0, *counts]).cumsum(0)
    query = torch.randn(sum(counts), heads, dim, generator=generator).to(cuda, dtype)
    store = store.to(cuda, dtype)
    rows = Ragged(table.to(cuda), begins.to(cuda), lengths.to(cuda), max(counts))
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    out = torch.full_like(query, float("nan"))
    kernel(query, store, rows, out, **options)
    expected = reference(query, store, rows, **options)
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert float((out.float() - expected).norm() / expected.norm()) <= bound
    own_rows = slice(int(begins[3]), int(begins[4]))
    alone = torch.empty_like(out[own_rows])
    one = Ragged(rows.block_table[3:4], rows.begins[3:5] - rows.begins[3], rows.lengths[3:4], counts[3])
    kernel(query[own_rows], store, one, alone, **options)
    assert torch.equal(alone, out[own_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_fused_product_passes_its_check(dtype: torch.dtype, cuda: torch.device) -> None:
    assert cuda_matmul(cuda, dtype) is bnb_matmul


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 33, 64, 128, 700])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (4096, 14336), (576, 1536)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_linear_is_its_dequantized_self(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, cuda: torch.device
) -> None:
    generator = torch.Generator(cuda).manual_seed(0)
    dense = torch.randn(shape, generator=generator, device=cuda) * shape[1] ** -0.5
    bias = torch.randn(shape[0], generator=generator, device=cuda)
    layer = NF4Linear(NF4Weight.quantize(dense), bias, dtype)
    before = [bytes(tensor_bytes(part)) for part in layer.quantized.canonical_parts()]
    x = torch.randn(1, rows, shape[1], generator=generator, device=cuda).to(dtype)
    exact = layer.dequantize(torch.float32)
    expected = x.float() @ exact.T + bias.to(dtype).float()
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    assert float((y.float() - expected).norm() / expected.norm()) < 5e-3

    x = x.detach().requires_grad_()
    gradient = torch.randn(1, rows, shape[0], generator=generator, device=cuda).to(dtype)
    layer(x).backward(gradient)
    assert x.grad is not None
    wanted = gradient.float() @ exact
    assert float((x.grad.float() - wanted).norm() / wanted.norm()) < 5e-3
    assert [bytes(tensor_bytes(part)) for part in layer.quantized.canonical_parts()] == before


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 4096), (4096, 14336), (576, 1536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_our_product_for_few_rows(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, cuda: torch.device
) -> None:
    from loramux_adapters.triton_nf4 import few_rows_matmul

    generator = torch.Generator(cuda).manual_seed(0)
    dense = torch.randn(shape, generator=generator, device=cuda)
    weight = NF4Weight.quantize(dense * torch.exp(dense[:, :1]))
    bias = torch.randn(shape[0], generator=generator, device=cuda).to(dtype)
    x = torch.randn(1, rows, shape[1], generator=generator, device=cuda).to(dtype)
    found = few_rows_matmul(x, weight, bias)
    exact = x.float() @ weight.dequantize(dtype).float().T + bias.float()
    assert found.shape == exact.shape
    assert float((found.float() - exact).norm() / exact.norm()) <= ROUNDING[dtype]


@pytest.mark.parametrize("rows", [1, 7, 33, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 1024), (14336, 4096), (576, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_row_by_row(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, cuda: torch.device
) -> None:
    from loramux_adapters.triton_lora import TILE, lora

    generator = torch.Generator(cuda).manual_seed(0)
    slots = [Slot("a", 0, 16), Slot("b", 20, 1), Slot("c", 30, 64), Slot("d", 100, 9)]
    inputs, outputs = shape
    a, b, x, y = (
        torch.randn(size, generator=generator, device=cuda).to(dtype)
        for size in ((120, inputs), (120, outputs), (rows, inputs), (rows, outputs))
    )
    who = [(None, "a", "b", "c", "d", "a", "a")[row % 7] for row in range(rows)]
    found = y.clone()
    lora(a, b, x, found, tiles_of(who, slots, TILE).with_room(rows).on(cuda))
    check_rows(found, exact_rows(a, b, x, y, who, slots), y, who, ROUNDING[dtype])
    lora(a, b, x, found, tiles_of([None] * rows, slots, TILE).on(cuda))
    last = slice(rows - 1, rows)
    alone = y[last].clone()
    lora(a, b, x[last], alone, tiles_of(who[-1:], slots, TILE).on(cuda))
    assert torch.equal(alone, found[last])


def test_rows_are_chosen_by_measuring(cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    weights = [NF4Weight.quantize(torch.randn(2048, 2048, device=cuda)) for _ in range(4)]
    model = torch.nn.Sequential(*(NF4Linear(weight, None, torch.bfloat16) for weight in weights))
    x = torch.randn(1, 16, 2048, device=cuda).bfloat16()
    expected = model(x)
    with caplog.at_level(logging.INFO):
        choose_few_rows(model, torch.bfloat16)
    assert "NF4 2048 x 2048: our product for" in caplog.text
    assert float((model(x).float() - expected.float()).norm() / expected.float().norm()) < 2e-2
