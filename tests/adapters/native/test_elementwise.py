"""Norms, rotary embeddings and gates: torch's numbers, bit for bit but for the order of a norm's sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from loramux_adapters.native.library import Native, takes


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


@given(
    rows=st.integers(1, 70),
    size=st.integers(1, 80),
    around_one=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_rms_norm(native: Native, rows: int, size: int, around_one: bool, scale: float) -> None:
    x, weight = random(rows, 16 * size, scale=scale), random(16 * size, seed=1)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    expected = (normed * (1.0 + weight.float())).bfloat16() if around_one else weight * normed.bfloat16()
    ours = native.rms_norm(x, weight, 1e-5, around_one=around_one)
    assert torch.allclose(ours.float(), expected.float(), rtol=2**-6, atol=0)
    assert float((ours == expected).float().mean()) > 0.97


def test_rms_norm_of_rows_that_lie_apart(native: Native) -> None:
    whole = random(1, 6, 4, 64)
    x, weight = whole[:, :, 1:3], random(32 * 2)
    assert torch.equal(
        native.rms_norm(x, weight, 1e-5, around_one=False),
        native.rms_norm(x.clone(), weight, 1e-5, around_one=False),
    )


@given(tokens=st.integers(1, 40), heads=st.integers(1, 9), halves=st.integers(1, 4), seed=st.integers(0, 5))
def test_rotate(native: Native, tokens: int, heads: int, halves: int, seed: int) -> None:
    size = 32 * halves
    x = random(1, tokens, heads + 2, size, seed=seed)[:, :, 1:-1].transpose(
        1, 2
    )  # columns of a wider product
    angles = torch.randn(1, tokens, size // 2, generator=torch.Generator().manual_seed(seed))
    cosine, sine = (torch.cat((f(angles), f(angles)), -1).bfloat16() for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    expected = x * cosine[:, None] + torch.cat((-second, first), -1) * sine[:, None]
    assert torch.equal(native.rotate(x, cosine, sine), expected)


@given(rows=st.integers(1, 40), size=st.integers(1, 40), scale=st.sampled_from([0.1, 3.0, 200.0]))
def test_gate(native: Native, rows: int, size: int, scale: float) -> None:
    both = random(1, rows, 2 * 16 * size, scale=scale)
    gate, up = both.chunk(2, dim=-1)
    ours, expected = native.gate(gate, up), F.silu(gate) * up
    assert torch.allclose(ours.float(), expected.float(), rtol=2**-6, atol=1e-30)
    equal = torch.isclose(
        ours.float(), expected.float(), rtol=0, atol=1e-30
    )  # what vanishes, vanishes here later
    assert float(equal.float().mean()) > 0.97


def test_what_is_not_a_number_stays_none(native: Native) -> None:
    x = random(2, 32)
    x[1, 3] = float("nan")
    normed = native.rms_norm(x, random(32, seed=1), 1e-5, around_one=False)
    assert bool(normed[0].isfinite().all())
    assert bool(normed[1].isnan().all())
    gated = native.gate(x[None], x[None])
    assert gated.isnan().nonzero().tolist() == [[0, 1, 3]]
    infinite = torch.full((1, 1, 16), float("inf"), dtype=torch.bfloat16)
    assert bool((native.gate(infinite, infinite) == float("inf")).all())
    assert bool(
        (native.gate(-100 * torch.ones_like(infinite), torch.ones_like(infinite)).abs() < 1e-30).all()
    )


def test_what_kernels_take() -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert not takes(x)  # gradients may be wanted
    with torch.no_grad():
        assert takes(x, x)
        assert not takes(x, x.float())
        assert not takes(x.t())
        assert not takes(x.to("meta"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(native: Native, threads: int) -> None:
    x, weight = random(300, 576), random(576, seed=1)
    expected = native.rms_norm(x, weight, 1e-5, around_one=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native.rms_norm(x, weight, 1e-5, around_one=False), expected)
    finally:
        torch.set_num_threads(before)
