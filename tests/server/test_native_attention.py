"""Attention over blocks on the CPU: a token at a time in fp32 is the reference, and nobody else's blocks matter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.native.library import Native
from loramux_server.engine import attention_kernels as attention_kernels_module
from loramux_server.engine.attention_kernels import (
    AttentionShape,
    attention_kernels,
    prefill_time,
    reference,
)
from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import AttentionKernels, Ragged

CPU = torch.device("cpu")
SHAPE = AttentionShape(16, 6, 2, 64)


@pytest.fixture(scope="module", autouse=True)
def prompts_are_faster() -> Iterator[None]:
    """Where torch has matrix tiles time decides whether there is a kernel for prompts; here there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels_module, "prefill_time", lambda *_: [0.5, 0.5])
        yield


class Case:
    """Sequences of these lengths, in blocks in disorder; what no sequence holds is NaN."""

    def __init__(self, lengths: list[int], shape: AttentionShape, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = shape.block_size
        width = -(-max(lengths) // size)
        self.table = torch.randperm(len(lengths) * width + 3, generator=generator)[: len(lengths) * width]
        self.table = self.table.view(len(lengths), width)
        self.lengths = torch.tensor(lengths)
        blocks = (len(lengths) * width + 3, size, 2, shape.kv_heads, shape.head_dim)
        self.store = torch.full(blocks, float("nan"), dtype=torch.bfloat16)
        for row, length in enumerate(lengths):
            for position in range(length):
                held = torch.randn(blocks[2:], generator=generator).bfloat16()
                self.store[self.table[row, position // size], position % size] = held
        self.query = torch.randn(len(lengths), shape.heads, shape.head_dim, generator=generator).bfloat16()

    def rows(self, *chosen: int) -> Ragged:
        picked = list(chosen) or list(range(len(self.lengths)))
        return Ragged(self.table[picked], torch.arange(len(picked) + 1), self.lengths[picked], most=1)


@st.composite
def kinds(draw: st.DrawFn) -> tuple[AttentionShape, dict[str, Any]]:
    """What is attended over, and how."""
    kv_heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([32, 64, 96, 128]))
    heads = draw(st.integers(1, 9)) * kv_heads
    shape = AttentionShape(draw(st.sampled_from([1, 8, 16, 20, 32])), heads, kv_heads, size)
    window, softcap = draw(st.sampled_from([None, 1, 7, 40, 500])), draw(st.sampled_from([None, 2.0]))
    return shape, {"scale": size**-0.5, "window": window, "softcap": softcap}


@settings(deadline=None)  # sizes differ by far
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=20), kind=kinds(), seed=st.integers(0, 9))
def test_against_the_reference(
    native: Native, lengths: list[int], kind: tuple[AttentionShape, dict[str, Any]], seed: int
) -> None:
    shape, options = kind
    kernel = attention_kernels(CPU, torch.bfloat16, shape, native).decode
    assert kernel is not None
    case = Case(lengths, shape, seed)
    out = torch.full_like(case.query, float("nan"))
    kernel(case.query, case.store, case.rows(), out, **options)
    expected = reference(case.query, case.store, case.rows(), **options)
    assert torch.allclose(out.float(), expected, rtol=2e-2, atol=1e-2)
    last = len(lengths) - 1
    alone = torch.empty_like(case.query[:1])
    kernel(case.query[last:], case.store, case.rows(last), alone, **options)
    assert torch.equal(alone[0], out[last])


@settings(deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 80)), min_size=1, max_size=4),
    kind=kinds(),
    seed=st.integers(0, 9),
)
def test_prompts_against_the_reference(
    native: Native,
    sequences: list[tuple[int, int]],
    kind: tuple[AttentionShape, dict[str, Any]],
    seed: int,
) -> None:
    """Each sequence: its rows in this step, and the tokens before them."""
    shape, options = kind
    kernel = attention_kernels(CPU, torch.bfloat16, shape, native).prefill
    assert kernel is not None
    case = Case([count + before for count, before in sequences], shape, seed)
    counts = [count for count, _ in sequences]
    before = 2  # rows that decode
    begins = torch.tensor([before, *counts]).cumsum(0)
    query = torch.randn(
        int(begins[-1]), shape.heads, shape.head_dim, generator=torch.Generator().manual_seed(seed)
    ).bfloat16()
    rows = Ragged(case.table, begins, case.lengths, max(counts))
    out = torch.full_like(query, float("nan"))
    kernel(query, case.store, rows, out, **options)
    expected = reference(query, case.store, rows, **options)
    assert torch.allclose(out[before:].float(), expected, rtol=2e-2, atol=1e-2)
    assert bool(out[:before].isnan().all()), "rows that are nobody's prompt"
    # The last sequence in two steps instead of one.
    count, known = sequences[-1]
    own = slice(int(begins[-2]), None)
    cut = count // 2
    for start, stop in ((0, cut), (cut, count)):
        if stop > start:
            part = Ragged(
                case.table[-1:], torch.tensor([0, stop - start]), torch.tensor([known + stop]), stop - start
            )
            found = torch.empty_like(query[own][start:stop])
            kernel(query[own][start:stop], case.store, part, found, **options)
            assert torch.equal(found, out[own][start:stop])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing_of_prompts(native: Native, threads: int) -> None:
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).prefill
    assert kernel is not None
    case = Case([90, 33], SHAPE, 2)
    rows = Ragged(case.table, torch.tensor([0, 80, 100]), case.lengths, 80)
    query = torch.randn(100, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, out = torch.empty_like(query), torch.empty_like(query)
    kernel(query, case.store, rows, expected, scale=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernel(query, case.store, rows, out, scale=0.1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)


def test_queries_as_modeling_code_lays_them(native: Native) -> None:
    """Heads before tokens, or columns of a wider product."""
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).decode
    assert kernel is not None
    case = Case([5, 60, 33], SHAPE, 2)
    expected = torch.empty_like(case.query)
    kernel(case.query, case.store, case.rows(), expected, scale=0.1)
    wide = torch.zeros(3, 10, 64, dtype=torch.bfloat16)
    wide[:, 2:8] = case.query
    for query in (case.query.transpose(0, 1).contiguous().transpose(0, 1), wide[:, 2:8]):
        out = torch.empty_like(case.query)
        kernel(query, case.store, case.rows(), out, scale=0.1)
        assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match=r"attention in torch\.float32 over a cache in bf16"):
        kernel(case.query, case.store, case.rows(), expected.float(), scale=0.1)


def test_scores_that_are_large_and_far_apart(native: Native) -> None:
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).decode
    assert kernel is not None
    case = Case([70, 3], SHAPE, 0)
    case.query *= 60
    out = torch.empty_like(case.query)
    kernel(case.query, case.store, case.rows(), out, scale=1.0)
    assert torch.allclose(
        out.float(), reference(case.query, case.store, case.rows(), scale=1.0), rtol=2e-2, atol=2e-2
    )


def test_what_a_sequence_holds_that_is_not_a_number_shows(native: Native) -> None:
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).decode
    assert kernel is not None
    case = Case([20, 20], SHAPE, 1)
    case.store[case.table[0, 1], 2] = float("nan")
    out = torch.empty_like(case.query)
    kernel(case.query, case.store, case.rows(), out, scale=0.1)
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(native: Native, threads: int) -> None:
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).decode
    assert kernel is not None
    case = Case([5, 60, 33], SHAPE, 2)
    expected, out = torch.empty_like(case.query), torch.empty_like(case.query)
    kernel(case.query, case.store, case.rows(), expected, scale=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernel(case.query, case.store, case.rows(), out, scale=0.1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)


def test_where_there_is_no_kernel(
    native: Native, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    none = AttentionKernels()
    assert attention_kernels(CPU, torch.float32, SHAPE, native) == none
    assert attention_kernels(CPU, torch.bfloat16, SHAPE) == none
    assert attention_kernels(CPU, torch.bfloat16, AttentionShape(16, 6, 2, 80), native) == none
    monkeypatch.setattr(native, "attend", lambda query, store, rows, out, **_: out.zero_())
    with caplog.at_level(logging.WARNING):
        found = attention_kernels(CPU, torch.bfloat16, SHAPE, native)
    assert found.decode is None
    assert found.prefill is not None
    assert "decoding reads the gathered KV cache: the CPU kernel is wrong here" in caplog.text
    monkeypatch.setattr(native, "attend_prompts", lambda query, store, rows, out, **_: out.zero_())
    with caplog.at_level(logging.WARNING):
        assert attention_kernels(CPU, torch.bfloat16, SHAPE, native) == none
    assert "prompts read the gathered KV cache: the CPU kernel is wrong here" in caplog.text


@pytest.mark.parametrize(("relative", "used"), [([0.5, 0.9], True), ([0.5, 1.1], False), ([1.0, 0.5], False)])
def test_prompts_where_torch_has_matrix_tiles(
    native: Native, relative: list[float], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "products", "tiles")
    monkeypatch.setattr(attention_kernels_module, "prefill_time", lambda *_: relative)
    found = attention_kernels(CPU, torch.bfloat16, SHAPE, native)
    assert found.decode is not None
    assert (found.prefill is not None) == used


def test_both_forms_are_timed_on_a_cpu(native: Native) -> None:
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).prefill
    assert kernel is not None
    relative = prefill_time(kernel, CPU, torch.bfloat16, SHAPE, length=32)
    assert len(relative) == 2
    assert all(one > 0 for one in relative)


def test_keys_in_another_type_are_not_misread(native: Native) -> None:
    store = KVStore(1, 6, 4, 2, 32, torch.bfloat16, CPU, native)
    key = torch.ones(1, 2, 32)
    with pytest.raises((RuntimeError, IndexError)):
        store.write(0, torch.tensor([0]), torch.tensor([], dtype=torch.long), key, key)


@pytest.mark.parametrize(("key", "value"), [((2, 32), (2, 24)), ((2, 64), (2, 64)), ((4, 32), (4, 32))])
def test_keys_and_values_of_other_shapes_are_refused(
    native: Native, key: tuple[int, int], value: tuple[int, int]
) -> None:
    """Values narrower than keys, keys wider than the cache, other heads: torch raises, nothing is written."""
    store = KVStore(1, 6, 4, 2, 32, torch.bfloat16, CPU, native)
    before = store.layers[0].clone()
    with torch.inference_mode(), pytest.raises((RuntimeError, IndexError)):
        store.write(
            0,
            torch.tensor([1, 2]),
            torch.tensor([], dtype=torch.long),
            torch.ones(2, *key, dtype=torch.bfloat16),
            torch.ones(2, *value, dtype=torch.bfloat16),
        )
    assert torch.equal(store.layers[0], before)


def test_queries_of_other_heads_are_refused(native: Native) -> None:
    kernel = attention_kernels(CPU, torch.bfloat16, SHAPE, native).decode
    assert kernel is not None
    case = Case([5], SHAPE, 2)
    query = torch.ones(1, 5, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"attention of \(5, 64\) over a cache of \(2, 64\)"):
        kernel(query, case.store, case.rows(), torch.empty_like(query), scale=0.1)


@pytest.mark.parametrize("transposed", [False, True])
def test_keys_and_values_are_written_where_torch_writes_them(native: Native, transposed: bool) -> None:
    plain = KVStore(1, 6, 4, 2, 32, torch.bfloat16, CPU)
    ours = KVStore(1, 6, 4, 2, 32, torch.bfloat16, CPU, native)
    both = (
        torch.randn(2, 2, 9, 40).bfloat16()[..., 3:35] if transposed else torch.randn(2, 9, 2, 32).bfloat16()
    )
    key, value = both.transpose(1, 2) if transposed else both
    slots = torch.randperm(24)[:9]
    begun = torch.tensor([2])
    for store in (plain, ours):
        store.layers[0].fill_(7.0)
        store.write(0, slots, begun, key, value)
    assert torch.equal(ours.layers[0], plain.layers[0])
