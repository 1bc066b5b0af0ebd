"""The decode kernel, interpreted, against the same attention in plain torch; and who gets to use it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loramux_server.engine import attention_kernels as kernels_module
from loramux_server.engine.attention import paged_attention
from loramux_server.engine.attention_kernels import (
    DECODING,
    PROMPTS,
    AttentionShape,
    Sequences,
    attention_kernels,
    prefill_time,
    probe,
    reference,
)
from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import AttentionKernels, Chunk, PagedBatch, Ragged
from tests.interpreted import Interpreter
from tests.interpreted import interpreter as interpreter  # a fixture

pytest.importorskip("triton")

KERNEL = ("loramux_server.engine.triton_attention", "paged_attention")
# The interpreter multiplies bf16 as if its bits were whole numbers: fp16 stands for both 16-bit types here.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Sequences as (rows, tokens that the last of them sees)."""

    sequences: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    block_size: int = 8
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.dim**-0.5, "window": self.window, "softcap": self.softcap}

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Ragged]:
        """Query, cache and rows. Whatever no row may see is NaN."""
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(length for _, length in self.sequences) // self.block_size)
        blocks = torch.randperm(len(self.sequences) * width + 1, generator=generator)
        table = blocks[:-1].view(len(self.sequences), width)
        store = torch.full((len(blocks), self.block_size, 2, self.kv_heads, self.dim), float("nan"))
        for own, (count, length) in zip(table, self.sequences, strict=True):
            first = 0 if self.window is None else max(0, length - count + 1 - self.window)
            seen = torch.arange(first, length)
            values = torch.randn(len(seen), 2, self.kv_heads, self.dim, generator=generator)
            store[own[seen // self.block_size], seen % self.block_size] = values
        counts = [count for count, _ in self.sequences]
        query = 2 * torch.randn(sum(counts), self.kv_heads * self.group, self.dim, generator=generator)
        begins = torch.tensor([0, *counts]).cumsum(0)
        lengths = torch.tensor([length for _, length in self.sequences])
        return query.to(self.dtype), store.to(self.dtype), Ragged(table, begins, lengths, max(counts))


def computed(
    interpreter: Interpreter, case: Case, query: torch.Tensor, store: torch.Tensor, rows: Ragged
) -> torch.Tensor:
    out = torch.full_like(query, float("nan"))
    return interpreter(*KERNEL, query, store, rows, out, **case.options)[1][-1]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def some_sequences(most: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """One to three sequences of up to `most` rows behind up to 150 tokens."""
    one = st.tuples(st.integers(1, most), st.integers(0, 150)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    return st.lists(one, min_size=1, max_size=3).map(tuple)


cases = st.builds(
    Case,
    sequences=some_sequences(1) | some_sequences(80),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    dim=st.sampled_from([8, 16, 64, 80, 96, 128]),
    block_size=st.sampled_from([4, 16, 32]),
    window=st.none() | st.integers(1, 160),
    softcap=st.sampled_from([None, 5.0, 50.0]),
    dtype=st.sampled_from(list(BOUNDS)),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases, seed=st.integers(0, 2**20))
def test_the_kernel_is_attention_over_the_blocks(interpreter: Interpreter, case: Case, seed: int) -> None:
    tensors = case.tensors(seed)
    found = computed(interpreter, case, *tensors)
    assert distance(found, reference(*tensors, **case.options)) <= BOUNDS[case.dtype]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("group", [20, 32, 71])
def test_more_query_heads_than_a_tile_has_rows(interpreter: Interpreter, group: int, rows: int) -> None:
    case = Case(((1, 3), (rows, 70)), kv_heads=1, group=group, dim=256, block_size=16)
    tensors = case.tensors()
    assert distance(computed(interpreter, case, *tensors), reference(*tensors, **case.options)) <= 1e-5


def test_a_tokens_window_may_begin_behind_the_first_keys_of_its_tile(interpreter: Interpreter) -> None:
    case = Case(((70, 90),), kv_heads=1, group=1, dim=128, window=5)  # 64 tokens at once, 32 keys
    tensors = case.tensors()
    assert distance(computed(interpreter, case, *tensors), reference(*tensors, **case.options)) <= 1e-5


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (90, 1, 40, 8)])
def test_a_sequence_gets_the_same_bits_in_any_batch(
    interpreter: Interpreter, counts: tuple[int, ...]
) -> None:
    pairs = tuple(zip(counts, (130, 1, 65, 8), strict=True))
    case = Case(pairs, dtype=torch.float16, window=100)
    query, store, rows = case.tensors()
    together = computed(interpreter, case, query, store, rows)
    for number, (count, length) in enumerate(pairs):
        if count == 1 < max(counts):
            continue  # alone it decodes, which is another tile of the same kernel
        own = slice(int(rows.begins[number]), int(rows.begins[number + 1]))
        table = rows.block_table[number : number + 1, : -(-length // case.block_size)]
        one = Ragged(table, torch.tensor([0, count]), rows.lengths[number : number + 1], count)
        alone = computed(interpreter, case, query[own], store, one)
        assert torch.equal(alone, together[own])


def test_rows_of_a_step_as_the_model_gives_them(interpreter: Interpreter) -> None:
    """Query heads before rows in memory, other rows before and behind, and those are not written."""
    case = Case(((1, 20), (3, 9)))
    query, store, rows = case.tensors()
    others = torch.full_like(query, float("nan"))
    step = torch.cat([others, query, others])
    given_query = step.transpose(0, 1).contiguous().transpose(0, 1)
    assert not given_query.is_contiguous()
    out = torch.full_like(step, 7.0)
    behind = Ragged(rows.block_table, rows.begins + len(query), rows.lengths, rows.most)
    found = interpreter(*KERNEL, given_query, store, behind, out, **case.options)[1][-1]
    assert distance(found[4:8], reference(query, store, rows, **case.options)) <= 1e-5
    assert torch.equal(found[:4], out[:4])
    assert torch.equal(found[8:], out[8:])


GATHERED = AttentionKernels()


class OneLayer(nn.Module):
    layer_idx = 0


def step_of(case: Case, kernels: AttentionKernels = GATHERED) -> tuple[torch.Tensor, torch.Tensor]:
    """What `paged_attention` gives for a step that writes the sequences' rows, and what it should give."""
    query, values, rows = replace(case, window=None).tensors()
    store = KVStore(1, len(values) - 1, case.block_size, case.kv_heads, case.dim, case.dtype, values.device)
    store.layers[0].copy_(values.nan_to_num(0.0))
    slots = []
    for table, (count, length) in zip(rows.block_table, case.sequences, strict=True):
        own = torch.arange(length - count, length)
        slots.append(table[own // case.block_size] * case.block_size + own % case.block_size)
    decodes = sum(count == 1 for count, _ in case.sequences)
    chunks = [
        Chunk(
            int(rows.begins[i]), count, length - count, rows.block_table[i, : -(-length // case.block_size)]
        )
        for i, (count, length) in enumerate(case.sequences)
        if count > 1
    ]
    batch = PagedBatch(
        slots=torch.cat(slots),
        begun=rows.begins[:0],
        num_decodes=decodes,
        block_table=rows.block_table[:decodes],
        lengths=rows.lengths[:decodes],
        chunks=chunks,
        store=store,
        kernels=kernels,
    )
    size = (2, 1, case.kv_heads, len(query), case.dim)
    key, value = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    found, _ = paged_attention(
        OneLayer(),
        query.transpose(0, 1)[None],
        key,
        value,
        None,
        paged=batch,
        scaling=case.dim**-0.5,
        sliding_window=case.window,
        softcap=case.softcap,
    )
    return found[0], reference(query, store.layers[0], rows, **case.options)


STEPS = [((1, 33), (1, 7), (1, 16)), ((9, 9), (5, 30)), ((1, 20), (1, 8), (17, 17), (2, 60))]


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", STEPS)
def test_the_reference_is_the_gathered_attention(
    rows: tuple[tuple[int, int], ...], window: int | None, softcap: float | None
) -> None:
    """`paged_attention` writes the rows of each sequence and attends; the cache it leaves is the reference's."""
    found, expected = step_of(Case(rows, window=window, softcap=softcap))
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("rows", STEPS)
@pytest.mark.parametrize("which", ["decode", "prefill", "both"])
def test_a_step_uses_the_kernels_it_was_given(
    interpreter: Interpreter, rows: tuple[tuple[int, int], ...], which: str
) -> None:
    called = []

    def kernel(
        query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
    ) -> None:
        called.append("decode" if rows.most == 1 else "prefill")
        out.copy_(interpreter(*KERNEL, query, store, rows, out, **options)[1][-1])

    kernels = AttentionKernels(
        decode=kernel if which != "prefill" else None, prefill=kernel if which != "decode" else None
    )
    found, expected = step_of(Case(rows, window=12), kernels)
    assert distance(found, expected) <= 1e-5
    kinds = {"decode" if count == 1 else "prefill" for count, _ in rows}
    assert set(called) == kinds & ({which} if which != "both" else kinds)


# --- who gets to use it ---------------------------------------------------------------------------------------------

SHAPE = AttentionShape(block_size=16, heads=4, kv_heads=2, head_dim=32)
CUDA = torch.device("cuda")


@pytest.fixture
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the device would say of the kernel."""
    says: dict[str, Any] = {"error": 1e-6, "times": [0.5, 0.7]}

    def found(*arguments: object) -> Any:
        error = says["of prompts"] if "of prompts" in says and arguments[-1] is PROMPTS else says["error"]
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(kernels_module, "probe", found)
    monkeypatch.setattr(kernels_module, "prefill_time", lambda *_: says["times"])
    return says


def test_without_cuda_no_kernel_is_tried(on_the_device: dict[str, Any]) -> None:
    on_the_device["error"] = AssertionError("a kernel was tried")
    assert attention_kernels(torch.device("cpu"), torch.float32, SHAPE) == AttentionKernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_right_and_faster_on_the_device_is_used(
    dtype: torch.dtype, on_the_device: dict[str, Any]
) -> None:
    found = attention_kernels(CUDA, dtype, SHAPE)
    assert found.decode is not None
    assert found.decode.__name__ == "paged_attention"  # type: ignore[attr-defined]
    assert found.prefill is found.decode


@pytest.mark.parametrize("times", [[0.5, 0.96], [1.4, 0.2], [float("nan"), 0.2], [0.2, float("nan")]])
def test_prompts_attend_by_torchs_operators_where_these_are_as_fast(
    times: list[float], on_the_device: dict[str, Any]
) -> None:
    on_the_device["times"] = times
    found = attention_kernels(CUDA, torch.bfloat16, SHAPE)
    assert found.decode is not None
    assert found.prefill is None


@pytest.mark.parametrize("wrong", [0.5, float("nan"), RuntimeError("out of resource: shared memory")])
def test_decoding_has_the_kernel_though_prompts_cannot_have_it(
    wrong: Any, on_the_device: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    on_the_device["of prompts"] = wrong
    with caplog.at_level(logging.WARNING):
        found = attention_kernels(CUDA, torch.bfloat16, SHAPE)
    assert found.decode is not None
    assert found.prefill is None
    assert [record.getMessage().split(" the ")[0] for record in caplog.records] == ["prompts read"]


@pytest.mark.parametrize("wrong", [0.5, float("nan"), float("inf")])
def test_a_kernel_that_is_wrong_on_the_device_is_not_used_and_the_log_says_so(
    wrong: float, on_the_device: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    on_the_device["error"] = wrong
    with caplog.at_level(logging.WARNING):
        assert attention_kernels(CUDA, torch.bfloat16, SHAPE) == AttentionKernels()
    assert "wrong here" in caplog.text


def test_a_kernel_that_does_not_run_is_not_used_and_the_log_says_why(
    on_the_device: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    on_the_device["error"] = RuntimeError("no C compiler was found\nand more")
    with caplog.at_level(logging.WARNING):
        assert attention_kernels(CUDA, torch.bfloat16, SHAPE) == AttentionKernels()
    assert "no C compiler was found" in caplog.text
    assert "and more" not in caplog.text


@pytest.mark.parametrize("sequences", [DECODING, PROMPTS])
@pytest.mark.parametrize("fault", ["length", "table", "begins", "window", "softcap"])
def test_the_probe_notices_a_kernel_that_is_wrong(fault: str, sequences: Sequences) -> None:
    def attends(
        query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
    ) -> None:
        if fault == "length":
            rows = replace(rows, lengths=torch.maximum(rows.lengths - 1, rows.begins.diff()))
        if fault == "table":
            rows = replace(rows, block_table=rows.block_table.sort().values)
        if fault == "begins":
            query = query.roll(1, 0)
        options.pop(fault, None)
        out.copy_(reference(query, store, rows, **options))

    assert probe(attends, torch.device("cpu"), torch.bfloat16, SHAPE, sequences) > 0.1


@pytest.mark.parametrize("sequences", [DECODING, PROMPTS])
def test_the_probe_accepts_what_is_right(sequences: Sequences) -> None:
    def attends(
        query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
    ) -> None:
        out.copy_(reference(query, store, rows, **options))

    assert probe(attends, torch.device("cpu"), torch.bfloat16, SHAPE, sequences) < 5e-3


def test_both_forms_are_timed_on_the_same_rows() -> None:
    ran: list[torch.Tensor] = []

    def seconds(device: torch.device, work: Any) -> float:
        result = work()
        if result is not None:
            ran.append(result)
        return float(len(ran) + 1)

    def attends(
        query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
    ) -> None:
        ran.append(reference(query, store, rows, **options))

    assert prefill_time(attends, torch.device("cpu"), torch.float32, SHAPE, seconds, 8) == [2 / 3, 4 / 5]
    for ours, gathered in zip(ran[::2], ran[1::2], strict=True):
        assert torch.allclose(ours, gathered, atol=1e-6)
