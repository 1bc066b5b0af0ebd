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

from loramux_server.engine import decode_kernel as decode_kernel_module
from loramux_server.engine.attention import KVCache, PagedBatch, paged_attention
from loramux_server.engine.decode_kernel import decode_kernel, probe, reference
from tests.interpreted import Interpreter
from tests.interpreted import interpreter as interpreter  # a fixture

pytest.importorskip("triton")

KERNEL = ("loramux_server.engine.triton_attention", "paged_decode")
# The interpreter multiplies bf16 as if its bits were whole numbers: fp16 stands for both 16-bit types here.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
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

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Query, cache, table and lengths. Whatever no sequence may see is NaN."""
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(self.lengths) // self.block_size)
        blocks = torch.randperm(len(self.lengths) * width + 1, generator=generator)
        table = blocks[:-1].view(len(self.lengths), width)
        store = torch.full((len(blocks), self.block_size, 2, self.kv_heads, self.dim), float("nan"))
        for own, length in zip(table, self.lengths, strict=True):
            seen = torch.arange(0 if self.window is None else max(0, length - self.window), length)
            values = torch.randn(len(seen), 2, self.kv_heads, self.dim, generator=generator)
            store[own[seen // self.block_size], seen % self.block_size] = values
        query = 2 * torch.randn(len(self.lengths), self.kv_heads * self.group, self.dim, generator=generator)
        return query.to(self.dtype), store.to(self.dtype), table, torch.tensor(self.lengths)


def computed(interpreter: Interpreter, case: Case, *tensors: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(tensors[0], float("nan"))
    return interpreter(*KERNEL, *tensors, out, **case.options)[1][-1]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3).map(tuple),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    dim=st.sampled_from([8, 16, 64, 80, 96, 128]),
    block_size=st.sampled_from([4, 16, 32]),
    window=st.none() | st.integers(1, 160),
    softcap=st.sampled_from([None, 5.0, 50.0]),
    dtype=st.sampled_from(list(BOUNDS)),
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases, seed=st.integers(0, 2**20))
def test_the_kernel_is_attention_over_the_blocks(interpreter: Interpreter, case: Case, seed: int) -> None:
    tensors = case.tensors(seed)
    found = computed(interpreter, case, *tensors)
    assert distance(found, reference(*tensors, **case.options)) <= BOUNDS[case.dtype]


@pytest.mark.parametrize("group", [20, 32])
def test_more_query_heads_than_a_tile_has_rows(interpreter: Interpreter, group: int) -> None:
    case = Case((3, 70), kv_heads=1, group=group, dim=256, block_size=16)
    tensors = case.tensors()
    assert distance(computed(interpreter, case, *tensors), reference(*tensors, **case.options)) <= 1e-5


def test_a_sequence_gets_the_same_bits_in_any_batch(interpreter: Interpreter) -> None:
    case = Case((130, 1, 65, 8), dtype=torch.float16, window=100)
    query, store, table, lengths = case.tensors()
    together = computed(interpreter, case, query, store, table, lengths)
    for row, length in enumerate(case.lengths):
        own = table[row : row + 1, : -(-length // case.block_size)]
        alone = computed(interpreter, case, query[row : row + 1], store, own, lengths[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_rows_of_a_step_as_the_model_gives_them(interpreter: Interpreter) -> None:
    """Query heads before rows in memory, prompt chunks behind the decoding rows, and out the other way round."""
    case = Case((20, 9))
    query, store, table, lengths = case.tensors()
    rows = torch.cat([query, torch.full_like(query, float("nan"))])
    given_query = rows.transpose(0, 1).contiguous().transpose(0, 1)[:2]
    assert not given_query.is_contiguous()
    step = torch.full_like(rows, float("nan"))
    interpreted_out = interpreter(*KERNEL, given_query, store, table, lengths, step[:2], **case.options)[1][
        -1
    ]
    expected = reference(query, store, table, lengths, **case.options)
    assert distance(interpreted_out, expected) <= 1e-5


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_reference_is_the_gathered_attention(window: int | None, softcap: float | None) -> None:
    """`paged_attention` writes the last token of each sequence and attends; the cache it leaves is the reference's."""
    case = Case((33, 7, 16), window=window, softcap=softcap)
    query, store, table, lengths = replace(case, window=None).tensors()
    store = store.nan_to_num(0.0)
    cache = KVCache(1, store.shape[0], case.block_size, case.kv_heads, case.dim, torch.float32, store.device)
    cache.layers[0].copy_(store)
    last = lengths - 1
    slots = table[torch.arange(3), last // case.block_size] * case.block_size + last % case.block_size
    key, value = torch.randn(2, 1, case.kv_heads, 3, case.dim, generator=torch.Generator().manual_seed(1))
    batch = PagedBatch(
        slots=slots,
        begun=slots[:0],
        num_decodes=3,
        block_table=table,
        lengths=lengths,
        chunks=[],
        cache=cache,
    )
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    found, _ = paged_attention(
        module,
        query.transpose(0, 1)[None],
        key,
        value,
        None,
        paged=batch,
        scaling=case.dim**-0.5,
        sliding_window=window,
        softcap=softcap,
    )
    expected = reference(query, cache.layers[0], table, lengths, **case.options)
    assert distance(found[0], expected) <= 1e-5


# --- who gets to use it ---------------------------------------------------------------------------------------------

SHAPE = {"block_size": 16, "heads": 4, "kv_heads": 2, "head_dim": 32}


def test_without_cuda_no_kernel_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_: object) -> float:
        raise AssertionError("a kernel was tried")

    monkeypatch.setattr(decode_kernel_module, "probe", tried)
    assert decode_kernel(torch.device("cpu"), torch.float32, **SHAPE) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_right_on_the_device_is_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_kernel_module, "probe", lambda *_: 1e-6)
    found = decode_kernel(torch.device("cuda"), dtype, **SHAPE)
    assert found is not None
    assert found.__name__ == "paged_decode"  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [0.5, float("nan"), float("inf")])
def test_a_kernel_that_is_wrong_on_the_device_is_not_used_and_the_log_says_so(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decode_kernel_module, "probe", lambda *_: wrong)
    with caplog.at_level(logging.WARNING):
        assert decode_kernel(torch.device("cuda"), torch.bfloat16, **SHAPE) is None
    assert "wrong here" in caplog.text


def test_a_kernel_that_does_not_run_is_not_used_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("no C compiler was found\nand more")

    monkeypatch.setattr(decode_kernel_module, "probe", fails)
    with caplog.at_level(logging.WARNING):
        assert decode_kernel(torch.device("cuda"), torch.bfloat16, **SHAPE) is None
    assert "no C compiler was found" in caplog.text
    assert "and more" not in caplog.text


@pytest.mark.parametrize("fault", ["length", "table", "window", "softcap"])
def test_the_probe_notices_a_kernel_that_is_wrong(fault: str) -> None:
    def attends(*tensors: torch.Tensor, **options: Any) -> None:
        query, store, table, lengths, out = tensors
        if fault == "length":
            lengths = (lengths - 1).clamp(min=1)
        if fault == "table":
            table = table.sort().values
        options.pop(fault, None)
        out.copy_(reference(query, store, table, lengths, **options))

    found = probe(attends, torch.device("cpu"), torch.bfloat16, **SHAPE)
    assert found > 0.1


def test_the_probe_accepts_what_is_right() -> None:
    def attends(*tensors: torch.Tensor, **options: Any) -> None:
        tensors[-1].copy_(reference(*tensors[:-1], **options))

    assert probe(attends, torch.device("cpu"), torch.bfloat16, **SHAPE) < 5e-3
